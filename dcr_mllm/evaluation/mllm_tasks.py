"""Benchmarks of MLLMs: where their data are, how lmms-eval asks them, and what a scorer needs to know of an item."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dcr_mllm.config import nearest
from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.pillow import kept_strict
from dcr_mllm.evaluation.scored import Scored
from dcr_mllm.evaluation.scorers import POPE_CATEGORIES, SCORERS, Item, score_mmvp

MINI = "mini"


class MllmTask(NamedTuple):
    """One benchmark.

    Attributes:
        yaml: Its definition among lmms-eval's tasks: prompt, generation settings, columns.
        public_layout: Rows with images as bytes from its public files.
        item: What the scorer needs, from a row without its image and the answer.
        unit_size: Rows that belong together, so that a limit keeps whole units.
    """

    yaml: str
    public_layout: Callable[[Path], list[dict[str, Any]]]
    item: Callable[[dict[str, Any], str], Item]
    unit_size: int


def mmvp_rows(directory: Path) -> list[dict[str, Any]]:
    """Rows of MMVP's public layout: `Questions.csv` (Index or lndex, ...) and `MMVP Images/<Index>.jpg`.

    Raises:
        UserError: A missing file, column or image, the first three named.
    """
    questions = directory / "Questions.csv"
    if not questions.is_file():
        raise UserError(f"mmvp: {questions} is missing; {directory} has to hold MMVP's Questions.csv and MMVP Images/")
    with questions.open(newline="", encoding="utf-8-sig") as file:
        records = list(csv.DictReader(file))
    rows, missing = [], []
    for number, record in enumerate(records, start=2):
        known = {"Index" if key in ("Index", "lndex") else key: value for key, value in record.items()}
        absent = {"Index", "Question", "Options", "Correct Answer"} - set(known)
        if absent:
            raise UserError(f"mmvp: {questions} line {number} has no column {', '.join(sorted(absent))}")
        image = directory / "MMVP Images" / f"{known['Index']}.jpg"
        if image.is_file():
            known["image"] = {"bytes": image.read_bytes(), "path": image.name}
        else:
            missing.append(str(image))
        rows.append({**known, "Index": int(known["Index"])})
    if missing:
        raise UserError(f"mmvp: {len(missing)} images are missing, the first: {', '.join(missing[:3])}")
    if not rows:
        raise UserError(f"mmvp: {questions} has no questions")
    return rows


def mmvp_item(row: dict[str, Any], answer: str) -> Item:
    """What `score_mmvp` needs."""
    options = re.findall(r"\([a-z]\)\s*(.*?)(?=\s*\([a-z]\)|$)", row["Options"])
    return {"index": row["Index"], "options": options, "target": row["Correct Answer"], "answer": answer}


def pope_rows(directory: Path) -> list[dict[str, Any]]:
    """Rows of POPE's public layout: `coco_pope_<category>.json`, a JSON object per line, and the images in `val2014/`.

    Raises:
        UserError: A missing file, key or image, the first three named.
    """
    rows: list[dict[str, Any]] = []
    images: dict[str, bytes | None] = {}
    for category in POPE_CATEGORIES:
        path = directory / f"coco_pope_{category}.json"
        if not path.is_file():
            raise UserError(f"pope: {path} is missing; {directory} has to hold POPE's three JSON files and val2014/")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
                name, question, label = (str(record[key]) for key in ("image", "text", "label"))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f"pope: {path} line {number} is no question with image, text and label: {error}"
                ) from None
            if name not in images:
                image = directory / "val2014" / name
                images[name] = image.read_bytes() if image.is_file() else None
            rows.append(
                {
                    "id": str(len(rows)),
                    "question_id": str(record.get("question_id", number)),
                    "question": question,
                    "answer": label,
                    "image_source": Path(name).stem,
                    "category": category,
                    "image": {"bytes": images[name], "path": name},
                }
            )
    missing = [str(directory / "val2014" / name) for name, content in images.items() if content is None]
    if missing:
        raise UserError(f"pope: {len(missing)} images are missing, the first: {', '.join(missing[:3])}")
    return rows


def pope_item(row: dict[str, Any], answer: str) -> Item:
    """What `score_pope` needs."""
    return {"category": row["category"], "image": row["image_source"], "target": row["answer"], "answer": answer}


TASKS = {
    "mmvp": MllmTask(
        yaml="mmvp/mmvp.yaml",
        public_layout=mmvp_rows,
        item=mmvp_item,
        unit_size=2,
    ),
    "pope": MllmTask(yaml="pope/pope.yaml", public_layout=pope_rows, item=pope_item, unit_size=1),
}
# The drawn benchmarks have no disputed labels.
_MINI_SCORES: dict[str, Callable[[list[Item]], Scored]] = {"mmvp": partial(score_mmvp, disputed=())}


def check_tasks(names: list[str]) -> None:
    """Refuse unknown tasks.

    Raises:
        UserError: Names the nearest.
    """
    for name in names:
        if name not in TASKS:
            raise UserError(f"task {name!r} is unknown{nearest(name, TASKS)}; known are {', '.join(TASKS)}")


class TaskData(NamedTuple):
    """A benchmark's rows as lmms-eval will read them.

    Attributes:
        name: In results; begins with `mini-` for the drawn one.
        rows: With images as bytes.
        score: Its scorer.
    """

    name: str
    rows: list[dict[str, Any]]
    score: Callable[[list[Item]], Scored]


def load_task(name: str, data: str, runs_dir: Path) -> TaskData:
    """Read one benchmark.

    Args:
        name: Of `TASKS`.
        data: `mini`, or a folder that holds `<name>/` in its public layout.
        runs_dir: Where drawn data are kept.

    Raises:
        UserError: The data are not there or not complete.
    """
    task = TASKS[name]
    if data == MINI:
        from dcr_mllm.mini.data import write_benchmarks

        directory = write_benchmarks(runs_dir / "mini-data" / "test") / name
        return TaskData(f"mini-{name}", task.public_layout(directory), _MINI_SCORES.get(name, SCORERS[name].score))
    directory = Path(data) / name
    if not directory.is_dir():
        raise UserError(f"--data {data} has no folder {name}/; put a copy of the benchmark's public files there")
    return TaskData(name, task.public_layout(directory), SCORERS[name].score)


def lmms_name(name: str) -> str:
    """A benchmark's name in lmms-eval; its own are taken."""
    return f"dcr_{name.replace('-', '_')}"


def write_lmms_task(name: str, data: TaskData, directory: Path, final: Path) -> None:
    """Write a benchmark's rows and task file where lmms-eval finds them.

    Args:
        name: Of `TASKS`.
        data: Its rows.
        directory: Where to write.
        final: Where that folder will be when it is read.
    """
    import yaml
    from datasets import Dataset, Image

    with kept_strict():
        import lmms_eval

    rows = Path("data") / data.name
    (directory / rows).mkdir(parents=True)
    table = Dataset.from_list(data.rows).cast_column("image", Image())
    table.to_parquet(directory / rows / "test-00000-of-00001.parquet")
    definition = {
        "include": str(Path(lmms_eval.__file__).parent / "tasks" / TASKS[name].yaml),
        "task": lmms_name(data.name),
        "dataset_path": str((final / rows).resolve()),
        "dataset_kwargs": {},
        "test_split": "test",
    }
    (directory / f"{definition['task']}.yaml").write_text(yaml.safe_dump(definition))
