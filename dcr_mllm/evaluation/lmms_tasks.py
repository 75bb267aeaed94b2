"""Task files: how lmms-eval is told where a benchmark's rows are, and which of its own tasks can be passed through."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from dcr_mllm.config import nearest
from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.mllm_tasks import TASKS

if TYPE_CHECKING:
    from dcr_mllm.evaluation.mllm_data import TaskData

# What lmms-eval's task files have in common that ask a model to judge.
_JUDGE = re.compile(
    r"OPENAI_API|AZURE_\w*KEY|llm_judge|import openai|from openai|gpt_eval|ANTHROPIC_API", re.IGNORECASE
)
_JUDGE_KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY", "AZURE_OPENAI_API_KEY", "ANTHROPIC_API_KEY")


def lmms_name(name: str) -> str:
    """A benchmark's name in lmms-eval; its own are taken."""
    return f"dcr_{name.replace('-', '_')}"


def write_task(data: TaskData, directory: Path, final: Path) -> None:
    """Write a benchmark's task file, and its rows unless lmms-eval can read them where they are.

    Args:
        data: The benchmark.
        directory: Where to write.
        final: Where that folder will be when it is read.
    """
    import yaml

    files = data.files
    if files is None:
        rows = Path("data") / f"{data.name}.parquet"
        (directory / rows.parent).mkdir(exist_ok=True)
        _write_rows(data, directory / rows)
        files = [str((final / rows).resolve())]
    definition = {
        "include": str(_tasks_folder() / TASKS[data.task].yaml),
        "task": lmms_name(data.name),
        # By its files: the cache of `datasets` tells folders apart by their last name alone.
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": files}},
        "test_split": "test",
    }
    (directory / f"{definition['task']}.yaml").write_text(yaml.safe_dump(definition))


def write_drawn_rows(data: TaskData, runs_dir: Path) -> None:
    """Put a drawn benchmark's rows where `eval/tasks/` looks for them, unless they are there."""
    path = runs_dir / "mini-data" / "test" / "lmms" / f"{data.task}.parquet"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        _write_rows(data, partial)
        partial.replace(path)


def _write_rows(data: TaskData, path: Path) -> None:
    """Parquet with the images as they are in the table: those in files as paths, so that nothing is copied."""
    import pyarrow.parquet as parquet
    from datasets import Image

    table = data.table.cast_column(TASKS[data.task].image, Image()).flatten_indices()
    parquet.write_table(table.data.table.cast(table.features.arrow_schema), path)


def check_other_tasks(names: list[str]) -> None:
    """Refuse tasks that lmms-eval does not have either, and those that a model has to judge.

    Raises:
        UserError: Names the nearest task, or the file that calls the judge and the key that it needs.
    """
    known = set(_files_by_task())
    for name in names:
        if name not in known:
            tower = "mmvp_vlm, zero_shot, clustering, retrieval, linear_probe"
            raise UserError(
                f"task {name!r} is unknown{nearest(name, [*TASKS, *known])}; scored here are {', '.join(TASKS)}, of "
                f"towers {tower}, and any other task of lmms-eval is passed through"
            )
        judge = _judge_in(_files_by_task()[name])
        if judge and not any(os.environ.get(key) for key in _JUDGE_KEYS):
            raise UserError(
                f"task {name} is judged by a model behind an API ({judge}), and none of {', '.join(_JUDGE_KEYS)} is "
                "set; set one or leave the task out"
            )
        if judge:
            print(f"{name}: its answers are sent to a judge model behind an API ({judge})")


def other_task_folders(names: list[str]) -> list[str]:
    """Folders whose task files lmms-eval has to read for these of its own tasks: all of them take ten seconds."""
    return sorted({str(_files_by_task()[name].parent) for name in names})


@lru_cache(maxsize=1)
def _files_by_task() -> dict[str, Path]:
    """The file of each task and group of lmms-eval, from its first lines, without loading any."""
    return {name: path for path in sorted(_tasks_folder().rglob("*.yaml")) for name in _names_in(path)}


def _names_in(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    for match in re.finditer(r"^(?:task|group):\s*[\"']?([\w.:-]+)[\"']?\s*(?:#.*)?$", text, re.MULTILINE):
        yield match[1]


def _judge_in(definition: Path) -> str | None:
    """What in a task file, in the code that it names, or in what that imports from its neighbours calls a judge."""
    found: dict[Path, str] = {}
    waiting = [definition]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        text = found[path] = path.read_text(encoding="utf-8", errors="replace")
        waiting += [path.parent / name for name in re.findall(r"^include:\s*(\S+)", text, re.MULTILINE)]
        waiting += [path.parent / f"{name}.py" for name in re.findall(r"!function\s+(\w+)\.", text)]
        for module in re.findall(r"^\s*(?:from|import)\s+lmms_eval\.tasks\.([\w.]+)", text, re.MULTILINE):
            waiting.append(_tasks_folder() / f"{module.replace('.', '/')}.py")
    for path, text in found.items():
        match = _JUDGE.search(text)
        if match:
            return f"{path.name} has {match[0]}"
    return None


def _tasks_folder() -> Path:
    """Without importing lmms-eval, which takes seconds."""
    spec = importlib.util.find_spec("lmms_eval")
    assert spec is not None and spec.submodule_search_locations, "lmms-eval is a dependency"
    return Path(spec.submodule_search_locations[0]) / "tasks"
