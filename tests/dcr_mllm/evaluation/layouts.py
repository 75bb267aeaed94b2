"""A labelled set written again in the other layouts that benchmarks come in."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dcr_mllm.evaluation.labelled import LabelledSet, Split
from dcr_mllm.evaluation.labelled_sources import CLASS_NAMES, TEMPLATES


def write_names(directory: Path, labelled: LabelledSet) -> None:
    """The two files of CLIP_benchmark, for prompts `a photo of a {} wall.` and `a {} wall.`."""
    (directory / CLASS_NAMES).write_text("\n".join(sorted(labelled.prompts)) + "\n")
    (directory / TEMPLATES).write_text("a photo of a {c} wall.\na {c} wall.\n")


def parts(labelled: LabelledSet) -> Iterable[tuple[str, Split, np.ndarray]]:
    """Per split its name and class indices in the order of the names."""
    names = sorted(labelled.prompts)
    for name, split in (("train", labelled.train), ("test", labelled.test)):
        yield name, split, np.array([names.index(value) for value in split.classes])


def write_folders(directory: Path, labelled: LabelledSet, test: str = "val") -> Path:
    """ImageFolder."""
    for name, split, _ in parts(labelled):
        for number, (file, value) in enumerate(zip(split.files, split.classes, strict=True)):
            target = directory / (name if name == "train" else test) / value / f"{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return directory


def write_tar(path: Path, samples: Iterable[dict[str, bytes]]) -> None:
    """A WebDataset tar: per sample its files by ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, sample in enumerate(samples):
            for ending, content in sample.items():
                entry = tarfile.TarInfo(f"s{number:07d}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def write_tars(directory: Path, labelled: LabelledSet) -> Path:
    """Two tars per split, as CLIP_benchmark has them."""
    for name, split, labels in parts(labelled):
        samples = [
            {"cls": str(label).encode(), "png": file.read_bytes()}
            for file, label in zip(split.files, labels, strict=True)
        ]
        half = len(samples) // 2
        write_tar(directory / name / "0.tar", samples[:half])
        write_tar(directory / name / "1.tar", samples[half:])
    return directory


def write_datasets(directory: Path, labelled: LabelledSet, *, parquet: bool) -> Path:
    """A directory of `save_to_disk`, or of a hub repository."""
    import datasets

    stored = datasets.DatasetDict()
    for name, split, labels in parts(labelled):
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=sorted(labelled.prompts))}
        )
        pictures = [{"bytes": file.read_bytes(), "path": None} for file in split.files]
        stored[name] = datasets.Dataset.from_dict({"image": pictures, "label": labels.tolist()}, features=features)
    if not parquet:
        stored.save_to_disk(str(directory))
        return directory
    for name, table in stored.items():
        (directory / "data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(str(directory / "data" / f"{name}-00000-of-00001.parquet"))
    return directory
