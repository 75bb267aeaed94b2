"""An evaluation from loaded data to `results.json`: every model asked, scored, and compared with the first."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dcr_mllm.errors import UserError
from dcr_mllm.log import rank
from dcr_mllm.runs import atomic_directory, package_versions, write_text_atomic

if TYPE_CHECKING:
    from dcr_mllm.evaluation.asking import Answers, Conditions
    from dcr_mllm.evaluation.mllm_data import TaskData
    from dcr_mllm.evaluation.run import EvalConfig
    from dcr_mllm.evaluation.scored import Scored

RESULTS_VERSION = 2

Items = dict[str, list[dict[str, Any]]]


class TaskNames(NamedTuple):
    """Tasks by who scores them: MLLM benchmarks and tower benchmarks here, other ones by lmms-eval."""

    all: list[str]
    mllm: list[str]
    tower: list[str]
    other: list[str]

    @classmethod
    def sorted_out(cls, names: list[str]) -> TaskNames:
        """Sort names out.

        Raises:
            UserError: An unknown task, or one that needs a judge model.
        """
        from dcr_mllm.evaluation.lmms_tasks import check_other_tasks
        from dcr_mllm.evaluation.mllm_tasks import TASKS
        from dcr_mllm.evaluation.tower_tasks import TOWER_TASKS

        names = list(dict.fromkeys(names))
        if not names:
            raise UserError(f"--tasks names no task; known are {', '.join((*TASKS, *TOWER_TASKS))}")
        other = [name for name in names if name not in TASKS and name not in TOWER_TASKS]
        if other:
            check_other_tasks(other)
        return cls(
            names, [name for name in names if name in TASKS], [name for name in names if name in TOWER_TASKS], other
        )


class Loaded(NamedTuple):
    """Benchmarks that are ready to be asked, by name."""

    mllm: dict[str, TaskData]
    tower: dict[str, Any]


def load_tasks(config: EvalConfig, tasks: TaskNames) -> Loaded:
    """Read every benchmark's data, as many rows as the limit allows, before any model is loaded.

    Raises:
        UserError: Data are missing or incomplete.
    """
    from dcr_mllm.evaluation.lmms_tasks import write_drawn_rows
    from dcr_mllm.evaluation.mllm_data import MINI, load_task

    with _one_voice():
        mllm = {name: load_task(name, config.data, Path("runs"), config.limit) for name in tasks.mllm}
        if config.data == MINI and config.limit is None and rank() == 0:
            for data in mllm.values():
                write_drawn_rows(data, Path("runs"))
        tower: dict[str, Any] = {}
        if tasks.tower:
            from dcr_mllm.evaluation.mllm_data import HUB
            from dcr_mllm.evaluation.tower import whole_tower
            from dcr_mllm.evaluation.tower_tasks import load_tower_task, tower_of

            for path in config.models.values():
                whole_tower(tower_of(path))
            if config.data == HUB:
                raise UserError(f"{tasks.tower[0]} is read from a folder: give --data DIR with DIR/{tasks.tower[0]}/")
            tower = {name: load_tower_task(name, config.data, Path("runs")) for name in tasks.tower}
        if tasks.other:
            from dcr_mllm.evaluation.asking import check_loadable

            check_loadable(tasks.other)
    return Loaded(mllm, tower)


def what_is_asked(loaded: Loaded, other: Sequence[str]) -> list[str]:
    """A line for each benchmark: how many questions or items of it each model would get."""
    lines = [f"{data.name}: {len(data.table):,} questions" for data in loaded.mllm.values()]
    for task in loaded.tower.values():
        for name, settings in task.settings.items():
            numbers = [f"{count:,} {key[len('num_') :]}" for key, count in settings.items() if key.startswith("num_")]
            lines.append(f"{name}: {', '.join(numbers)}")
    return [*lines, *(f"{name}: passed through to lmms-eval" for name in other)]


def evaluate(
    config: EvalConfig, tasks: TaskNames, loaded: Loaded, out: Path, *, allow_differences: bool
) -> dict[str, Any] | None:
    """Ask every model every question, score the raw answers, compare each model with the first.

    Args:
        config: What is evaluated.
        tasks, loaded: Its tasks and their data.
        out: Folder of answers; those of a killed run are not asked for again.
        allow_differences: Compare models although they were asked under different conditions.

    Returns:
        Scores per training run, comparisons per model but the first; `report.html` and `report.md` show them. None on
        all processes but the first.

    Raises:
        UserError: The models would be asked under different conditions.
    """
    from dcr_mllm.evaluation.asking import changes_on_the_way
    from dcr_mllm.evaluation.report import write_report
    from dcr_mllm.evaluation.verdicts import add_verdicts, compare_task

    scored: dict[str, dict[str, Scored]] = {model: {} for model in config.models}
    items: dict[str, Items] = {model: {} for model in config.models}
    asked: dict[str, Answers] = {}
    differences: list[str] = []
    conditions: dict[str, Conditions] = {}
    if tasks.mllm or tasks.other:
        conditions, differences = _conditions(config, loaded, allow_differences)
        found = _ask_all(config, tasks, loaded, conditions, out, allow_differences)
        if found is None:
            return None
        asked = found
        differences += [
            f"{model}, after a restart: {change}"
            for model in config.models
            for change in changes_on_the_way(out / "raw" / f"{model}.json")
        ]
        for model, answers in asked.items():
            for task, data in loaded.mllm.items():
                answered = data.items(answers.given[task])
                items[model][data.name], scored[model][data.name] = answered, data.score(answered)
    elif rank() > 0:
        return None
    if tasks.tower:
        _measure_towers(config, loaded, scored)
    for model, entries in scored.items():
        for name, entry in entries.items():
            _write_answers(out / "answers" / model / f"{name}.jsonl", items[model].get(name), entry)
    first, *others = config.groups
    names = list(next(iter(scored.values())))
    comparisons = {
        group: {
            name: compare_task(
                [scored[run][name] for run in config.groups[first]], [scored[run][name] for run in config.groups[group]]
            )
            for name in names
        }
        for group in others
    }
    for compared in comparisons.values():
        add_verdicts(compared)
    results = {
        "version": RESULTS_VERSION,
        "config": dataclasses.asdict(config),
        "decoding": "greedy" if config.scoring == "generation" else "the likeliest option",
        "conditions": {model: dataclasses.asdict(entry) for model, entry in conditions.items()},
        "differences": differences,
        "scores": {
            model: {name: _summary(entry, asked.get(model), name, loaded) for name, entry in entries.items()}
            for model, entries in scored.items()
        },
        "passed_through": {model: answers.other for model, answers in asked.items() if answers.other},
        "undecodable": _undecodable(loaded, next(iter(scored.values()))),
        "notes": {data.name: data.notes for data in loaded.mllm.values() if data.notes},
        "tower_settings": {name: entry for data in loaded.tower.values() for name, entry in data.settings.items()},
        "comparisons": comparisons,
        "packages": package_versions(),
    }
    write_report(results, loaded.mllm, items, scored, out)
    return results


def _conditions(config: EvalConfig, loaded: Loaded, allow_differences: bool) -> tuple[dict[str, Conditions], list[str]]:
    from dcr_mllm.evaluation.asking import check_fair, conditions_of

    digests = {data.name: data.digest() for data in loaded.mllm.values()}
    conditions = {
        model: conditions_of(path, digests, config.batch_size, config.device, config.scoring)  # type: ignore[arg-type]
        for model, path in config.models.items()
    }
    differences = check_fair(conditions, allow_differences)
    for line in differences if rank() == 0 else ():
        print(f"different conditions, {line}")
    return conditions, differences


def _ask_all(
    config: EvalConfig,
    tasks: TaskNames,
    loaded: Loaded,
    conditions: Mapping[str, Conditions],
    out: Path,
    allow_differences: bool,
) -> dict[str, Answers] | None:
    """Every model's answers, one model in memory at a time; None on all processes but the first."""
    from accelerate import PartialState

    from dcr_mllm.evaluation.asking import ask, load_model, same_as_before
    from dcr_mllm.evaluation.lmms_tasks import lmms_name, write_task
    from dcr_mllm.evaluation.mllm_tasks import TASKS

    # As the model does it: a process that is done waits for the others, longer than NCCL's ten minutes.
    processes = PartialState(cpu=config.device == "cpu", timeout=timedelta(days=1))
    definitions = out / "tasks"
    if processes.is_main_process:
        for model, entry in conditions.items():
            (out / "raw").mkdir(exist_ok=True)
            same_as_before(entry, out / "raw" / f"{model}.json", allow_differences)
        with atomic_directory(definitions, replace=True) as temporary:
            for data in loaded.mllm.values():
                write_task(data, temporary, definitions)
    processes.wait_for_everyone()
    by_lmms_name = {lmms_name(data.name): data for data in loaded.mllm.values()}

    def options(task: str, doc_id: int) -> tuple[str, ...] | None:
        data = by_lmms_name.get(task)
        return None if data is None else TASKS[data.task].options(data.rows[data.asked[doc_id]])

    asked: dict[str, Answers] = {}
    for model, path in config.models.items():
        llava = load_model(
            path,
            batch_size=config.batch_size,
            device=config.device,
            answers=out / "raw" / f"{model}.jsonl",
            options=options if config.scoring == "likelihood" else None,
        )
        answers = ask(llava, loaded.mllm, definitions, tasks.other, config.limit)
        if answers is not None:
            asked[model] = answers
        del llava  # before the next one is loaded: two of them need not fit
        gc.collect()
    return asked if processes.is_main_process else None


def _measure_towers(config: EvalConfig, loaded: Loaded, scored: dict[str, dict[str, Scored]]) -> None:
    from dcr_mllm.evaluation.tower_tasks import measure_tower_tasks, tower_of

    found = measure_tower_tasks(
        {model: tower_of(path) for model, path in config.models.items()},
        list(loaded.tower.values()),
        batch_size=config.batch_size,
        device=config.device,
        limit=config.limit,
    )
    for model, entries in found.items():
        scored[model].update(entries)


def _summary(entry: Scored, answers: Answers | None, name: str, loaded: Loaded) -> dict[str, Any]:
    task = next((task for task, data in loaded.mllm.items() if data.name == name), None)
    own = answers.lmms_scores.get(task) if answers is not None and task is not None else None
    return {
        "measures": entry.values(),
        "questions": len(entry.right),
        "unparsable": len(entry.unparsable),
        "lmms_eval": own,
    }


def _undecodable(loaded: Loaded, scored: Mapping[str, Scored]) -> dict[str, dict[str, str]]:
    """By benchmark and row or image, what could not be decoded; it is the same for every model."""
    found = {data.name: {f"row {k}": text for k, text in data.undecodable.items()} for data in loaded.mllm.values()}
    found |= {
        name: dict.fromkeys(entry.undecodable, "not readable") for name, entry in scored.items() if entry.undecodable
    }
    return {name: rows for name, rows in found.items() if rows}


def _write_answers(path: Path, items: list[dict[str, Any]] | None, scored: Scored) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unparsable = set(scored.unparsable)
    lines = [
        json.dumps({**(items[k] if items else {"item": k}), "right": bool(right), "unparsable": k in unparsable})
        for k, right in enumerate(scored.right)
    ]
    write_text_atomic(path, "\n".join(lines) + "\n")


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Of several processes only the first says what all of them find."""
    with contextlib.nullcontext() if rank() == 0 else contextlib.redirect_stdout(io.StringIO()):
        yield


def format_results(results: dict[str, Any]) -> str:
    """The results as text: verdicts first, then every measure."""
    first, *_ = results["config"]["groups"]
    lines = [f"different conditions, {line}" for line in results["differences"]]
    lines += [f"{name}: {note}" for name, notes in results["notes"].items() for note in notes]
    for model, tasks in results["comparisons"].items():
        for task, entry in tasks.items():
            difference = entry["measures"][entry["headline"]]["difference"]
            lines.append(
                f"{model} against {first}, {task}: {entry['verdict']}; {entry['headline']} {difference:+.1f}, "
                f"{entry['test']}, p {entry['p_value']:.2g} (Holm {entry['p_holm']:.2g}), "
                f"{entry['gained']} gained and {entry['lost']} lost"
            )
            if entry["caution"]:
                lines.append(f"  caution: {entry['caution']}")
        lines += sorted({entry["training"] for entry in tasks.values()})
    scores = results["scores"]
    width = max(12, *(len(model) + 2 for model in scores))
    for task in next(iter(scores.values())):
        lines += ["", f"{task:<28}" + "".join(f"{model:>{width}}" for model in scores)]
        for name in next(iter(scores.values()))[task]["measures"]:
            cells = [entries[task]["measures"][name] for entries in scores.values()]
            lines.append(f"  {name:<26}" + "".join(f"{value:>{width}.1f}" for value in cells))
        for name in ("questions", "unparsable"):
            cells = [entries[task][name] for entries in scores.values()]
            lines.append(f"  {name:<26}" + "".join(f"{value:>{width}}" for value in cells))
    for model, tasks in results["passed_through"].items():
        for task, values in tasks.items():
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            lines += ["", f"{task}, {model} (lmms-eval's own score): {shown}"]
    for task, rows in results["undecodable"].items():
        lines += ["", f"{task}: {len(rows)} images cannot be decoded and count as wrong (clustering leaves them out): "]
        lines += [f"  {', '.join(rows)}"]
    return "\n".join(lines)
