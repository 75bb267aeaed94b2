"""`python eval/run.py --tasks mmvp,pope [--models A B ...]`: ask LLaVAs a benchmark's questions, score, compare."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dcr_mllm.cli import run_main
from dcr_mllm.errors import UserError
from dcr_mllm.log import rank
from dcr_mllm.runs import write_json_atomic


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What an evaluation depends on; the same command goes on with it or prints its results.

    Attributes:
        run: Name of the folder of results.
        tasks: Benchmarks.
        models: Directories by name; training runs of one model are beside each other, the baseline's first.
        groups: Names of the training runs of each model.
        model_hashes: Of what is in the directories.
        data: Where the benchmarks are.
        limit: Questions per task.
        batch_size: Questions that are decoded together.
        scoring: Answers generated, or chosen by likelihood.
        device: Where the models run.
    """

    run: str
    tasks: list[str]
    models: dict[str, str]
    groups: dict[str, list[str]]
    model_hashes: dict[str, str]
    data: str
    limit: int | None
    batch_size: int
    scoring: str
    device: str


_LAST_RUN = Path("runs/mini/stage2")


def build_parser() -> argparse.ArgumentParser:
    """The command's options; importing nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="eval/run.py",
        description="Compare LLaVAs on multimodal benchmarks, and the towers in them on tower benchmarks: official "
        "scores, paired statistics, a verdict. Start it with torchrun to use several GPUs.",
    )
    parser.add_argument(
        "--tasks",
        required=True,
        help="separated by commas: mmvp, pope, cv_bench, naturalbench, mme, scienceqa_img, hallusion_bench_image; of "
        "towers mmvp_vlm, zero_shot, clustering, retrieval, linear_probe; any other task of lmms-eval is passed "
        "through",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help="LLaVA directories or hub ids, or towers for tower tasks; the first is the baseline. NAME=A1,A2 are "
        f"training runs of one model (default: {_LAST_RUN}/baseline and enhanced)",
    )
    parser.add_argument(
        "--data",
        default="auto",
        metavar="auto|hub|mini|DIR",
        help="mini: the drawn benchmarks; hub: what is in the hub cache; DIR: a folder that holds <task>/, a copy of "
        "the hub repository or the public files; auto: mini for LLaVAs that were trained on the miniature, else hub",
    )
    parser.add_argument("--limit", type=int, help="only so many questions per task; whole pairs and groups are kept")
    parser.add_argument("--batch-size", type=int, default=32, help="questions that are decoded together (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/eval"), help="folder of the results (%(default)s)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="a killed run goes on anyway; with this, one that is not there is an error",
    )
    parser.add_argument(
        "--scoring",
        choices=("generation", "likelihood"),
        default="generation",
        help="likelihood: choose among the options by their log-probability (%(default)s)",
    )
    parser.add_argument(
        "--allow-differences",
        action="store_true",
        help="compare models that were asked under different conditions, and say which",
    )
    parser.add_argument("--dry-run", action="store_true", help="check models and data, say what would be asked, stop")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = build_parser().parse_args(argv)
    return run_main(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    from dcr_mllm.evaluation.results import (
        RESULTS_VERSION,
        TaskNames,
        evaluate,
        format_results,
        load_tasks,
        what_is_asked,
    )

    tasks = TaskNames.sorted_out([name.strip() for name in options.tasks.split(",") if name.strip()])
    if (options.limit is not None and options.limit < 1) or options.batch_size < 1:
        raise UserError("--limit and --batch-size have to be at least 1")
    groups = _models(options.models, towers=not (tasks.mllm or tasks.other))
    models = {name: path for members in groups.values() for name, path in members.items()}
    data = _data(options.data, models)
    import torch

    from dcr_mllm.runs import hash_directory, open_run

    config = EvalConfig(
        run=options.out.name,
        tasks=tasks.all,
        models={name: str(path) for name, path in models.items()},
        groups={name: list(members) for name, members in groups.items()},
        model_hashes={name: hash_directory(path) for name, path in models.items()},
        data=data,
        limit=options.limit,
        batch_size=options.batch_size,
        scoring=options.scoring,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    option = f"--out {options.out.parent}/"
    # Finished results can be printed anywhere; unfinished ones are asked on one kind of device, see `asking`.
    run = open_run(options.out.parent, config, option=option, create=False, ignore=("device",))
    if options.resume and run.state == "new":
        raise UserError(f"--resume: there is no evaluation in {options.out}; leave --resume out to start one")
    if options.dry_run and run.state != "finished":
        loaded = load_tasks(config, tasks)
        print("\n".join([f"models: {', '.join(models)}", *what_is_asked(loaded, tasks.other)]))
        print(f"results would go to {options.out} ({run.state})")
        return
    if run.state == "finished":
        print(f"{options.out} is finished; for another evaluation choose another --out")
        results = read_results(options.out / "results.json", RESULTS_VERSION)
    else:
        loaded = load_tasks(config, tasks)  # before the folder is made: missing data are a mistake of the user
        first_process = rank() == 0
        run = open_run(options.out.parent, config, option=option, create=first_process, ignore=("device",))
        with _alone(options.out) if first_process else contextlib.nullcontext():
            found = evaluate(config, tasks, loaded, options.out, allow_differences=options.allow_differences)
        if found is None:
            return
        results = found
        write_json_atomic(options.out / "results.json", results)
        run.finish({})
    print(format_results(results))
    print(f"\nreport: {options.out / 'report.html'} and report.md, numbers: {options.out / 'results.json'}")


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Two evaluations into one folder would tear each other's files."""
    from filelock import FileLock, Timeout

    lock = FileLock(out / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"another evaluation is at work in {out}; wait for it, or choose another --out") from None
    try:
        yield
    finally:
        lock.release()


def read_results(path: Path, version: int) -> dict[str, Any]:
    """A finished evaluation's results.

    Raises:
        UserError: They were written by a version of this program that counted or named things differently.
    """
    results = json.loads(path.read_text(encoding="utf-8"))
    if results.get("version") != version:
        raise UserError(
            f"{path} has version {results.get('version')} of the results, and this program writes version {version}; "
            "evaluate again into another --out"
        )
    return results


def _models(values: list[str] | None, *, towers: bool) -> dict[str, dict[str, Path]]:
    """By model the directories of its training runs, all checked from their headers."""
    if values is None:
        values = [str(_LAST_RUN / arm / "llava") for arm in ("baseline", "enhanced")]
        if not all(Path(path).is_dir() for path in values):
            raise UserError(f"{_LAST_RUN} has no finished LLaVAs; run bash scripts/stage2_llava.sh, or name --models")
        print(f"models: {' '.join(values)}")
    groups: dict[str, dict[str, Path]] = {}
    for value in values:
        match = None if Path(value).exists() else re.fullmatch(r"(\w[\w.+-]*)=(.+)", value)
        given = match[2].split(",") if match else [value]
        taken = {name for group, members in groups.items() for name in (group, *members)}
        name = match[1] if match else _free_name(_short_name(value), taken)
        runs = [name] if len(given) == 1 else [f"{name}-{number}" for number in range(1, len(given) + 1)]
        clash = {name, *runs} & taken
        if clash:
            raise UserError(f"--models: {min(clash)} is named twice; each model needs a name of its own, NAME=A1,A2")
        groups[name] = {run: _checked(path, towers) for run, path in zip(runs, given, strict=True)}
    return groups


def _checked(value: str, towers: bool) -> Path:
    from dcr_mllm.headers import read_json, resolve_weights, tower_summary
    from dcr_mllm.llava_headers import llava_summary

    if not towers:
        return llava_summary(resolve_weights(value, "llava")).path
    directory = resolve_weights(value, "tower")
    if (directory / "config.json").is_file() and read_json(directory / "config.json").get("model_type") == "llava":
        return llava_summary(directory).path
    return tower_summary(directory).path


def _short_name(value: str) -> str:
    """Of a run's `llava` or `tower` folder the run's name, else the last part of a path or hub id."""
    path = Path(value).resolve() if Path(value).exists() else Path(value)
    return path.parent.name if path.name in ("llava", "tower") else path.name


def _free_name(name: str, taken: set[str]) -> str:
    numbers = itertools.count(2)
    free = name
    while free in taken:
        free = f"{name}-{next(numbers)}"
    return free


def _data(value: str, models: dict[str, Path]) -> str:
    """Which data `auto` means: the drawn ones for what was trained on drawn ones."""
    from dcr_mllm.evaluation.mllm_data import HUB, MINI

    if value != "auto":
        return value
    drawn = {name: _trained_on_mini(path) for name, path in models.items()}
    if all(drawn.values()):
        return MINI
    if any(drawn.values()):
        some = next(name for name, is_drawn in drawn.items() if is_drawn)
        raise UserError(
            f"{some} was trained on the miniature and others were not; say --data mini, --data hub or --data DIR"
        )
    return HUB


def _trained_on_mini(path: Path) -> bool:
    """Whether a LLaVA's instructions, or a tower's images, were drawn."""
    from dcr_mllm.headers import read_json, resolve_weights

    if path == resolve_weights("mini", "tower"):
        return True
    record = path / "provenance.json"
    if not record.is_file():
        return False
    config = read_json(record).get("config", {})
    return config.get("instruct", {}).get("data") == "mini" or config.get("data") == "mini"


if __name__ == "__main__":
    sys.exit(main())
