"""Batched views of images, on the device, in pixel space [0, 1], before normalisation.

Augmenting comes before normalising: colour operations clamp to [0, 1], which would destroy normalised pixels. Every
sample has factors of its own, drawn on the CPU by `draw_view_params` and applied to the whole batch at once by
`augment`: no loop over samples and nothing that makes the host wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from stage1_dcr.view_config import ViewConfig

if TYPE_CHECKING:
    from dcr_mllm.towers import ImageStatistics

# The columns of a parameter vector. The crop box is relative to the image, so the vector holds at every resolution.
VIEW_PARAMS = (
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "center_x",
    "center_y",
    "width",
    "height",
    "horizontal_flip",
    "vertical_flip",
)
NUM_VIEW_PARAMS = len(VIEW_PARAMS)
_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
_NUM_UNIFORMS = 4 + 2 + 2 + 2 * _CROP_ATTEMPTS  # colour, flips, place and attempts at a crop


def draw_uniforms(generator: torch.Generator, n: int | None = None) -> Tensor:
    """The random numbers of one view, or of n: [U] or [n, U] in [0, 1), as many whatever the config."""
    shape = (_NUM_UNIFORMS,) if n is None else (n, _NUM_UNIFORMS)
    return torch.rand(shape, generator=generator)


def view_params(config: ViewConfig, uniforms: Tensor) -> Tensor:
    """What makes views, for a whole batch at once.

    Args:
        config: the ranges.
        uniforms: [n, U] from `draw_uniforms`.

    Returns:
        [n, P] float32, columns named by `VIEW_PARAMS`. A row depends on its own numbers alone.
    """
    color, flips, place, attempts = uniforms.split([4, 2, 2, 2 * _CROP_ATTEMPTS], dim=1)
    jitter = torch.tensor([config.brightness, config.contrast, config.saturation])
    factors = 1 + (2 * color[:, :3] - 1) * jitter
    factors = factors.clamp_min(0)
    hue = (2 * color[:, 3:] - 1) * config.hue
    size = _crop_size(config, attempts.unflatten(1, (_CROP_ATTEMPTS, 2)))
    center = size / 2 + place * (1 - size)
    probability = torch.tensor([config.horizontal_flip, config.vertical_flip])
    return torch.cat([factors, hue, center, size, (flips < probability).float()], dim=1)


def draw_view_params(config: ViewConfig, generator: torch.Generator, n: int | None = None) -> Tensor:
    """Draws what makes one view, [P], or n of them, [n, P], from a generator on the CPU and nothing else."""
    params = view_params(config, draw_uniforms(generator, 1 if n is None else n))
    return params[0] if n is None else params


def _crop_size(config: ViewConfig, attempts: Tensor) -> Tensor:
    """Width and height [n, 2] of the first attempt that fits into the image, as torchvision's RandomResizedCrop."""
    low, high = config.crop_scale
    # Written so that equal ends give that very number, without rounding.
    area = low + (high - low) * attempts[..., 0]
    low, high = (math.log(ratio) for ratio in config.crop_ratio)
    ratio = torch.exp(low + (high - low) * attempts[..., 1])
    sizes = torch.stack([torch.sqrt(area * ratio), torch.sqrt(area / ratio)], dim=-1)  # [n, attempts, 2]
    fits = (sizes <= 1).all(dim=-1)
    first = fits.float().argmax(dim=1)
    chosen = sizes[torch.arange(len(sizes)), first]
    # None fits: the largest centred box whose ratio is allowed.
    nearest = min(max(1.0, config.crop_ratio[0]), config.crop_ratio[1])
    whole = torch.tensor([min(1.0, nearest), min(1.0, 1 / nearest)])
    return torch.where(fits.any(dim=1, keepdim=True), chosen, whole)


def augment(images: Tensor, params: Tensor, interpolation: str = "bicubic") -> Tensor:
    """Makes one view of each image: brightness, contrast, saturation, hue, crop and resize, flips, in this order.

    The order is fixed, where torchvision's ColorJitter shuffles it: a batch would fall apart into one part per order.
    The crop needs no antialiasing: the box is never larger than the output, so nothing shrinks. Neutral parameters
    return the input bit for bit.

    Args:
        images: [B, 3, H, W] float in [0, 1]. Values outside are clamped by the first operation, as in torchvision.
        params: [B, P] from `draw_view_params`.
        interpolation: `bicubic` or `bilinear`, of the crop.

    Returns:
        [B, 3, H, W] float32 in [0, 1].
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be [B, 3, H, W] float in [0, 1], found {list(images.shape)} {images.dtype}")
    if params.shape != (len(images), NUM_VIEW_PARAMS):
        raise ValueError(f"view parameters must be [{len(images)}, {NUM_VIEW_PARAMS}], found {list(params.shape)}")
    params = params.to(device=images.device, dtype=torch.float32, non_blocking=True)
    brightness, contrast, saturation, hue = (params[:, i, None, None, None] for i in range(4))
    view = (images.float() * brightness).clamp(0, 1)
    view = _blend(view, _grey(view).mean(dim=(1, 2, 3), keepdim=True), contrast)
    view = _blend(view, _grey(view), saturation)
    view = torch.where(hue == 0, view, _shift_hue(view, hue))
    return _crop(view, params, interpolation)


def view_of(
    pixels: Tensor, normalised: Tensor, params: Tensor, config: ViewConfig, statistics: ImageStatistics
) -> Tensor:
    """The positive view as the tower takes it, normalised.

    Args:
        pixels: [B, 3, S, S] in [0, 1].
        normalised: the same, normalised by `statistics`.
        params: [B, P] from `draw_view_params`.
        config: says which of the two is augmented.
        statistics: of the tower's pixels.
    """
    if config.space == "normalised":
        return augment(normalised, params, config.interpolation)
    return normalise(augment(pixels, params, config.interpolation), statistics.mean, statistics.std)


def _grey(images: Tensor) -> Tensor:
    """Luma [B, 1, H, W] with the weights of torchvision and PIL."""
    red, green, blue = images.unbind(dim=1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (images * factor + other * (1 - factor)).clamp(0, 1)


def _shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by `shift` [B, 1, 1, 1] of the colour circle, through HSV and back."""
    low, high = torch.aminmax(images, dim=1)
    spread = high - low
    grey = spread == 0
    red, green, blue = (
        (high.unsqueeze(1) - images) / torch.where(grey, torch.ones_like(spread), spread).unsqueeze(1)
    ).unbind(1)
    is_red = images[:, 0] == high
    is_green = images[:, 1] == high
    hue6 = torch.where(is_red, blue - green, torch.where(is_green, 2 + red - blue, 4 + green - red))  # in sixths
    hue6 = torch.where(grey, torch.zeros_like(hue6), hue6) + 6 * shift[:, 0]
    # Back in closed form: channel = value - spread * clamp(min(k, 4 - k), 0, 1), k = (n + hue6) mod 6, n = 5, 3, 1.
    channels = []
    for start in (5.0, 3.0, 1.0):
        k = (start + hue6).remainder(6.0)
        channels.append(high - spread * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1).clamp(0, 1)


def _crop(images: Tensor, params: Tensor, interpolation: str) -> Tensor:
    """Cuts the box of each sample, flips it, and resizes it to the full image."""
    height, width = images.shape[-2:]
    center, size, flips = params[:, 4:6], params[:, 6:8], params[:, 8:10]
    extent = size * (1 - 2 * flips)  # a flip runs through the box backwards
    # The grid is made by hand: affine_grid is a matrix product, which autocast would compute in 16 bits, pixels off.
    across = (torch.arange(width, device=images.device, dtype=torch.float32) + 0.5) / width - 0.5
    down = (torch.arange(height, device=images.device, dtype=torch.float32) + 0.5) / height - 0.5
    x = 2 * (center[:, 0, None] + extent[:, 0, None] * across) - 1  # [B, W]
    y = 2 * (center[:, 1, None] + extent[:, 1, None] * down) - 1  # [B, H]
    shape = (len(images), height, width)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=-1)
    view = functional.grid_sample(images, grid, mode=interpolation, padding_mode="border", align_corners=False)
    # Sampling at the pixel centres is the identity only up to rounding.
    untouched = ((size == 1) & (flips == 0)).all(dim=1)[:, None, None, None]
    return torch.where(untouched, images, view.clamp(0, 1))


def resize(images: Tensor, size: int) -> Tensor:
    """Resizes [B, 3, H, W] in [0, 1] to [B, 3, size, size], bicubic with antialiasing; returns the input if it fits."""
    if tuple(images.shape[-2:]) == (size, size):
        return images
    resized = functional.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 1)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtracts `mean` and divides by `std`, per channel of [B, 3, H, W].

    Both are plain numbers: they reach the device as kernel arguments, not as a copy that has to be waited for.
    """
    if len(mean) != images.shape[1] or len(std) != images.shape[1]:
        raise ValueError(f"mean {list(mean)} and std {list(std)} must have one number per channel ({images.shape[1]})")
    channels = [(images[:, i] - float(mean[i])) / float(std[i]) for i in range(images.shape[1])]
    return torch.stack(channels, dim=1)
