"""`python eval/run.py --tasks mmvp [--models A B ...]`: ask LLaVAs a benchmark's questions, score and compare them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcr_mllm.cli import run_main
from dcr_mllm.errors import UserError
from dcr_mllm.runs import write_json_atomic, write_text_atomic

if TYPE_CHECKING:
    from dcr_mllm.evaluation.mllm_tasks import TaskData
    from dcr_mllm.evaluation.scored import Scored

RESULTS_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What an evaluation depends on; the same command goes on with it or prints its results.

    Attributes:
        run: Name of the folder of results.
        tasks: Benchmarks.
        models: LLaVA directories by name, the baseline first.
        model_hashes: Of what is in them.
        data: Where the benchmarks are.
        limit: Questions per task.
        batch_size: Questions that are decoded together.
        device: Where the models run.
    """

    run: str
    tasks: list[str]
    models: dict[str, str]
    model_hashes: dict[str, str]
    data: str
    limit: int | None
    batch_size: int
    device: str


_LAST_RUN = Path("runs/mini/stage2")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="eval/run.py",
        description="Compare LLaVAs on multimodal benchmarks: official scores, paired statistics, a verdict.",
    )
    parser.add_argument("--tasks", required=True, help="benchmarks, separated by commas: mmvp, pope")
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="LLAVA",
        help=f"LLaVA directories, the first is the baseline (default: {_LAST_RUN}/baseline and enhanced)",
    )
    parser.add_argument(
        "--data",
        default="auto",
        metavar="auto|mini|DIR",
        help="mini: the drawn benchmarks; DIR: a folder that holds <task>/ in its public layout; auto: mini for LLaVAs "
        "that were trained on the miniature",
    )
    parser.add_argument("--limit", type=int, help="only so many questions per task; whole pairs are kept")
    parser.add_argument("--batch-size", type=int, default=32, help="questions that are decoded together")
    parser.add_argument("--out", type=Path, default=Path("runs/eval"), help="folder of the results")
    options = parser.parse_args(argv)

    def call() -> None:
        from dcr_mllm.evaluation.mllm_tasks import check_tasks

        tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
        check_tasks(tasks)
        if (options.limit is not None and options.limit < 1) or options.batch_size < 1:
            raise UserError("--limit and --batch-size have to be at least 1")
        models = _models(options.models)
        data = _data(options.data, models)
        import torch

        from dcr_mllm.runs import hash_directory, open_run

        config = EvalConfig(
            run=options.out.name,
            tasks=tasks,
            models={name: str(path) for name, path in models.items()},
            model_hashes={name: hash_directory(path) for name, path in models.items()},
            data=data,
            limit=options.limit,
            batch_size=options.batch_size,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        option = f"--out {options.out.parent}/"
        run = open_run(options.out.parent, config, option=option, create=False)
        if run.state == "finished":
            print(f"{options.out} is finished; for another evaluation choose another --out")
            results = json.loads((options.out / "results.json").read_text(encoding="utf-8"))
        else:
            loaded = load_tasks(config)  # before the folder is made: missing data are a mistake of the user
            run = open_run(options.out.parent, config, option=option)
            results = evaluate(config, loaded, options.out)
            write_json_atomic(options.out / "results.json", results)
            run.finish({})
        print(format_results(results))
        print(f"\nreport: {options.out / 'report.html'}, numbers: {options.out / 'results.json'}")

    return run_main(call)


def _models(paths: list[str] | None) -> dict[str, Path]:
    """LLaVA directories by name, all checked from their headers."""
    from dcr_mllm.headers import resolve_weights
    from dcr_mllm.llava_headers import llava_summary

    if paths is None:
        paths = [str(_LAST_RUN / arm / "llava") for arm in ("baseline", "enhanced")]
        if not all(Path(path).is_dir() for path in paths):
            raise UserError(f"{_LAST_RUN} has no finished LLaVAs; run bash scripts/stage2_llava.sh, or name --models")
        print(f"models: {' '.join(paths)}")
    models: dict[str, Path] = {}
    for value in paths:
        path = llava_summary(resolve_weights(value, "llava")).path
        name = path.parent.name if path.name == "llava" else path.name
        models[name if name not in models else f"{name}-{len(models) + 1}"] = path
    return models


def _data(value: str, models: dict[str, Path]) -> str:
    """Which data `auto` means: the drawn ones for what was trained on drawn ones."""
    from dcr_mllm.evaluation.mllm_tasks import MINI

    if value != "auto":
        return value
    drawn = {name: _trained_on_mini(path) for name, path in models.items()}
    if all(drawn.values()):
        return MINI
    if any(drawn.values()):
        raise UserError("some of the LLaVAs were trained on the miniature and some not; say --data mini or --data DIR")
    raise UserError("say where the benchmarks are: --data DIR with a folder for each task, or --data mini")


def _trained_on_mini(path: Path) -> bool:
    from dcr_mllm.headers import read_json

    record = path / "provenance.json"
    if not record.is_file():
        return False
    config = read_json(record).get("config", {})
    return config.get("instruct", {}).get("data") == "mini"


def load_tasks(config: EvalConfig) -> dict[str, TaskData]:
    """The rows of every task, as many as the limit allows."""
    from dcr_mllm.evaluation.mllm_tasks import TASKS, load_task

    loaded = {name: load_task(name, config.data, Path("runs")) for name in config.tasks}
    for name, found in loaded.items():
        if config.limit is not None and config.limit < len(found.rows):
            unit = TASKS[name].unit_size
            kept = max(unit, config.limit - config.limit % unit)
            said = ", whole pairs" if kept != config.limit else ""
            print(f"{found.name}: {kept} of {len(found.rows)} questions{said}")
            loaded[name] = found._replace(rows=found.rows[:kept])
    return loaded


def evaluate(config: EvalConfig, loaded: dict[str, TaskData], out: Path) -> dict[str, Any]:
    """Ask every model every question, score the raw answers, compare each model with the first.

    Args:
        config: What is evaluated.
        loaded: Rows by task.
        out: Folder of answers; those of a killed run are not asked for again.

    Returns:
        Scores per model, and per model but the first its comparisons; `report.html` shows them.
    """
    from dcr_mllm.evaluation.mllm_tasks import TASKS, write_lmms_task
    from dcr_mllm.evaluation.report import write_report
    from dcr_mllm.evaluation.verdicts import add_verdicts, compare_task
    from dcr_mllm.runs import atomic_directory, package_versions

    definitions = out / "tasks"
    with atomic_directory(definitions, replace=True) as temporary:
        for name, found in loaded.items():
            write_lmms_task(name, found, temporary, definitions)
    scored: dict[str, dict[str, Scored]] = {}
    items: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for model, path in config.models.items():
        raw = out / "raw" / f"{model}.jsonl"
        raw.parent.mkdir(exist_ok=True)
        answers = ask(config, path, loaded, definitions, raw)
        items[model], scored[model] = {}, {}
        for name, found in loaded.items():
            answered = [TASKS[name].item(row, answer) for row, answer in zip(found.rows, answers[name], strict=True)]
            items[model][found.name], scored[model][found.name] = answered, found.score(answered)
            _write_answers(out / "answers" / model / f"{found.name}.jsonl", answered, scored[model][found.name])
    first, *others = config.models
    comparisons = {}
    for model in others:
        comparisons[model] = {task: compare_task(scored[first][task], scored[model][task]) for task in scored[model]}
        add_verdicts(comparisons[model])
    results = {
        "version": RESULTS_VERSION,
        "config": dataclasses.asdict(config),
        "decoding": "greedy",
        "scores": {
            model: {
                task: {"measures": entry.values(), "questions": len(entry.right), "unparsable": len(entry.unparsable)}
                for task, entry in entries.items()
            }
            for model, entries in scored.items()
        },
        "comparisons": comparisons,
        "packages": package_versions(),
    }
    write_report(results, loaded, items, scored, out / "report.html")
    return results


def ask(
    config: EvalConfig, path: str, tasks: dict[str, TaskData], definitions: Path, raw: Path
) -> dict[str, list[str]]:
    """One model's raw answers to every task's rows, in their order, through lmms-eval.

    Args:
        config: Batch size and device.
        path: LLaVA directory.
        tasks: `mllm_tasks.TaskData` by name.
        definitions: Folder of their task files.
        raw: Where answers are kept as they come.
    """
    from dcr_mllm.evaluation.pillow import kept_strict

    with kept_strict():
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager

    from dcr_mllm.evaluation.lmms_model import DcrLlava
    from dcr_mllm.evaluation.mllm_tasks import lmms_name

    names = {task: lmms_name(found.name) for task, found in tasks.items()}
    # Only these: lmms-eval's full index takes ten seconds.
    manager = TaskManager("WARNING", include_path=str(definitions), include_defaults=False)
    found = simple_evaluate(
        model=DcrLlava(path, batch_size=config.batch_size, device=config.device, answers=raw),
        tasks=list(names.values()),
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
        batch_size=config.batch_size,
    )
    answers = {}
    for task, name in names.items():
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        answers[task] = [sample["resps"][0][0] for sample in samples]
    return answers


def _write_answers(path: Path, items: list[dict[str, Any]], scored: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unparsable = set(scored.unparsable)
    lines = [
        json.dumps({**item, "right": bool(right), "unparsable": k in unparsable})
        for k, (item, right) in enumerate(zip(items, scored.right, strict=True))
    ]
    write_text_atomic(path, "\n".join(lines) + "\n")


def format_results(results: dict[str, Any]) -> str:
    """The results as text: verdicts first, then every measure."""
    first = next(iter(results["config"]["models"]))
    lines = []
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
        lines.append("one training run each: training variance not measured")
    for task in results["scores"][first]:
        lines += ["", f"{task:<28}" + "".join(f"{model:>12}" for model in results["config"]["models"])]
        for name in results["scores"][first][task]["measures"]:
            cells = [results["scores"][model][task]["measures"][name] for model in results["config"]["models"]]
            lines.append(f"  {name:<26}" + "".join(f"{value:>12.1f}" for value in cells))
        for name in ("questions", "unparsable"):
            cells = [results["scores"][model][task][name] for model in results["config"]["models"]]
            lines.append(f"  {name:<26}" + "".join(f"{value:>12}" for value in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
