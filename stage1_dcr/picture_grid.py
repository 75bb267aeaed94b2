"""Rows of equally large pictures with a label each, as one PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_MIN_CELL = 96  # pixels; smaller pictures are magnified by a whole number
_GAP = 4
_FONT_SIZE = 14


def picture_grid(rows: Mapping[str, Tensor]) -> Image.Image:
    """A grid with one labelled row for each entry.

    Args:
        rows: Label -> images [N, 3, S, S] in [0, 1]; N and S are the same everywhere.
    """
    first = next(iter(rows.values()))
    scale = max(1, -(-_MIN_CELL // first.shape[-1]))
    cell = scale * first.shape[-1]
    font = ImageFont.load_default(_FONT_SIZE)
    margin = int(max(font.getlength(label) for label in rows)) + 3 * _GAP
    step = cell + _GAP
    grid = Image.new("RGB", (margin + len(first) * step, len(rows) * step + _GAP), "white")
    draw = ImageDraw.Draw(grid)
    for row, (label, images) in enumerate(rows.items()):
        top = _GAP + row * step
        draw.text((margin - 2 * _GAP, top + cell // 2), label, fill="black", font=font, anchor="rm")
        pixels = (images.float().cpu() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for column, picture in enumerate(pixels):
            image = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
            grid.paste(image, (margin + column * step, top))
    return grid


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, format="PNG", optimize=True)
    os.replace(partial, path)
