"""Asking a LLaVA a benchmark's questions through lmms-eval, and the conditions under which it was asked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dcr_mllm.errors import UserError
from dcr_mllm.runs import package_versions, write_json_atomic

if TYPE_CHECKING:
    from dcr_mllm.evaluation.mllm_data import TaskData

Scoring = Literal["generation", "likelihood"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditions:
    """What answers depend on besides the model's weights; it has to be the same for what is compared.

    Attributes:
        precision: Of the weights while they answer.
        device: cpu or cuda.
        batch_size: Questions that are decoded together: rounding can turn a greedy answer.
        scoring: Answers generated, or chosen by likelihood.
        template: Hash of the chat template.
        image_padding: Whether pictures are padded to a square or cropped.
        data: Hash of rows and images by task.
        packages: Versions.
    """

    precision: str
    device: str
    batch_size: int
    scoring: Scoring
    template: str
    image_padding: str
    data: dict[str, str]
    packages: dict[str, str]


def conditions_of(path: str, data: Mapping[str, str], batch_size: int, device: str, scoring: Scoring) -> Conditions:
    """The conditions of a LLaVA directory that is asked here and now.

    Args:
        path: LLaVA directory.
        data: `TaskData.digest` by task.
        batch_size, device, scoring: As asked for.
    """
    from dcr_mllm.headers import read_json
    from dcr_mllm.llava import load_processor

    processor = load_processor(path)
    stored = read_json(Path(path) / "config.json")
    return Conditions(
        precision="float32" if device == "cpu" else str(stored.get("dtype") or stored.get("torch_dtype") or "float32"),
        device=device,
        batch_size=batch_size,
        scoring=scoring,
        template=hashlib.sha256((processor.chat_template or "").encode()).hexdigest()[:16],
        image_padding="pad" if getattr(processor.image_processor, "do_pad", False) else "square",
        data=dict(data),
        packages={name: version for name, version in package_versions().items() if version},
    )


def check_fair(conditions: Mapping[str, Conditions], allow: bool = False) -> list[str]:
    """What differs between the conditions of the models that are compared.

    Args:
        conditions: By model, the baseline first.
        allow: Only say what differs.

    Returns:
        A line per difference; none if the comparison is fair.

    Raises:
        UserError: Something differs and `allow` is not set.
    """
    first, *others = conditions
    lines = [
        f"{name}: {difference}"
        for name in others
        for difference in differing(conditions[first], conditions[name], first)
    ]
    if lines and not allow:
        raise UserError(
            f"{first} and the others were not asked under the same conditions ({'; '.join(lines)}); mend that, or "
            "compare them all the same with --allow-differences"
        )
    return lines


def differing(first: Conditions, other: Conditions, name: str) -> list[str]:
    """The fields that differ, those that are tables entry by entry."""
    found = []
    for field in dataclasses.fields(Conditions):
        ours, theirs = getattr(other, field.name), getattr(first, field.name)
        if isinstance(ours, dict):
            keys = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
            found += [f"{field.name}.{key} {ours.get(key)} ({name}: {theirs.get(key)})" for key in keys]
        elif ours != theirs:
            found.append(f"{field.name} {ours} ({name}: {theirs})")
    return found


def same_as_before(conditions: Conditions, record: Path, allow: bool) -> None:
    """Keep the conditions beside the raw answers, and what changed on the way; refuse to go on under others.

    Raises:
        UserError: A killed run was started under other ones, and `allow` is not set.
    """
    changes: list[str] = []
    if record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = differing(Conditions(**before["conditions"]), conditions, "before")
        if changed and not allow:
            raise UserError(
                f"{record.parent.parent} was started under other conditions ({'; '.join(changed)}); choose another "
                "--out, restore them, or go on all the same with --allow-differences"
            )
        changes = before["changes"] + changed
    write_json_atomic(record, {"conditions": dataclasses.asdict(conditions), "changes": changes})


def changes_on_the_way(record: Path) -> list[str]:
    """What changed between the conditions of the first answers and of the last."""
    return json.loads(record.read_text(encoding="utf-8"))["changes"]


def load_model(path: str, **settings: Any) -> Any:
    """`lmms_model.DcrLlava` of a LLaVA directory."""
    _lmms_eval()
    from dcr_mllm.evaluation.lmms_model import DcrLlava

    return DcrLlava(path, **settings)


@dataclasses.dataclass
class Answers:
    """One model's answers.

    Attributes:
        given: By task, to the rows that were asked, in their order.
        lmms_scores: By task, what lmms-eval itself makes of them, where it can.
        other: Scores of lmms-eval's other tasks.
    """

    given: dict[str, list[str]]
    lmms_scores: dict[str, dict[str, float]]
    other: dict[str, dict[str, float]]


def ask(
    model: Any, tasks: Mapping[str, TaskData], definitions: Path, other: list[str], limit: int | None
) -> Answers | None:
    """One model's answers to every task's rows, through lmms-eval.

    Args:
        model: `lmms_model.DcrLlava`.
        tasks: Benchmarks by name.
        definitions: Folder of their task files.
        other: Tasks of lmms-eval that are passed through.
        limit: Questions of each of these.

    Returns:
        None on all processes but the first.
    """
    from dcr_mllm.evaluation.lmms_tasks import lmms_name, other_task_folders
    from dcr_mllm.evaluation.mllm_tasks import TASKS

    answers = Answers({}, {}, {})
    for task, data in tasks.items():
        name = lmms_name(data.name)
        found = _simple_evaluate(model, [name], str(definitions), predict_only=not TASKS[task].own_score)
        if found is None:
            continue
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        answers.given[task] = [sample["resps"][0][0] for sample in samples]
        if TASKS[task].own_score:
            answers.lmms_scores[task] = _numbers(found["results"][name])
    if other:
        found = _simple_evaluate(model, other, other_task_folders(other), limit=limit)
        if found is not None:
            answers.other = {name: _numbers(scores) for name, scores in found["results"].items()}
    return answers if getattr(model, "rank", 0) == 0 else None


def check_loadable(tasks: list[str]) -> None:
    """Load lmms-eval's own tasks, before any model.

    Raises:
        UserError: Their data are not there.
    """
    from dcr_mllm.evaluation.lmms_tasks import other_task_folders

    _, lmms_tasks = _lmms_eval()
    manager = lmms_tasks.TaskManager("WARNING", include_path=other_task_folders(tasks), include_defaults=False)
    for task in tasks:
        try:
            lmms_tasks.get_task_dict([task], manager)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"lmms-eval cannot load its task {task}: {reason}") from error


def _simple_evaluate(model: Any, tasks: list[str], folders: str | list[str], **settings: Any) -> dict[str, Any] | None:
    evaluator, lmms_tasks = _lmms_eval()
    # Only these folders: lmms-eval's full index takes ten seconds.
    manager = lmms_tasks.TaskManager("WARNING", include_path=folders, include_defaults=False)
    return evaluator.simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
        batch_size=model.batch_size,
        **settings,
    )


def _lmms_eval() -> tuple[Any, Any]:
    """Its evaluator and its tasks. Before our model: its registry looks for that, and would find half a module."""
    from dcr_mllm.evaluation.pillow import kept_strict

    with kept_strict():
        from lmms_eval import evaluator, tasks
    return evaluator, tasks


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """lmms-eval's metrics without its filters' names and its standard errors."""
    return {
        key.split(",")[0]: float(value)
        for key, value in scores.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "stderr" not in key and "," in key
    }
