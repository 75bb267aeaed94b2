"""Pillow refuses cut images; lmms-eval, when it is imported, switches that off for the whole process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def kept_strict() -> Iterator[None]:
    """Leave Pillow's handling of cut images as it was: half an image is an error, not a picture with a grey part."""
    from PIL import ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Half an image is an error here, whatever a library has switched before."""
    from PIL import ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
