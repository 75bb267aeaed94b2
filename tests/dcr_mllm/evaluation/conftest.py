"""Image sets in the public layouts, drawn in a moment."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcr_mllm.evaluation.mmvp_vlm import PATTERNS

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 220), "white": (240, 240, 240)}


def _noisy(colour: tuple[int, int, int], size: int, rng: np.random.Generator) -> Image.Image:
    pixels = np.array(colour) + rng.normal(0, 40, (size, size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def write_pairs() -> Callable[..., Path]:
    """`write_pairs(directory, pairs_per_pattern, types)` writes an MMVP-VLM directory of coloured noise."""

    def write(directory: Path, pairs_per_pattern: int = 4, types: tuple[str, ...] = PATTERNS, seed: int = 0) -> Path:
        rng = np.random.default_rng(seed)
        directory.mkdir(parents=True, exist_ok=True)
        question = 0
        with (directory / "Questions.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["Question ID", "Type", "Statement"])
            for name in types:
                folder = directory / "MLLM_VLM Images" / name
                folder.mkdir(parents=True, exist_ok=True)
                for _ in range(pairs_per_pattern):
                    for colour in rng.permutation(list(COLOURS))[:2]:
                        question += 1
                        _noisy(COLOURS[str(colour)], 40, rng).save(folder / f"{question}.jpg")
                        writer.writerow([question, name, f"a {colour} wall"])
        return directory

    return write


@pytest.fixture(scope="session")
def write_labelled() -> Callable[..., Path]:
    """`write_labelled(directory, num_train, num_test)` writes a labelled set: class = colour, attribute = bright."""

    def write(directory: Path, num_train: int = 60, num_test: int = 48, size: int = 36, seed: int = 0) -> Path:
        rng = np.random.default_rng(seed)
        (directory / "images").mkdir(parents=True, exist_ok=True)
        with (directory / "labels.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "split", "class", "bright", "sometimes"])
            for index in range(num_train + num_test):
                name = list(COLOURS)[index % len(COLOURS)]
                bright = int(rng.integers(2))
                colour = tuple(int(value * (1 if bright else 0.4)) for value in COLOURS[name])
                _noisy(colour, size, rng).save(directory / "images" / f"{index}.png")  # type: ignore[arg-type]
                split = "train" if index < num_train else "test"
                # The last attribute does not apply to every third image.
                writer.writerow([f"images/{index}.png", split, name, bright, "" if index % 3 == 0 else index % 2])
        classes = {"templates": ["a photo of a {} wall.", "a {} wall."], "classes": {name: name for name in COLOURS}}
        (directory / "classes.json").write_text(json.dumps(classes))
        return directory

    return write
