"""Whether directories fit each other: sizes, widths and shapes, from their headers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from dcr_mllm.denoiser_headers import DenoiserSummary, denoiser_summary
from dcr_mllm.errors import UserError
from dcr_mllm.headers import TowerSummary, read_json, read_safetensors_header, read_weights, tower_summary
from dcr_mllm.llava_headers import check_swap, llava_summary, llm_summary, vision_summary
from dcr_mllm.llava_names import part_of


def check_sizes(
    tower: TowerSummary, denoiser: DenoiserSummary, image_size: int | None, diffusion_size: int | None
) -> list[str]:
    """Refuses an image size that the tower's positions do not fit, or that does not divide into latents."""
    if image_size is not None and image_size != tower.image_size:
        raise UserError(
            f"image_size is {image_size}, but the tower takes {tower.image_size} ({tower.path}/config.json): its "
            "position embedding fits no other size; leave image_size out, or choose another tower"
        )
    size, name = diffusion_size or tower.image_size, "diffusion_size"
    if size <= 0 or size % denoiser.vae_scale:
        origin = "" if diffusion_size else " (the tower's size, since it is not set)"
        below = max(size // denoiser.vae_scale, 1) * denoiser.vae_scale
        raise UserError(
            f"{name} is {size}{origin}, expected a multiple of {denoiser.vae_scale}, the VAE's factor; "
            f"set {name}={below} or {below + denoiser.vae_scale}"
        )
    latent = size // denoiser.vae_scale
    notes = [f"sizes: tower {tower.image_size} px, VAE {size} px, latents {latent} x {latent}"]
    if latent % denoiser.unet_scale:
        # diffusers resizes on the way up, so the published 224 px on SD (28 x 28 latents) works and is not an error.
        notes.append(
            f"note: latents of {latent} are no multiple of {denoiser.unet_scale}, the UNet resizes inside; "
            f"multiples of {denoiser.vae_scale * denoiser.unet_scale} px avoid it"
        )
    return notes


def check_projector(directory: str | os.PathLike[str], tower_width: int | None, condition_width: int | None) -> None:
    """Refuses a projector that was made for another tower or another denoiser, or whose weights are not whole.

    Args:
        directory: a run's `projector/`.
        tower_width: width of the tower's embedding; None does not compare it.
        condition_width: width of the denoiser's conditions; None does not compare it.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise UserError(f"projector directory {str(directory)!r} does not exist; give the projector/ folder of a run")
    stored = read_json(directory / "config.json")
    for key, wanted, whose in (
        ("input_width", tower_width, "the tower's embedding has"),
        ("output_width", condition_width, "the denoiser's conditions have"),
    ):
        if wanted is not None and stored.get(key) != wanted:
            raise UserError(
                f"projector {directory} has {key} {stored.get(key)}, but {whose} width {wanted}; "
                "use the projector that was trained with this tower and denoiser, or leave projector out"
            )
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{directory / 'model.safetensors'} is missing; give the projector/ folder of a finished phase")
    for file in weights:
        read_safetensors_header(file)


def pairs(kinds: Mapping[Path, str]) -> Iterator[dict[str, Any]]:
    """What every two of some directories have to do with each other.

    Args:
        kinds: Each directory with its kind, see `dcr_mllm.inspection.kind_of`.

    Yields:
        `directories` (two), `fits`, and `notes`: why not, or what is worth knowing. Kinds that never meet are left out.
    """
    for first, second in combinations(kinds, 2):
        for one, other in ((first, second), (second, first)):
            check = _CHECKS.get((kinds[one], kinds[other]))
            if check is None:
                continue
            try:
                notes, fits = check(one, other), True
            except UserError as error:
                notes, fits = [str(error)], False
            if notes is not None:
                yield {"directories": [str(one), str(other)], "fits": fits, "notes": notes}


def _tower_denoiser(tower: Path, denoiser: Path) -> list[str]:
    summary = tower_summary(tower)
    return check_sizes(summary, denoiser_summary(denoiser), summary.image_size, None)


def _tower_projector(tower: Path, projector: Path) -> list[str]:
    check_projector(projector, tower_summary(tower).width, None)
    return []


def _denoiser_projector(denoiser: Path, projector: Path) -> list[str]:
    check_projector(projector, None, denoiser_summary(denoiser).cross_attention_dim)
    return []


def _tower_llava(tower: Path, llava: Path) -> list[str]:
    check_swap(llava_summary(llava), vision_summary(tower))
    return ["same shape as the tower inside, so `dcr-mllm swap` takes it; its projector was trained with that one"]


def _llm_llava(llm: Path, llava: Path) -> list[str]:
    model, summary = llm_summary(llm), llava_summary(llava)
    layers = {name.split("layers.")[1].split(".")[0] for name in summary.tensors if _is_language_layer(name)}
    for what, own, inside in (
        ("width", model.hidden_size, summary.text_hidden_size),
        ("layers", model.num_layers, len(layers)),
    ):
        if own != inside:
            raise UserError(f"{llm} has {what} {own}, the language model in {llava} {inside}: another model")
    return []


def _adapter_base(adapter: Path, base: Path) -> list[str] | None:
    """Refuses a LoRA whose matrices do not fit the linear layers that they stand on; None for another kind of model."""
    shapes = {_module(name): header.shape for name, header in read_weights(base).items()}
    matrices = read_safetensors_header(adapter / "adapter_model.safetensors")
    of_llava = any("language_model." in name for name in matrices)
    if of_llava != any(name.startswith("language/") for name in shapes):
        return None
    for name, header in matrices.items():
        inner = name.removeprefix("base_model.model.")
        if ".lora_A." not in inner and ".lora_B." not in inner:
            continue
        module, side = inner.split(".lora_")
        shape = shapes.get(_module(f"{module}.weight"))
        if shape is None:
            raise UserError(f"{adapter} adapts {module}, which {base} has not")
        if header.shape[1 if side.startswith("A") else 0] != shape[1 if side.startswith("A") else 0]:
            raise UserError(f"{adapter} has {name} {list(header.shape)}, but {module} in {base} is {list(shape)}")
    stated = str(read_json(adapter / "adapter_config.json").get("base_model_name_or_path"))
    if Path(stated).name != base.name:
        return [f"the shapes fit, but the adapter names another base: {stated}"]
    return []


def _module(name: str) -> str:
    """A tensor's name whatever the layout; those of no LLaVA keep theirs."""
    try:
        return "/".join(part_of(name))
    except UserError:
        return name


def _is_language_layer(name: str) -> bool:
    return ".layers." in name and _module(name).startswith("language/")


_CHECKS: dict[tuple[str, str], Callable[[Path, Path], list[str] | None]] = {
    ("tower", "denoiser"): _tower_denoiser,
    ("tower", "projector"): _tower_projector,
    ("denoiser", "projector"): _denoiser_projector,
    ("tower", "llava"): _tower_llava,
    ("llm", "llava"): _llm_llava,
    ("adapter", "tower"): _adapter_base,
    ("adapter", "llava"): _adapter_base,
}
