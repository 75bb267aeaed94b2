"""A labelled image set: one class and any number of attributes per image, in two files that a person can write.

`labels.csv` has the columns `file,split,class,<attribute>...` (split is train or test, files are relative to the
directory, an empty attribute cell means "does not apply"); `classes.json` says how to name the classes in a prompt:
`{"templates": ["a photo of a {}."], "classes": {"class value": "name in prompt"}}`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dcr_mllm.errors import UserError

if TYPE_CHECKING:
    from dcr_mllm.evaluation.features import Picture

SPLITS = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split: N images, their class values [N] and, per attribute, the values [N] ("" = does not apply)."""

    files: Sequence[Picture]
    classes: np.ndarray
    attributes: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """Both splits and, per class value, the prompts that describe it."""

    train: Split
    test: Split
    prompts: dict[str, list[str]]


def _read_classes(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        raise UserError(f"{path} is missing: a labelled set holds labels.csv and classes.json.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        templates, classes = list(content["templates"]), dict(content["classes"])
        prompts = {str(value): [template.format(name) for template in templates] for value, name in classes.items()}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f'{path} does not hold {{"templates": ["a photo of a {{}}."], "classes": {{"value": "name"}}}} ({error!r}).'
        ) from error
    if not templates or len(classes) < 2:
        raise UserError(
            f"{path} has {len(templates)} templates and {len(classes)} classes; at least 1 and 2 are needed."
        )
    return prompts


def read_labelled_set(directory: str | Path, needed: Sequence[str] = SPLITS) -> LabelledSet:
    """Read a labelled set and check that every file exists and every class has a name.

    Args:
        directory: Holds `labels.csv`, `classes.json` and the images.
        needed: Splits that may not be empty.
    """
    directory = Path(directory)
    table = directory / "labels.csv"
    if not table.is_file():
        raise UserError(f"{table} is missing: a labelled set holds labels.csv and classes.json.")
    prompts = _read_classes(directory / "classes.json")
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = [column.strip() for column in reader.fieldnames or []]
        reader.fieldnames = columns
        for name in ("file", "split", "class"):
            if name not in columns:
                raise UserError(f"{table} has the columns {columns}, but 'file,split,class,<attribute>...' is needed.")
        rows = [{column: (row[column] or "").strip() for column in columns} for row in reader]
    for number, row in enumerate(rows, start=2):
        if row["split"] not in SPLITS:
            raise UserError(f"{table} line {number} has the split '{row['split']}'; use train or test.")
        if row["class"] not in prompts:
            raise UserError(f"{table} line {number} has the class '{row['class']}', which classes.json does not name.")
        if not (directory / row["file"]).is_file():
            raise UserError(f"{directory / row['file']} is missing: {table} line {number} names it.")
    attributes = [column for column in columns if column not in ("file", "split", "class")]
    splits = {}
    for split in SPLITS:
        members = [row for row in rows if row["split"] == split]
        if not members and split in needed:
            raise UserError(f"{table} has no rows of the split '{split}'; k-NN and probes need both splits.")
        splits[split] = Split(
            files=[directory / row["file"] for row in members],
            classes=np.array([row["class"] for row in members]),
            attributes={name: np.array([row[name] for row in members]) for name in attributes},
        )
    return LabelledSet(train=splits["train"], test=splits["test"], prompts=prompts)
