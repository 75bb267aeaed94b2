"""The validation split of stage 1: where it lies, what is in it, and whether it can be measured; opens no image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcr_mllm.errors import UserError
from dcr_mllm.headers import TowerSummary

if TYPE_CHECKING:
    import numpy as np

    from dcr_mllm.evaluation.features import Picture
    from dcr_mllm.evaluation.mmvp_vlm import Pair
    from stage1_dcr.config import Stage1Config

MINI = "mini"
MAX_LABELLED = 1000
"""Labelled images that are looked at; of more, as many are drawn once, at random but always the same."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A validation split; either part may be missing.

    Attributes:
        pairs: As in MMVP-VLM.
        files: N labelled images.
        truth: [N] their classes, as indices into `prompts`.
        prompts: Per class, how it is described.
    """

    pairs: Sequence[Pair]
    files: Sequence[Picture]
    truth: np.ndarray
    prompts: Sequence[Sequence[str]]


def validation_directory(config: Stage1Config) -> Path | None:
    """Where the split lies; `mini` is drawn below the runs directory, once."""
    if config.validation != MINI:
        return None if config.validation is None else Path(config.validation).expanduser()
    from dcr_mllm.mini.data import write_tower_benchmarks

    return write_tower_benchmarks(Path(config.runs_dir) / "mini-data" / "validation", "validation")


def check_validation(config: Any, tower: TowerSummary) -> list[str]:
    """Refuses, before anything is loaded, a split that cannot be measured.

    Args:
        config: A `Stage1Config`.
        tower: Its tower.

    Returns:
        Lines worth printing.
    """
    if config.validation is None:
        return []
    if not config.tower_steps:
        return ["note: validation is ignored, since it belongs to the tower phase, which has no steps"]
    if not tower.has_text_side:
        raise UserError(
            f"validation needs a tower with a text side, but {tower.path} has none; give the full model, or leave "
            "validation out"
        )
    if config.validation == MINI:
        return ["validation: drawn scenes of the miniature"]
    directory = Path(config.validation).expanduser()
    split = read_split(directory)
    if config.select == "best-validation" and not split.pairs:
        raise UserError(
            f"select is best-validation, which goes by pairs, but validation {directory} has no mmvp_vlm/; add pairs "
            "or write select=final"
        )
    notes = [f"validation: {len(split.pairs)} pairs, {len(split.files)} labelled images of {directory}"]
    if not split.files:
        notes.append(
            f"note: validation {directory} has no labelled/, so the loss of zero-shot accuracy is not watched and "
            "zero_shot_margin is ignored"
        )
    return notes


def read_split(directory: Path) -> Split:
    """Read a validation split: `mmvp_vlm/`, `labelled/` (its test part) or both; images are not opened.

    Raises:
        UserError: Neither is there, or a part is not complete.
    """
    import numpy as np

    from dcr_mllm.evaluation.labelled import read_labelled_set
    from dcr_mllm.evaluation.mmvp_vlm import read_pairs

    places = [directory / name for name in ("mmvp_vlm", "labelled")]
    if not any(place.is_dir() for place in places):
        problem = "has neither mmvp_vlm/ nor labelled/" if directory.is_dir() else "is no directory"
        raise UserError(f"validation {directory} {problem}; give a directory that holds one of them or both, or mini")
    pairs = read_pairs(places[0]) if places[0].is_dir() else []
    if not places[1].is_dir():
        return Split(pairs=pairs, files=[], truth=np.array([], dtype=int), prompts=[])
    labelled = read_labelled_set(places[1], needed=("test",))
    chosen = np.arange(len(labelled.test))
    if len(chosen) > MAX_LABELLED:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, MAX_LABELLED, replace=False))
    index = {name: number for number, name in enumerate(labelled.prompts)}
    return Split(
        pairs=pairs,
        files=[labelled.test.files[row] for row in chosen.tolist()],
        truth=np.array([index[value] for value in labelled.test.classes[chosen]]),
        prompts=list(labelled.prompts.values()),
    )
