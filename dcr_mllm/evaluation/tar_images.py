"""WebDataset tars as image sets: which samples they hold, and pictures that are read from them when they are needed."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dcr_mllm.errors import UserError

_IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class TarPicture:
    """An encoded image inside an uncompressed tar."""

    tar: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"

    def read_bytes(self) -> bytes:
        """Its bytes."""
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def tars_in(folder: Path) -> list[Path]:
    """The tars of a folder in the order of their numbers, `0.tar` to `10.tar`."""
    return sorted(folder.glob("*.tar"), key=lambda path: (len(path.name), path.name))


def tar_samples(folder: Path, label: str) -> Iterator[tuple[TarPicture, str]]:
    """Images and their labels over all tars of a folder.

    Args:
        folder: Holds `*.tar`, in which files of one name before the first dot are a sample.
        label: Ending of the file beside each image, such as `cls` or `txt`.

    Yields:
        Image and the text of its label, in the order of the tars.

    Raises:
        UserError: A tar cannot be read, or a sample lacks its image or label.
    """
    for tar in tars_in(folder):
        pictures: dict[str, TarPicture] = {}
        labels: dict[str, str] = {}
        try:
            # Not a stream, and not compressed: offsets are those in the file.
            with tarfile.open(tar, "r:") as archive:
                for member in archive:
                    head, _, base = member.name.rpartition("/")
                    stem, _, ending = base.partition(".")
                    key = f"{head}/{stem}"
                    if not member.isfile():
                        continue
                    if ending.lower() in _IMAGE_TYPES:
                        pictures[key] = TarPicture(tar, member.name, member.offset_data, member.size)
                    elif ending == label:
                        content = archive.extractfile(member)
                        assert content is not None  # it is a regular file
                        labels[key] = content.read().decode("utf-8").strip()
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise UserError(f"{tar} cannot be read as an uncompressed tar: {error}; download it again") from None
        odd = sorted(set(pictures) ^ set(labels))
        if odd:
            raise UserError(
                f"{tar}: {len(odd)} samples lack their image or their .{label}, the first: {', '.join(odd[:3])}"
            )
        for key, picture in pictures.items():
            yield picture, labels[key]
