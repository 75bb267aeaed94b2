"""From encoded images to training samples, in worker processes.

What a sample is (its crop, view, timestep and noise) depends on (seed, epoch, key) alone.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from stage1_dcr.order import Entry, number
from stage1_dcr.position import Cursor
from stage1_dcr.view_config import ViewConfig
from stage1_dcr.views import draw_uniforms, view_params

_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
_JPEG_SCALES = (8, 4, 2)  # by which a JPEG decoder leaves out the finest frequencies, and the work for them
_EXIF_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)

Box = tuple[int, int, int, int]  # top, left, height, width


def generator(*parts: object) -> torch.Generator:
    """A generator on the CPU, seeded by anything with a stable text."""
    return torch.Generator().manual_seed(number(*parts))


def draw_crop(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], generator: torch.Generator
) -> Box:
    """Draws (top, left, height, width) as torchvision's RandomResizedCrop does, but from a given generator."""
    draws = torch.rand(_CROP_ATTEMPTS, 4, generator=generator, dtype=torch.float64).tolist()
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, ratio_draw, top_draw, left_draw in draws:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(low + (high - low) * ratio_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = max(1, min(width, round(height * aspect))), max(1, min(height, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def decode_crop(data: bytes, size: int, draw_box: Callable[[int, int], Box]) -> Tensor:
    """Decodes an image of any mode, upright if it says how, cuts a box out of it and resizes that, bicubic.

    A JPEG whose box is at least twice as large as the result is decoded at a half, a quarter or an eighth of its
    resolution, so that the box still has `size` pixels or more; its edges are rounded to that grid.

    Args:
        data: the file's content.
        size: side of the result.
        draw_box: from (height, width) of the upright image in full resolution to the box.

    Returns:
        uint8 RGB [3, size, size].
    """
    with Image.open(io.BytesIO(data)) as image:
        scale, box = 1, None
        if image.format == "JPEG":
            width, height = image.size
            on_its_side = False
            with contextlib.suppress(Exception):  # damaged EXIF data do not make the pixels bad
                on_its_side = image.getexif().get(_EXIF_ORIENTATION) in _ON_ITS_SIDE
            box = draw_box(width, height) if on_its_side else draw_box(height, width)
            scale = next((s for s in _JPEG_SCALES if min(box[2:]) >= s * size), 1)
            if scale > 1:
                image.draft(None, (width // scale, height // scale))
        image.load()
        upright: Image.Image = image
        with contextlib.suppress(Exception):
            upright = ImageOps.exif_transpose(image)
        pixels = functional.pil_to_tensor(upright.convert("RGB"))
    height, width = pixels.shape[1:]
    top, left, h, w = box or draw_box(height, width)
    h, w = round(h / scale), round(w / scale)
    top, left = min(round(top / scale), height - h), min(round(left / scale), width - w)
    return functional.resized_crop(pixels, top, left, h, w, [size] * 2, InterpolationMode.BICUBIC, antialias=True)


class Decoder(Dataset):
    """Makes samples of entries; as the dataset of a DataLoader whose batch sampler yields lists of entries."""

    def __init__(
        self,
        *,
        size: int,
        latent_shape: Sequence[int],
        seed: int,
        views: ViewConfig,
        crop_scale: tuple[float, float],
        crop_ratio: tuple[float, float],
    ) -> None:
        self.size = size
        self.latent_shape = tuple(latent_shape)
        self.seed = seed
        self.views = views
        self.crop_scale = crop_scale
        self.crop_ratio = crop_ratio

    def __getitems__(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """A chunk: tensors of those that could be decoded, and (key, cursor, problem) of all, in order."""
        outcomes, samples = [], []
        for encoded, cursor in entries:
            sample, problem = None, encoded.problem
            if encoded.data is not None:
                sample, problem = self._sample(encoded.data, Cursor.from_list(cursor).epoch, encoded.key)
            if sample is not None:
                samples.append(sample)
            outcomes.append((encoded.key, cursor, problem))
        if not samples:
            return {"outcomes": outcomes}
        images, uniforms, timesteps, noise = (torch.stack(values) for values in zip(*samples, strict=True))
        return {
            "images": images,
            "view_params": view_params(self.views, uniforms),
            "timestep_uniform": timesteps,
            "noise": noise,
            "outcomes": outcomes,
        }

    def _sample(self, data: bytes, epoch: int, key: str) -> tuple[tuple[Tensor, ...] | None, str]:
        """Decodes, crops, and draws all that is random about a sample; None and the reason if it is broken."""
        # A generator for each purpose: another crop or view setting leaves the noise as it is.
        draw = (self.seed, epoch, key)

        def draw_box(height: int, width: int) -> Box:
            return draw_crop(height, width, self.crop_scale, self.crop_ratio, generator(*draw, "crop"))

        try:
            image = decode_crop(data, self.size, draw_box)
        except UnidentifiedImageError:  # its text is the address of a buffer
            return None, "not an image of a known kind"
        except Exception as error:  # fed with broken bytes, a decoder raises nearly anything
            return None, f"{type(error).__name__}: {error}"
        noise_generator = generator(*draw, "noise")
        timestep = torch.rand((), generator=noise_generator)
        noise = torch.randn(self.latent_shape, generator=noise_generator)
        return (image, draw_uniforms(generator(*draw, "view")), timestep, noise), ""
