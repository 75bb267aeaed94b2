"""MMVP-VLM in its public layout, scored by the rule of its authors.

Two consecutive rows of `Questions.csv` form a pair of two images and two statements. Each statement picks the image
with the higher logit, and the pair counts only if both pick their own.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcr_mllm.errors import UserError
from dcr_mllm.log import get_logger

logger = get_logger(__name__)

PATTERNS = (
    "Orientation and Direction",
    "Presence of Specific Features",
    "State and Condition",
    "Quantity and Count",
    "Positional and Relational Context",
    "Color and Appearance",
    "Structural Characteristics",
    "Texts",
    "Viewpoint and Perspective",
)
IMAGE_FOLDER = "MLLM_VLM Images"
PROMPT = "a photo of {}"

# Folder names of the public data and spellings in use, as `_normalise` leaves them; the full names are added below.
_ALIASES = {
    "orientation": 0,
    "direction": 0,
    "presence": 1,
    "state": 2,
    "condition": 2,
    "quantity": 3,
    "count": 3,
    "spatial": 4,
    "position": 4,
    "positional": 4,
    "relational": 4,
    "positional and relational": 4,
    "color": 5,
    "colour": 5,
    "colour and appearance": 5,
    "structural": 6,
    "structure": 6,
    "structural character": 6,
    "structural characteristic": 6,
    "text": 7,
    "camera perspective": 8,
    "camera": 8,
    "viewpoint": 8,
    "perspective": 8,
}


def _normalise(name: str) -> str:
    """Lower-case words; a leading number as in "3_quantity" and the "&" of some copies are dropped."""
    words = re.sub(r"[^a-z]+", " ", name.lower().replace("&", " and "))
    return " ".join(words.split())


_TABLE = {_normalise(name): index for index, name in enumerate(PATTERNS)} | _ALIASES


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two images that CLIP takes for the same, and what tells them apart.

    Attributes:
        pattern: One of `PATTERNS`.
        images: The image files, in row order.
        statements: The statements, without the prompt, in row order.
    """

    pattern: str
    images: tuple[Path, Path]
    statements: tuple[str, str]

    @property
    def texts(self) -> tuple[str, str]:
        """The statements as the text tower reads them."""
        first, second = self.statements
        return PROMPT.format(first), PROMPT.format(second)


def pattern_of(type_name: str) -> str | None:
    """The pattern that a `Type` means, None if it is not one of the known names."""
    index = _TABLE.get(_normalise(type_name))
    return None if index is None else PATTERNS[index]


def _read_rows(path: Path) -> list[tuple[str, str, str]]:
    """Rows (id, type, statement) of `Questions.csv`, whatever the case and spacing of its header."""
    if not path.is_file():
        raise UserError(f"{path} is missing: an MMVP-VLM directory holds Questions.csv and '{IMAGE_FOLDER}/'.")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = [re.sub(r"[\s_]+", "", cell).lower() for cell in next(reader, [])]
        wanted = ("questionid", "type", "statement")
        missing = [name for name in wanted if name not in header]
        if missing:
            raise UserError(f"{path} has the header {header}, but 'Question ID,Type,Statement' is needed.")
        columns = [header.index(name) for name in wanted]
        rows = []
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) < len(header):
                raise UserError(f"{path} line {reader.line_num} has {len(row)} cells instead of {len(header)}.")
            first, second, third = (row[column].strip() for column in columns)
            rows.append((first, second, third))
    if not rows or len(rows) % 2:
        raise UserError(f"{path} has {len(rows)} rows, but two consecutive rows form a pair: the number must be even.")
    return rows


def _image_path(directory: Path, folder: str, question: str) -> Path:
    path = directory / IMAGE_FOLDER / folder / f"{question}.jpg"
    if not path.is_file():
        raise UserError(f"{path} is missing: Questions.csv names question {question} of type '{folder}'.")
    return path


def read_pairs(directory: str | Path) -> list[Pair]:
    """Read a directory in the layout of the public `MMVP/MMVP_VLM`.

    The pattern comes from the row's `Type`, so that shuffled pairs keep it; a type that is not known falls back to the
    row order of the official script (nine blocks of equal length), with a warning.

    Args:
        directory: Holds `Questions.csv` and `MLLM_VLM Images/<Type>/<id>.jpg`.
    """
    directory = Path(directory)
    rows = _read_rows(directory / "Questions.csv")
    num_pairs = len(rows) // 2
    pairs, unknown = [], set()
    for number, (first, second) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        folder = first[1]  # of the first row for both images, as the official script has it
        pattern = pattern_of(folder)
        if pattern is None:
            unknown.add(folder)
            pattern = PATTERNS[number * len(PATTERNS) // num_pairs]
        images = (_image_path(directory, folder, first[0]), _image_path(directory, folder, second[0]))
        pairs.append(Pair(pattern=pattern, images=images, statements=(first[2], second[2])))
    if unknown:
        logger.warning(
            "%s: unknown types %s; their pattern is taken from the row order, nine blocks of equal length.",
            directory / "Questions.csv",
            sorted(unknown),
        )
    return pairs


def pair_logits(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """[P, 2 (text), 2 (image)] similarities, from embeddings [2P, D] of the pairs' images and texts in row order."""
    width = images.shape[1]
    # Scale and bias of the logits are positive and shared, so the inner product of normalised images decides alike.
    normalised = images / np.linalg.norm(images, axis=1, keepdims=True)
    return texts.reshape(-1, 2, width) @ normalised.reshape(-1, 2, width).transpose(0, 2, 1)


def score_pairs(logits: np.ndarray) -> np.ndarray:
    """Which pairs are right.

    Args:
        logits: [P, 2 (text), 2 (image)] similarity of each statement to each image.

    Returns:
        [P] bool: the first text prefers the first image and the second the second. A tie goes to the second image, as
        the official script asks whether the first one's probability exceeds one half.
    """
    picks_first = logits[:, :, 0] > logits[:, :, 1]
    return picks_first[:, 0] & ~picks_first[:, 1]


def summarise(pairs: Sequence[Pair], correct: np.ndarray) -> dict:
    """Percentages per pattern and their mean, which is the published number where the patterns are of equal size.

    Args:
        correct: [P] bool, one per pair.
    """
    per_pattern = {}
    for pattern in PATTERNS:
        member = np.array([pair.pattern == pattern for pair in pairs])
        if member.any():
            per_pattern[pattern] = {
                "accuracy": 100.0 * float(correct[member].mean()),
                "num_correct": int(correct[member].sum()),
                "num_pairs": int(member.sum()),
            }
    return {
        "average": float(np.mean([entry["accuracy"] for entry in per_pattern.values()])),
        "num_pairs": len(pairs),
        "num_correct": int(correct.sum()),
        "per_pattern": per_pattern,
        "pairs": [int(value) for value in correct],
    }
