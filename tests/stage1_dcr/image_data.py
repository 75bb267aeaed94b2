"""Small image data of all kinds, and what the tests of the stream do with them."""

from __future__ import annotations

import io
import itertools
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stage1_dcr.images import ImageLoader, make_loader
from stage1_dcr.position import Cursor

LATENT = (4, 3, 3)


def encode(number: int, mode: str = "RGB", fmt: str = "PNG") -> bytes:
    """An image of an odd size whose first pixel holds its number."""
    pixels = np.full((9 + number % 3, 12, 3), number % 251, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, fmt)
    return file.getvalue()


def write_tar(path: Path, first: int, count: int, broken: tuple[int, ...] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            image = b"this is no image" if number in broken else encode(number)
            for extension, content in (("json", b"{}"), ("png", image), ("txt", b"a photo")):
                member = tarfile.TarInfo(f"{number:06d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_tars(folder: Path, counts: list[int]) -> str:
    first = 0
    for shard, count in enumerate(counts):
        write_tar(folder / f"{shard:05d}.tar", first, count)
        first += count
    return f"{folder}/*.tar"


def loader_of(data, **changes) -> ImageLoader:
    arguments = {"batch_size": 3, "size": 8, "latent_shape": LATENT, "seed": 1, "shuffle_buffer": 7}
    return make_loader(data, **{**arguments, **changes})


def take(loader: ImageLoader, count: int) -> list[dict]:
    batches = []
    for batch in itertools.islice(loader, count):
        loader.position.update(batch)
        batches.append(batch)
    return batches


def keys_of(batches: list[dict]) -> list[str]:
    return [key for batch in batches for key in batch["keys"]]


def epoch_samples(data, *, world_size: int = 1, epoch: int = 0, rank: int | None = None, **changes) -> dict[str, dict]:
    """The samples of one epoch by key, over all ranks or of one, one by one through the loader's own parts."""
    samples: dict[str, dict] = {}
    for number in range(world_size) if rank is None else [rank]:
        loader = loader_of(data, rank=number, world_size=world_size, **changes)
        entries = itertools.takewhile(lambda entry: entry.cursor[0] <= epoch, loader.order.entries(Cursor()))
        chunks = (loader.dataset.__getitems__([entry]) for entry in entries)
        for chunk in loader.accounted(chunks, Cursor()):
            [key], [cursor] = chunk["keys"], chunk["cursors"]
            if cursor[0] == epoch:
                assert key not in samples
                samples[key] = chunk
    return samples


def epoch_keys(data, **changes) -> list[str]:
    return list(epoch_samples(data, **changes))


def assert_same(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one["keys"] == other["keys"] and one["cursor"] == other["cursor"]
        for name in ("images", "view_params", "timestep_uniform", "noise"):
            assert torch.equal(one[name], other[name]), name


def write_folder(folder: Path, count: int) -> Path:
    for number in range(count):
        file = folder / f"class{number % 3}" / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(number))
    (folder / "notes.txt").write_text("not an image")
    return folder


def write_parquet(path: Path, count: int, raw: bool = False, row_group_size: int = 4) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    images = [encode(i) if raw else {"bytes": encode(i), "path": None} for i in range(count)]
    table = pyarrow.table({"caption": ["a photo"] * count, "image": images})
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def write_saved(path: Path, count: int) -> Path:
    import datasets

    features = datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()})
    rows = {"label": list(range(count)), "picture": [{"bytes": encode(i), "path": None} for i in range(count)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(path))
    return path
