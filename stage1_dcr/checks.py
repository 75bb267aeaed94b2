"""Checks before anything heavy is imported: whether tower, denoiser, projector, sizes and images fit each other.

Everything is read from JSON files, safetensors headers and directory listings, in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

from dcr_mllm.denoiser_headers import DenoiserSummary, denoiser_summary
from dcr_mllm.errors import UserError
from dcr_mllm.fits import check_projector, check_sizes
from dcr_mllm.headers import TowerSummary, resolve_weights, tower_summary
from dcr_mllm.launch import deepspeed_file, zero_stage
from dcr_mllm.patterns import expand_braces
from stage1_dcr.config import Stage1Config
from stage1_dcr.profiles import OPENAI_MEAN, OPENAI_STD, known_defects
from stage1_dcr.remote import without_query
from stage1_dcr.shards import IMAGE_EXTENSIONS, TAR_EXTENSIONS
from stage1_dcr.validation_split import check_validation

IMAGE_SUFFIXES = tuple(f".{extension}" for extension in sorted(IMAGE_EXTENSIONS))

# Looking further than this into shards without finding an image would break the promise of an answer within seconds.
_MAX_SHARDS, _MAX_MEMBERS, _MAX_FILES = 20, 200, 100_000


def preflight(config: Any) -> list[str]:
    """Checks a stage 1 config against the files that it names.

    Args:
        config: a `Stage1Config`.

    Returns:
        Lines worth printing: what was found, and what is allowed but unusual.

    Raises:
        UserError: something does not fit; says what was found and what to do.
    """
    tower = tower_summary(resolve_weights(config.tower, "tower"))
    denoiser = denoiser_summary(resolve_weights(config.denoiser, "denoiser"))
    notes = [
        f"tower: {tower.model_type}, {tower.image_size} px, patch {tower.patch_size}, {tower.num_layers} layers x "
        f"{tower.hidden_size}, embedding {tower.width}, {_millions(tower.num_parameters)} parameters",
        f"denoiser: UNet with {_millions(denoiser.num_parameters)} parameters, condition width "
        f"{denoiser.cross_attention_dim}, predicts {denoiser.prediction_type}",
    ]
    notes += check_tower(tower)
    notes += check_denoiser(denoiser, config.prediction_type)
    if config.objective != "contrastive":
        check_timesteps(config.timestep_range, denoiser)
    notes += check_sizes(tower, denoiser, config.image_size, config.diffusion_size)
    if config.projector is not None:
        width = config.condition_width(embedding_width=tower.width, hidden_size=tower.hidden_size)
        check_projector(config.projector, width, denoiser.cross_attention_dim)
    notes += check_data(config.data)
    notes += check_validation(config, tower)
    notes += ignored_settings(config)
    notes += known_defects(config, tower, denoiser)
    file = deepspeed_file(config.deepspeed)
    if config.diagnose_every and file is not None:
        check_diagnostics(file)
    return notes


def ignored_settings(config: Any) -> list[str]:
    """Notes settings that no phase of this config reads."""
    losses = {config.objective_of(phase) for phase in ("projector", "tower") if config.steps_of(phase)}
    contrasts, denoises = losses & {"dcr", "contrastive", "joint"}, losses - {"contrastive"}
    without_phase = config.objective in ("contrastive", "dcr-end-to-end")
    defaults = {field.name: field.default for field in dataclasses.fields(Stage1Config)}
    reasons = {
        "negatives": "" if contrasts else "no phase contrasts images",
        "tau": "" if contrasts else "no phase contrasts images",
        "positives": "" if "dcr" in losses else "no phase trains with the objective dcr",
        "contrastive_weight": "" if "joint" in losses else "only the objective joint weighs its terms",
        "reconstruction_weight": "" if "joint" in losses else "only the objective joint weighs its terms",
        "projector_objective": f"the objective {config.objective} has no projector phase" if without_phase else "",
        "keep_close": "" if config.tower_steps else "it belongs to the tower phase, which has no steps",
        "keep_close_tokens": "" if config.keep_close else "keep_close is 0",
        "keep_close_distance": "" if config.keep_close else "keep_close is 0",
        "diagnose_every": "" if config.tower_steps else "there is no tower phase",
        "select": "" if config.tower_steps else "there is no tower phase",
        **dict.fromkeys(
            ("condition", "timestep_range", "timestep_sampling", "prediction_type", "projector"),
            "" if denoises else "no phase uses the denoiser",
        ),
    }
    return [
        f"note: {name} {getattr(config, name)} is ignored, since {reason}"
        for name, reason in reasons.items()
        if reason and getattr(config, name) != defaults[name]
    ]


def check_timesteps(timestep_range: tuple[int, int], denoiser: DenoiserSummary) -> None:
    """Refuses diffusion times that the denoiser's noise schedule does not have."""
    low, high = timestep_range
    if high > denoiser.num_train_timesteps:
        raise UserError(
            f"timestep_range is [{low}, {high}), but the scheduler of {denoiser.path} has only the times below "
            f"{denoiser.num_train_timesteps} (num_train_timesteps): lower its end."
        )


def check_diagnostics(deepspeed: Path) -> None:
    """Refuses diagnostics under ZeRO 3, which takes weights and gradients apart over the processes.

    There, `engine.backward` raises after `torch.autograd.grad` on the same graph (DeepSpeed 0.19).
    """
    if zero_stage(deepspeed)[0] == 3:
        raise UserError(
            f"diagnose_every cannot be used with ZeRO 3, which {deepspeed} asks for: set deepspeed to zero2, or "
            "diagnose_every to 0"
        )


def check_tower(tower: TowerSummary) -> list[str]:
    """Refuses a SigLIP tower whose image processor normalises as CLIP's does; notes a missing text side."""
    if tower.model_type == "siglip" and (_near(tower.image_mean, OPENAI_MEAN) or _near(tower.image_std, OPENAI_STD)):
        raise UserError(
            f"{tower.path} is a SigLIP tower, but its preprocessor_config.json has CLIP's image_mean and image_std "
            f"({list(tower.image_mean)}); SigLIP was trained with 0.5 and 0.5, copy the original file there"
        )
    if not tower.has_text_side:
        return ["note: this tower has no text side, so zero-shot accuracy and MMVP-VLM cannot be measured"]
    return []


def check_denoiser(denoiser: DenoiserSummary, prediction_type: str | None = None) -> list[str]:
    """Refuses denoisers whose conditions are not one text encoder's output, or whose target is unknown.

    Args:
        denoiser: what the directory says.
        prediction_type: the config's own, which overrides the scheduler's.
    """
    if denoiser.addition_embed_type is not None:
        raise UserError(
            f"{denoiser.path} is an SDXL-like model (addition_embed_type {denoiser.addition_embed_type!r}): its two "
            "text encoders and size conditions are not supported; use a Stable Diffusion 1.x or 2.x directory"
        )
    if denoiser.cross_attention_dim != denoiser.text_width:
        raise UserError(
            f"{denoiser.path}: the UNet takes conditions of width {denoiser.cross_attention_dim} (cross_attention_dim) "
            f"but text_encoder gives {denoiser.text_width} (hidden_size); take both folders from the same model"
        )
    if prediction_type is None and denoiser.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{denoiser.path}/scheduler predicts {denoiser.prediction_type!r}, expected epsilon or v_prediction; "
            "use a Stable Diffusion 1.x or 2.x directory"
        )
    notes = []
    if denoiser.variant is not None:
        notes.append(f"note: the UNet has {denoiser.variant} weights only; they are widened to the run's precision")
    if prediction_type is not None:
        notes.append(f"note: prediction_type {prediction_type} overrides the scheduler's {denoiser.prediction_type}")
    return notes


def check_data(data: str | list[str] | None) -> list[str]:
    """Refuses patterns that match nothing, and files or folders without a single image."""
    if not data:
        raise UserError(
            "data is not set; give WebDataset tars, an image folder or Parquet files, e.g. data='shards/*.tar'"
        )
    notes = []
    for pattern in [data] if isinstance(data, str) else data:
        if pattern == "mini":
            notes.append("images: drawn scenes of the miniature")
        elif pattern.startswith("hf:") or "://" in pattern:
            check_protocol(pattern)
            notes.append(f"images: {pattern} (not looked at before training)")
        else:
            paths = expand(pattern)
            if not paths:
                raise UserError(f"data {pattern!r} matches no file or folder (looked from {os.getcwd()})")
            named = [text for text in map(os.path.expanduser, expand_braces(pattern)) if not re.search(r"[*?\[]", text)]
            absent = [text for text in named if not os.path.exists(text)]
            if absent:
                raise UserError(
                    f"data {pattern!r} names {len(absent)} of {len(named)} files that do not exist: {absent[0]}"
                )
            if not _any_image(paths):
                raise UserError(
                    f"data {pattern!r} holds no image: none of {len(paths)} matching path(s) is a tar or Parquet file "
                    f"or a folder with images ({', '.join(IMAGE_SUFFIXES[:4])}, ...)"
                )
            notes.append(f"images: {pattern} ({len(paths)} path{'s' * (len(paths) > 1)})")
    return notes


def check_protocol(url: str) -> None:
    """Refuses a URL whose protocol is unknown, or needs a package that is not installed."""
    if "://" not in url:
        return
    import fsspec

    try:
        fsspec.get_filesystem_class(url.partition("://")[0].rpartition(":")[2])
    except (ImportError, ValueError) as error:  # both name the package or the protocol
        raise UserError(f"data {without_query(url)} cannot be opened: {error}") from None


def expand(pattern: str) -> list[Path]:
    """Existing paths behind a brace pattern (`{000..012}`, `{a,b}`) or a glob, in order and without doubles."""
    found: dict[Path, None] = {}
    for text in expand_braces(pattern):
        text = os.path.expanduser(text)
        # A file whose name holds [ or * is meant literally if it is there.
        matches = [text] if os.path.exists(text) else sorted(glob.glob(text, recursive=True))
        found.update(dict.fromkeys(map(Path, matches)))
    return list(found)


def _any_image(paths: list[Path]) -> bool:
    """Whether any of the paths gives an image; broken shards count as empty here, the stream names them."""
    inspected = 0
    for path in paths:
        name = path.name.lower()
        if path.is_dir():
            files = (Path(root, file) for root, _, names in os.walk(path) for file in names)
            inside = list(islice(files, _MAX_FILES))
            if any(file.name.lower().endswith((*IMAGE_SUFFIXES, ".arrow")) for file in inside):
                return True
            shards = [file for file in inside if file.name.lower().endswith((*TAR_EXTENSIONS, ".parquet"))]
            if shards and _any_image(shards[:_MAX_SHARDS]):
                return True
        elif name.endswith(IMAGE_SUFFIXES):
            return True
        elif name.endswith(TAR_EXTENSIONS):
            inspected += 1
            if _tar_has_image(path):
                return True
        elif name.endswith(".parquet") and _is_parquet(path):
            return True
        if inspected >= _MAX_SHARDS:
            break
    return False


def _tar_has_image(path: Path) -> bool:
    try:
        with tarfile.open(path) as archive:
            return any(member.name.lower().endswith(IMAGE_SUFFIXES) for member in islice(archive, _MAX_MEMBERS))
    except (tarfile.TarError, OSError, EOFError):
        return False


def _is_parquet(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def _near(values: tuple[float, ...], others: tuple[float, ...]) -> bool:
    return all(abs(value - other) < 0.005 for value, other in zip(values, others, strict=True))


def _millions(number: int) -> str:
    return f"{number / 1e6:.3g} M"
