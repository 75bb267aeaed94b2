"""`dcr-mllm reconstruct TOWER [TOWER2 ...] --images DIR`: what the denoiser draws from a tower's condition.

A grid of pictures: the originals, what the autoencoder leaves of them, what the denoiser draws without a condition, and
what it draws from each tower's. All towers go through one projector and begin with one noise, so that their pictures
differ by the towers alone. A table says in numbers how much a condition helps to denoise the image that it is of.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcr_mllm.cli import run_main
from dcr_mllm.config import read_yaml
from dcr_mllm.denoiser_headers import denoiser_summary
from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.tower import tower_names
from dcr_mllm.fits import check_projector, check_sizes
from dcr_mllm.headers import read_json, resolve_weights, tower_summary
from dcr_mllm.log import get_logger
from dcr_mllm.runs import CONFIG_FILE, PROVENANCE_FILE, hash_directory, package_versions, write_json_atomic
from stage1_dcr.checks import check_denoiser, check_tower
from stage1_dcr.config import Condition, Stage1Config
from stage1_dcr.profiles import OPENAI_MEAN, OPENAI_STD

if TYPE_CHECKING:
    from torch import Tensor

    from stage1_dcr.projector import Projector

logger = get_logger(__name__)

_OUR_NAMES = {"epsilon": "epsilon", "v_prediction": "velocity"}
NUM_TIMES = 20  # of the loss, spread evenly over the schedule


@dataclass(kw_only=True, frozen=True)
class Parts:
    """What is between a tower and a picture.

    Attributes:
        towers: Name -> directory.
        projector: Its directory.
        origin: The name of the tower whose run it is from; None where it was given.
        denoiser: Its directory.
        denoiser_hash: See `dcr_mllm.runs.hash_directory`.
        prediction_type: What the UNet outputs, where its scheduler is known to be wrong.
        size: Pixels per side that the autoencoder sees.
        condition: What of a tower the projector reads.
        normalisation: Of the tower's pixels, as in the training of the projector.
    """

    towers: dict[str, Path]
    projector: Path
    origin: str | None
    denoiser: Path
    denoiser_hash: str
    prediction_type: str | None = None
    size: int
    condition: Condition = "class"
    normalisation: str = "tower"


def projector_of(tower: Path) -> Path | None:
    """The projector that a tower was trained with: the one beside it in its run, or the one its run was given."""
    beside = tower.parent / "projector"
    if (tower / PROVENANCE_FILE).is_file() and (beside / "config.json").is_file():
        return beside
    given = _recorded_config(tower).get("projector")
    return None if given is None else Path(given)


def find_parts(
    towers: Mapping[str, str | Path],
    *,
    projector: str | None = None,
    denoiser: str | None = None,
    prediction_type: str | None = None,
) -> Parts:
    """Projector and denoiser for some towers, checked against each other by their headers.

    Args:
        towers: Name -> tower directory, downloaded id or `mini`.
        projector: Directory; None: that of the first tower which was trained with one.
        denoiser: Directory, downloaded id or `mini`; None: the one that the projector was trained for.
        prediction_type: epsilon or velocity; None: as the denoiser's scheduler says.

    Raises:
        UserError: One of them cannot be known and is not given, or they do not fit.
    """
    paths = {name: resolve_weights(value, "tower") for name, value in towers.items()}
    own = {name: beside for name, path in paths.items() if (beside := projector_of(path)) is not None}
    if projector is None and not own:
        raise UserError(
            f"no projector is known for {' or '.join(map(str, paths.values()))}: none lies beside it in a run; "
            "give one with --projector DIR"
        )
    origin = None if projector is not None else next(iter(own))
    chosen = Path(projector).expanduser() if projector is not None else own[str(origin)]
    recorded = [_recorded_config(path) for name, path in paths.items() if origin in (None, name)]
    config = chosen.parent / CONFIG_FILE
    settings = read_yaml(config) if config.is_file() else next(filter(None, recorded), {})

    model = denoiser or settings.get("denoiser")
    if model is None:
        raise UserError(f"which denoiser {chosen} was trained for is not known; give it with --denoiser DIR")
    denoiser_path = resolve_weights(model, "denoiser")
    summary = denoiser_summary(denoiser_path)
    check_denoiser(summary, prediction_type)
    trained_as = settings.get("prediction_type")
    if prediction_type is None and trained_as not in (None, _OUR_NAMES.get(summary.prediction_type)):
        logger.warning(
            "the run was trained as if the denoiser predicted %s; its scheduler says %s, which is what is drawn by "
            "(--prediction-type overrides it)",
            trained_as,
            summary.prediction_type,
        )
    condition = settings.get("condition", "class")
    trained = Stage1Config(tower="", denoiser=model, condition=condition)
    summaries = {name: tower_summary(path) for name, path in paths.items()}
    for tower in summaries.values():
        check_tower(tower)
        width = trained.condition_width(embedding_width=tower.width, hidden_size=tower.hidden_size)
        check_projector(chosen, width, summary.cross_attention_dim)
    stored, found = read_json(chosen / "config.json").get("denoiser_hash"), hash_directory(denoiser_path)
    if stored is None:
        logger.warning("%s does not say which denoiser it was trained for; %s is taken", chosen, denoiser_path)
    elif found != stored:
        raise UserError(
            f"projector {chosen} was trained for another denoiser ({stored[:12]}...) than {denoiser_path} "
            f"({found[:12]}...), to which its conditions mean nothing; give the right one with --denoiser DIR"
        )
    first = summaries[origin or next(iter(summaries))]
    size = settings.get("diffusion_size") or first.image_size
    check_sizes(first, summary, None, size)
    return Parts(
        towers=paths,
        projector=chosen,
        origin=origin,
        denoiser=denoiser_path,
        denoiser_hash=found,
        prediction_type=prediction_type,
        size=size,
        condition=condition,
        normalisation=settings.get("normalisation", "tower"),
    )


def read_images(directory: str | Path, *, limit: int, size: int) -> tuple[Tensor, list[str], list[str]]:
    """The central square of the first images that can be decoded, in the order of their names.

    Args:
        directory: Whatever stage 1 takes as `data`, see `stage1_dcr.sources.open_source`.
        limit: How many.
        size: Side of the result.

    Returns:
        uint8 [N, 3, size, size], N <= limit; their keys; the keys of those that were skipped.

    Raises:
        UserError: There is none.
    """
    import torch

    from stage1_dcr.samples import decode_crop
    from stage1_dcr.sources import open_source

    images: list[Tensor] = []
    keys: list[str] = []
    skipped: list[str] = []
    source = open_source(directory)
    for entry in (entry for shard in source.shards for entry in shard.samples(lambda index: True)):
        problem = entry.problem
        if entry.data is not None:
            try:
                images.append(decode_crop(entry.data, size, _central_square))
                keys.append(entry.key)
            except Exception as error:  # fed with broken bytes, a decoder raises nearly anything
                problem = f"{type(error).__name__}: {error}"
        if problem:
            skipped.append(entry.key)
            logger.warning("skipped %s: %s", entry.key, problem)
        if len(images) == limit:
            break
    if not images:
        raise UserError(f"{source.description} holds no image that can be read: {len(skipped)} are broken")
    return torch.stack(images), keys, skipped


def reconstruct(
    parts: Parts,
    images: Tensor,
    *,
    steps: int = 50,
    guidance: float = 1.0,
    seed: int = 0,
    start: int | None = None,
    device: str = "auto",
) -> tuple[dict[str, Tensor], dict[str, dict[str, list[float]]]]:
    """Draw every image from every tower's condition, and measure what the conditions are worth.

    Args:
        parts: From `find_parts`.
        images: uint8 [N, 3, S, S], S the largest size that a tower or the autoencoder sees.
        steps, guidance, start: See `stage1_dcr.sampling.generate`.
        seed: Of the noise: one for all pictures, and others for the losses.
        device: auto, cpu or cuda.

    Returns:
        The rows of the picture: label -> [N, 3, S, S] in [0, 1]; and losses per image: tower -> `none` (the bare empty
        prompt), `own` (the image's own condition) and `other` (the next image's; missing where there is one image).
    """
    import torch

    from dcr_mllm.evaluation.features import pick_device
    from stage1_dcr.denoiser import Denoiser
    from stage1_dcr.projector import Projector
    from stage1_dcr.sampling import decode, denoising_losses, generate, load_decoder, load_sampler
    from stage1_dcr.views import resize

    place = pick_device(device)
    denoiser = Denoiser.load(parts.denoiser, device=place, prediction_type=parts.prediction_type)
    sampler = load_sampler(parts.denoiser, denoiser.prediction_type)
    decoder = load_decoder(parts.denoiser, place)
    projector = Projector.load(parts.projector).eval().requires_grad_(False).to(place)

    pixels = images.to(place).float() / 255
    small = resize(pixels, parts.size)
    latents = denoiser.encode(small)
    generator = torch.Generator().manual_seed(seed)
    first_noise = torch.randn(denoiser.latent_shape(parts.size), generator=generator)
    noise = torch.randn(len(images), NUM_TIMES, *denoiser.latent_shape(parts.size), generator=generator)
    conditions = {name: conditions_of(path, projector, pixels, parts) for name, path in parts.towers.items()}
    nothing = torch.zeros_like(next(iter(conditions.values())))

    rows = {"original": small, "autoencoder": decode(decoder, latents)}
    for label, condition in {"no condition": nothing, **conditions}.items():
        logger.info("drawing: %s", label)
        drawn = generate(
            denoiser,
            sampler,
            condition,
            first_noise,
            steps=steps,
            guidance=1.0 if condition is nothing else guidance,
            latents=latents,
            start=start,
        )
        rows[label] = decode(decoder, drawn)

    losses: dict[str, dict[str, list[float]]] = {}
    for name, condition in conditions.items():
        candidates = {"none": nothing, "own": condition}
        if len(images) > 1:
            candidates["other"] = condition.roll(-1, dims=0)
        values = denoising_losses(denoiser, latents, torch.stack(list(candidates.values()), dim=1), noise)
        losses[name] = dict(zip(candidates, values.T.tolist(), strict=True))
    return rows, losses


def conditions_of(tower: Path, projector: Projector, pixels: Tensor, parts: Parts) -> Tensor:
    """Conditions [N, D] of pixels [N, 3, S, S] in [0, 1], made as in the training of the projector."""
    import torch

    from dcr_mllm.towers import image_statistics, load_full_model, vision_tower
    from stage1_dcr.condition import projector_input, read_tower
    from stage1_dcr.views import normalise, resize

    statistics = image_statistics(tower)
    if parts.normalisation == "openai":
        statistics = dataclasses.replace(statistics, mean=OPENAI_MEAN, std=OPENAI_STD)
    model = vision_tower(load_full_model(tower)).to(pixels.device)
    normalised = normalise(resize(pixels, statistics.size), statistics.mean, statistics.std)
    with torch.inference_mode():
        features = read_tower(model, normalised, patches=parts.condition != "class")
        return projector(projector_input(features, parts.condition))


def loss_table(losses: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The mean denoising loss of every tower under its own, another image's and no condition, as text."""
    width = max(len("tower"), *map(len, losses))
    lines = [f"{'tower':<{width}}  {'own':>8}  {'another':>8}  {'none':>8}  own below another"]
    for name, values in losses.items():
        own, none = values["own"], values["none"]
        other = values.get("other")
        better = "-" if other is None else f"{sum(a < b for a, b in zip(own, other, strict=True))} of {len(own)} images"
        cells = [f"{_mean(column):>8.4f}" if column is not None else f"{'-':>8}" for column in (own, other, none)]
        lines.append(f"{name:<{width}}  {'  '.join(cells)}  {better}")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _central_square(height: int, width: int) -> tuple[int, int, int, int]:
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def _recorded_config(tower: Path) -> dict[str, Any]:
    """The config of the run that made a tower, from its provenance; empty for any other tower."""
    record = tower / PROVENANCE_FILE
    config = read_json(record).get("config") if record.is_file() else None
    return config if isinstance(config, dict) else {}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dcr-mllm reconstruct", description="Draw images from a tower's condition, beside the originals."
    )
    parser.add_argument("towers", nargs="+", metavar="TOWER", help="directory, such as a run's tower/, or mini")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of images, tars or Parquet files")
    parser.add_argument("--projector", metavar="DIR", help="default: that of the first tower which a run made")
    parser.add_argument("--denoiser", metavar="DIR", help="default: the one that the projector was trained for")
    parser.add_argument("--out", type=Path, default=Path("reconstruction.png"), metavar="PNG", help="%(default)s")
    parser.add_argument("--limit", type=int, default=8, metavar="N", help="images (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="of the sampler (%(default)s)")
    parser.add_argument("--guidance", type=float, default=1.0, metavar="X", help="1: none (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (%(default)s)")
    parser.add_argument("--start", type=int, metavar="T", help="begin with the original, noised to this time")
    parser.add_argument(
        "--prediction-type", choices=("epsilon", "velocity"), help="where the denoiser's scheduler is known to be wrong"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="%(default)s")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be meant, and files that are there already."""
    if options.out.suffix.lower() != ".png":
        raise UserError(f"--out is {options.out}, expected the name of a .png file")
    for file in (options.out, options.out.with_suffix(".json")):
        if file.exists():
            raise UserError(f"{file} exists already and is not overwritten; move it away or choose another --out")
    if not options.out.parent.is_dir():
        raise UserError(f"--out is {options.out}, but the folder {options.out.parent} does not exist")
    for name in ("limit", "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}, expected at least 1")
    if options.guidance < 1:
        raise UserError(f"--guidance is {options.guidance:g}, expected 1 (none) or more")


def _check_times(denoiser: Path, steps: int, start: int | None) -> None:
    length = read_json(denoiser / "scheduler" / "scheduler_config.json").get("num_train_timesteps", 1000)
    if steps > length:
        raise UserError(f"--steps is {steps}, but the denoiser's schedule has {length} times")
    first = length // steps
    if start is not None and not first < start <= length:
        raise UserError(f"--start is {start}, expected a time above {first} (a step) and at most {length}")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = build_parser().parse_args(argv)
    return run_main(lambda: _main(options))


def _main(options: argparse.Namespace) -> None:
    _check(options)
    parts = find_parts(
        tower_names(options.towers),
        projector=options.projector,
        denoiser=options.denoiser,
        prediction_type=options.prediction_type,
    )
    _check_times(parts.denoiser, options.steps, options.start)

    from stage1_dcr.picture_grid import picture_grid, save_png

    size = max(parts.size, *(tower_summary(path).image_size for path in parts.towers.values()))
    images, keys, skipped = read_images(options.images, limit=options.limit, size=size)
    print(f"images: {len(keys)} of {options.images}, {len(skipped)} broken ones skipped")
    print(f"projector, for every tower: {parts.projector}" + (f" (of {parts.origin})" if parts.origin else ""))
    print(f"condition: {parts.condition}; denoiser: {parts.denoiser}, {parts.size} px", flush=True)
    rows, losses = reconstruct(
        parts,
        images,
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
        start=options.start,
        device=options.device,
    )
    report = {
        "options": {name: value for name, value in vars(options).items() if name not in ("out", "images")},
        "towers": {name: {"path": path, "sha256": hash_directory(path)} for name, path in parts.towers.items()},
        "projector": {"path": parts.projector, "of": parts.origin, "sha256": hash_directory(parts.projector)},
        "condition": parts.condition,
        "denoiser": {"path": parts.denoiser, "sha256": parts.denoiser_hash, "size": parts.size},
        "images": {"source": options.images, "keys": keys, "skipped": skipped},
        "loss": {
            "num_times": NUM_TIMES,
            "mean": {name: {key: _mean(v) for key, v in values.items()} for name, values in losses.items()},
            "per_image": losses,
        },
        "packages": package_versions(),
    }
    write_json_atomic(options.out.with_suffix(".json"), report)
    save_png(picture_grid(rows), options.out)
    print(f"\ndenoising loss (mean squared error over {NUM_TIMES} times) by condition:\n{loss_table(losses)}")
    print(f"\nwritten: {options.out}, {options.out.with_suffix('.json')}")


if __name__ == "__main__":
    raise SystemExit(main())
