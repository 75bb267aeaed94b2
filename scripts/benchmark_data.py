#!/usr/bin/env python
"""Speed of stage 1's image loading against a plain `webdataset` pipeline. Prints one JSON object to stdout.

    python scripts/benchmark_data.py [--images 5000] [--workers 1] [--size 224]

Both sides read the same JPEG shards, drawn once into a temporary folder: 512 x 512 pixels whose spectrum and file size
are like those of photographs. Both decode, crop and resize; both shuffle 2,000 images.

* **plain** is `webdataset` with torchvision's transforms, which makes the augmented view of each image in the workers.
* **ours** is what training uses: `make_loader`. Views are made of whole batches where the training runs, so its
  workers only draw their parameters, and the noise and time of each sample.

The sides take turns, each with worker processes of its own, and are timed from the first batches on to the last; the
medians count. ``ratio`` is ours over plain in images per second and worker. ``cpu_ratio`` compares the processor time
of all processes per image, start included: it counts that our images are read outside of the workers, and it
says more where the machine has other work. ``with_views`` is ours with the views made by the main process on its CPU,
which is not what a GPU run does: there it is a small part of a step.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from scripts.measuring import machine  # noqa: E402

SIDE, BATCH, SHUFFLED = 512, 16, 2000
CROP_SCALE, CROP_RATIO = (0.9, 1.0), (3 / 4, 4 / 3)
LIMITS = {"ratio": 1.0}
AIM = 1.5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000, help="in the shards (default 5000)")
    parser.add_argument("--measured", type=int, default=1600, help="images of each measurement (default 1600)")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of each side (default 1)")
    parser.add_argument("--size", type=int, default=224, help="side of the training images (default 224)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side (default 3)")
    options = parser.parse_args(argv)
    if options.workers < 1 or options.rounds < 1 or options.size < 1:
        parser.error("--workers, --rounds and --size must be at least 1")
    least = 4 * BATCH * (options.workers + 1)
    if not least <= options.measured <= options.images:
        parser.error(f"--measured must be at least {least} with {options.workers} workers, and at most --images")
    try:
        import webdataset  # noqa: F401
    except ImportError:
        parser.error("the plain side needs webdataset: pip install webdataset")
    print(json.dumps(compare(options), indent=2))
    return 0


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measures the sides in turn and puts the ratios together."""
    import torch
    import torchvision
    import webdataset

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tell("drawing images")
        num_bytes = write_shards(Path(folder), options.images, min(500, options.images // (2 * options.workers)))
        sides: dict[str, list[dict[str, float]]] = {"plain": [], "ours": [], "with_views": []}
        for number in range(options.rounds):
            for side, found in sides.items():
                found.append(measure(side, folder, options))
                tell(f"round {number + 1}, {side}: {found[-1]['images_per_second_and_worker']:.0f} images/s per worker")
    medians = {
        side: {name: statistics.median(row[name] for row in found) for name in found[0]}
        for side, found in sides.items()
    }
    plain, ours, with_views = medians.values()
    speed, cpu = "images_per_second_and_worker", "cpu_milliseconds_per_image"
    ratio = ours[speed] / plain[speed]
    return {
        "ratio": ratio,
        "cpu_ratio": plain[cpu] / ours[cpu],
        "with_views_ratio": with_views[speed] / plain[speed],
        "limits": LIMITS,
        "within_limits": {"ratio": ratio >= LIMITS["ratio"]},
        "aim": AIM,
        "medians": medians,
        "all": sides,
        "images": options.images,
        "measured": options.measured,
        "workers": options.workers,
        "image": {"side": SIDE, "mean_bytes": round(num_bytes / options.images), "size_in_training": options.size},
        "machine": {
            **machine(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "webdataset": webdataset.__version__,
        },
        "total_seconds": time.perf_counter() - start,
    }


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(side: str, folder: str, options: argparse.Namespace) -> dict[str, float]:
    """Speed in the steady state, and processor time of this process and its workers from start to end."""
    used = cpu_seconds()
    batches = iter(LOADERS[side](folder, options))
    begun = 2 * options.workers + 2  # by then nothing is left of what was prepared before the clock starts
    for _ in range(begun):
        next(batches)
    start = time.perf_counter()
    num_images = sum(len(batch[0]) for batch in batches)
    seconds = time.perf_counter() - start
    del batches  # ends the workers, or their time would not be known
    return {
        "images_per_second_and_worker": num_images / seconds / options.workers,
        "cpu_milliseconds_per_image": (cpu_seconds() - used) * 1000 / (num_images + begun * BATCH),
    }


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def ours(folder: str, options: argparse.Namespace) -> Iterable[tuple[Any, ...]]:
    """Images and view parameters."""
    from stage1_dcr.images import make_loader

    loader = make_loader(
        f"{folder}/*.tar",
        batch_size=BATCH,
        size=options.size,
        latent_shape=(4, options.size // 8, options.size // 8),
        seed=0,
        num_workers=options.workers,
        shuffle_buffer=SHUFFLED,
        crop_scale=CROP_SCALE,
        crop_ratio=CROP_RATIO,
    )
    for batch in itertools.islice(loader, options.measured // BATCH):
        yield batch["images"], batch["view_params"]


def with_views(folder: str, options: argparse.Namespace) -> Iterable[tuple[Any, ...]]:
    """Images and views."""
    from stage1_dcr.views import augment

    for images, view_params in ours(folder, options):
        pixels = images.float() / 255
        yield pixels, augment(pixels, view_params)


def plain(folder: str, options: argparse.Namespace) -> Iterable[tuple[Any, ...]]:
    """Images and views."""
    import webdataset

    urls = sorted(map(str, Path(folder).glob("*.tar")))
    data = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0)
        .shuffle(SHUFFLED)
        .decode("pilrgb")
        .to_tuple("jpg")
        .map(PlainTransform(options.size))
        .batched(BATCH, partial=False)
    )
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=options.workers)
    return itertools.islice(loader, options.measured // BATCH)


class PlainTransform:
    """What torchvision offers for the same images and views, bytes as on our side; as tensors, which is its fastest."""

    def __init__(self, size: int) -> None:
        from torchvision.transforms import InterpolationMode, v2

        from stage1_dcr.view_config import ViewConfig

        views = ViewConfig()
        how: dict[str, Any] = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
        self.to_tensor = v2.PILToTensor()
        self.crop = v2.RandomResizedCrop(size, scale=CROP_SCALE, ratio=CROP_RATIO, **how)
        self.view = v2.Compose(
            [
                v2.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue),
                v2.RandomResizedCrop(size, scale=views.crop_scale, ratio=views.crop_ratio, **how),
            ]
        )

    def __call__(self, sample: tuple[Any]) -> tuple[Any, Any]:
        image = self.crop(self.to_tensor(sample[0]))
        return image, self.view(image)


LOADERS = {"plain": plain, "ours": ours, "with_views": with_views}


def write_shards(folder: Path, count: int, per_shard: int) -> int:
    """Draws JPEGs into tars with captions and metadata as img2dataset writes them; returns the bytes of all JPEGs."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    canvases = [draw_canvas(rng) for _ in range(4)]
    total = 0
    for first in range(0, count, per_shard):
        with tarfile.open(folder / f"{first // per_shard:05d}.tar", "w") as tar:
            for index in range(first, min(first + per_shard, count)):
                canvas = canvases[rng.integers(len(canvases))]
                top, left = rng.integers(0, len(canvas) - SIDE, 2)
                window = canvas[top : top + SIDE, left : left + SIDE]
                # Turned and mirrored, so that hardly two images are alike.
                window = np.rot90(window, rng.integers(4))[:, :: rng.choice([-1, 1])]
                file = io.BytesIO()
                Image.fromarray(np.ascontiguousarray(window)).save(file, "JPEG", quality=90)
                total += file.tell()
                members = {"jpg": file.getvalue(), "txt": b"a drawing of leaves", "json": b'{"status": "success"}'}
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"{index:09d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return total


def draw_canvas(rng: Any, side: int = 1536, num_leaves: int = 1500) -> Any:
    """Overlapping discs of all sizes with shading and fine texture ("dead leaves"): uint8 [side, side, 3].

    Their statistics, a spectrum that falls with frequency, occlusion edges and flat regions, are those of photographs.
    """
    import numpy as np

    canvas = np.full((side, side, 3), 128, dtype=np.float32)
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    for _ in range(num_leaves):
        radius = 8 / np.sqrt(1e-3 + rng.random())  # the density of sizes falls with their third power
        y, x = rng.random(2) * side
        box = tuple(slice(int(max(c - radius, 0)), int(c + radius) + 1) for c in (y, x))
        inside = (rows[box] - y) ** 2 + (columns[box] - x) ** 2 < radius**2
        shade = rng.normal(0, 30, 2) @ np.stack([rows[box] - y, columns[box] - x]).reshape(2, -1) / radius
        colour = rng.integers(20, 235) + rng.normal(0, 20, 3)
        leaf = colour + shade.reshape(inside.shape)[..., None]
        canvas[box] = np.where(inside[..., None], leaf, canvas[box])
    texture = rng.standard_normal((side, side))
    frequencies = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequencies[0, 0] = np.inf
    texture = np.fft.irfft2(np.fft.rfft2(texture) / frequencies, s=(side, side))
    return (canvas + (12 * texture / texture.std())[..., None]).clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    sys.exit(main())
