"""How far views may differ from their image: a config that needs no torch, so that checks are fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True, frozen=True)
class ViewConfig:
    """How far a positive view may differ from its image.

    Attributes:
        brightness: factor drawn from [1 - brightness, 1 + brightness], likewise contrast and saturation.
        contrast: see brightness.
        saturation: see brightness.
        hue: shift drawn from [-hue, hue], as a part of the colour circle, at most 0.5.
        crop_scale: area of the crop relative to the image.
        crop_ratio: width : height of the crop.
        horizontal_flip: probability. 0 by default: pulling a picture and its mirror image together erases orientation,
            which is one of the things a better tower should see.
        vertical_flip: probability, 0 by default for the same reason.
        space: what is augmented: `pixels` in [0, 1], which are normalised afterwards, or `normalised` ones as in the
            published code, where colour operations clamp to [0, 1] and so lose what is darker than the mean.
        interpolation: of the crop.
    """

    brightness: float = 0.1
    contrast: float = 0.1
    saturation: float = 0.1
    hue: float = 0.05
    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (0.9, 1.1)
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    space: Literal["pixels", "normalised"] = "pixels"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            _check(name, getattr(self, name), 0.0, math.inf)
        _check("hue", self.hue, 0.0, 0.5)
        _check("horizontal_flip", self.horizontal_flip, 0.0, 1.0)
        _check("vertical_flip", self.vertical_flip, 0.0, 1.0)
        check_range("crop_scale", self.crop_scale, 1.0)
        check_range("crop_ratio", self.crop_ratio, math.inf)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must lie between {low:g} and {high:g}")


def check_range(name: str, value: Sequence[float], high: float) -> None:
    """Refuses anything but two ordered positive numbers up to `high`."""
    if len(value) != 2 or not 0 < value[0] <= value[1] <= high:
        raise ValueError(f"{name} is {list(value)}; it must be two numbers, 0 < low <= high <= {high:g}")
