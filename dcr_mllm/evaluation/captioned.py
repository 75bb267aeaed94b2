"""Images with captions, for retrieval: `captions.json` beside image files, or WebDataset tars of `jpg` and `txt`.

`captions.json` holds `[{"image": "file", "captions": ["...", ...]}, ...]`, files relative to the directory. In tars the
`txt` of a sample holds a caption per line, as CLIP_benchmark publishes them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.tar_images import tar_samples, tars_in

if TYPE_CHECKING:
    from dcr_mllm.evaluation.features import Picture

CAPTIONS = "captions.json"
_FOLDERS = ("test", "val", "validation", ".")


@dataclass(frozen=True, kw_only=True)
class CaptionedSet:
    """N images and, for each of them, one or several captions."""

    pictures: Sequence[Picture]
    captions: list[list[str]]


def read_captioned_set(directory: str | Path) -> CaptionedSet:
    """Read images with captions.

    Raises:
        UserError: Neither layout, a damaged file, an image that is missing (the first three named), or one without
            caption.
    """
    directory = Path(directory).resolve()
    folder = next((directory / name for name in _FOLDERS if tars_in(directory / name)), None)
    if (directory / CAPTIONS).is_file():
        found: list[tuple[Any, list[str]]] = _rows(directory / CAPTIONS)
    elif folder is not None:
        found = [(picture, text.splitlines()) for picture, text in tar_samples(folder, "txt")]
    else:
        raise UserError(f"{directory} holds neither {CAPTIONS} nor tars of images with .txt files, in it or in test/")
    captions = [[line.strip() for line in lines if line.strip()] for _, lines in found]
    bare = [str(picture) for (picture, _), lines in zip(found, captions, strict=True) if not lines]
    if bare:
        raise UserError(f"{directory}: {len(bare)} images have no caption, the first: {', '.join(bare[:3])}")
    if len(found) < 2:
        raise UserError(f"{directory} has {len(found)} images with captions, but there have to be at least 2")
    return CaptionedSet(pictures=[picture for picture, _ in found], captions=captions)


def _rows(path: Path) -> list[tuple[Path, list[str]]]:
    rows = []
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            captions = entry["captions"]
            if not isinstance(captions, list) or not all(isinstance(line, str) for line in captions):
                raise TypeError(f"captions are {captions!r}")
            rows.append((path.parent / entry["image"], captions))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} is no list of {{"image": "file", "captions": ["..."]}} ({error!r})') from None
    missing = [str(image) for image, _ in rows if not image.is_file()]
    if missing:
        raise UserError(f"{path}: {len(missing)} images are missing, the first: {', '.join(missing[:3])}")
    return rows
