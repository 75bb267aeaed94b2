"""Cells as processes: `python -m stage1_dcr`, the tower evaluation, and what is kept of them.

A run goes into `<runs_dir>/<cell>-<digest of its settings>/`, so that other settings never meet in one folder and a
killed run goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock
from typing import Any

from dcr_mllm.errors import UserError
from dcr_mllm.headers import resolve_weights
from dcr_mllm.mini.data import write_benchmarks
from dcr_mllm.runs import FINISHED_FILE, git_state, package_versions, write_json_atomic
from scripts.ablation.grid import CONFIG, Cell, Plan, changed_settings, digest, plan, weights
from scripts.ablation.records import diagnosed, measured, read_record, write_record
from scripts.measuring import machine

REPOSITORY = Path(__file__).resolve().parents[2]
_TIMES = "ablation-time.json"


@dataclasses.dataclass(frozen=True)
class Workshop:
    """Where things are and how they run.

    Attributes:
        out: Records.
        runs_dir: Runs, drawn data and logs.
        split: Of the benchmarks.
        overrides: Of every cell.
        jobs: Cells at a time.
        rerun: Run cells again whose records have other settings.
    """

    out: Path
    runs_dir: Path
    split: str
    overrides: tuple[str, ...]
    jobs: int
    rerun: bool = False
    _locks: dict[str, Lock] = dataclasses.field(default_factory=dict)

    @property
    def threads(self) -> int:
        """Of each process."""
        return max(1, (os.cpu_count() or 1) // self.jobs)

    def only_once(self, run: str) -> Lock:
        """Held by the cell that makes a run which others wait for."""
        return self._locks.setdefault(run, Lock())


class CellFailed(Exception):
    """A command ended badly; the rest of the grid goes on."""


def call(command: Sequence[str], log: Path, threads: int, keep_open: int | None = None) -> None:
    """Runs a command in the repository with its output in a file.

    Args:
        command: Words; the first is the program.
        log: Takes standard output and error, behind what is there.
        threads: For `OMP_NUM_THREADS`.
        keep_open: A file descriptor that the process inherits.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        inherited = () if keep_open is None else (keep_open,)
        done = subprocess.run(
            command, stdout=file, stderr=file, env=environment, cwd=REPOSITORY, check=False, pass_fds=inherited
        )
    if done.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        raise CellFailed(f"{' '.join(command[1:4])} ended with status {done.returncode}, see {log}:\n{tail}")


_held: int | None = None


@contextlib.contextmanager
def alone(runs_dir: Path) -> Iterator[None]:
    """Waits until no other ablation, and no process that a killed one left behind, works in the folder.

    The commands inherit the lock: it is free only when the last of them has ended.
    """
    global _held
    runs_dir.mkdir(parents=True, exist_ok=True)
    with open(runs_dir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting: another ablation, or a process that it left behind, works in {runs_dir}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        _held = file.fileno()
        try:
            yield
        finally:
            _held = None


def held() -> int | None:
    """The lock's descriptor, for processes that are to keep it."""
    return _held


def is_finished(shop: Workshop, name: str, stale: Callable[[dict[str, Any]], list[str]]) -> bool:
    """Whether a record is there, of what would be run now.

    Args:
        stale: Gives what differs between a record and what would be run.

    Raises:
        UserError: It is there, but of other settings, and `rerun` is off.
    """
    file = shop.out / f"{name}.json"
    if not file.is_file():
        return False
    changes = stale(read_record(file))
    if changes and not shop.rerun:
        raise UserError(
            f"{file} has other settings than would be run now ({'; '.join(changes)}); give another --out, or --rerun "
            "to run this cell again."
        )
    return not changes


def stale_cell(shop: Workshop, wanted: Plan, record: Mapping[str, Any]) -> list[str]:
    """What differs between a cell's record and what would be run."""
    changes = changed_settings(record["settings"], wanted.settings)
    for key, now in (("split", shop.split), ("weights", _weights(wanted))):
        changes += [] if record[key] == now else [f"{key}: {record[key]} -> {now}"]
    return changes


def pending(shop: Workshop, cells: Sequence[Cell]) -> list[Cell]:
    """Cells without a record. Raises like `is_finished`."""
    return [
        cell
        for cell in cells
        if not is_finished(shop, cell.name, functools.partial(stale_cell, shop, plan(cell, shop.overrides)))
    ]


def ensure_run(shop: Workshop, name: str, overrides: Sequence[str], program: str = "stage1_dcr") -> dict[str, Any]:
    """Runs a stage unless its folder says that it is finished.

    Returns:
        `started` and `ended` (seconds since 1970) of the process that finished it, and whether it had been `resumed`.
    """
    path = shop.runs_dir / name
    times, done = path / _TIMES, path / FINISHED_FILE
    with shop.only_once(name):
        if not (done.is_file() and times.is_file()):
            resumed, started = path.is_dir(), time.time()
            command = [sys.executable, "-m", program, CONFIG, *overrides, f"run={name}", f"runs_dir={shop.runs_dir}"]
            call(command, shop.runs_dir / "logs" / f"{name}.log", shop.threads, _held)
            if not done.is_file():
                raise CellFailed(f"{name} was stopped before its end; start again to go on")
            write_json_atomic(times, {"started": started, "ended": time.time(), "resumed": resumed})
    return json.loads(times.read_text(encoding="utf-8"))


def ensure_tower(shop: Workshop, cell: Cell, wanted: Plan) -> tuple[Path, dict[str, Any]]:
    """The run of a cell's tower with what its phases took, trained if need be, behind its projector."""
    spent: dict[str, Any] = {"projector": None}
    overrides = list(wanted.tower)
    if wanted.projector is not None:
        run = _projector_run(cell, wanted)
        spent["projector"] = {"run": run, **ensure_run(shop, run, wanted.projector)}
        overrides.append(f"projector={shop.runs_dir / run / 'projector'}")
    run = f"{cell.name}-{digest(wanted.settings)}"
    spent["tower"] = {"run": run, **ensure_run(shop, run, overrides)}
    return shop.runs_dir / run, spent


def run_cell(shop: Workshop, cell: Cell) -> None:
    """Trains and measures a cell, and writes its record."""
    wanted = plan(cell, shop.overrides)
    run, spent = ensure_tower(shop, cell, wanted)
    started = time.time()
    evaluation, base = run / "measured", resolve_weights(_setting(wanted, "tower"), "tower")
    benchmarks = shop.runs_dir / "mini-data" / shop.split
    command = [sys.executable, "-m", "dcr_mllm.evaluation.tower", str(base), str(run / "tower")]
    places = ["--mmvp-vlm", str(benchmarks / "mmvp_vlm"), "--labelled", str(benchmarks / "labelled")]
    call([*command, *places, "--out", str(evaluation)], shop.runs_dir / "logs" / f"{run.name}.log", shop.threads, _held)
    spent["measuring"] = {"started": started, "ended": time.time()}
    found = json.loads((evaluation / "tower_evaluation.json").read_text(encoding="utf-8"))
    looks = run / "diagnostics.jsonl"
    record = {
        "kind": "cell",
        "cell": dataclasses.asdict(cell),
        "split": shop.split,
        "overrides": list(shop.overrides),
        "settings": wanted.settings,
        "weights": _weights(wanted),
        **measured(found),
        "diagnostics": diagnosed(looks.read_text(encoding="utf-8").splitlines()) if looks.is_file() else None,
        "metrics": _last_metrics(run),
        **told(shop, spent),
    }
    write_record(shop.out, cell.name, record)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # the tower stays


def run_cells(shop: Workshop, cells: Sequence[Cell]) -> list[str]:
    """Runs cells without records, projectors first; returns what failed."""
    if not cells:
        return []
    write_benchmarks(shop.runs_dir / "mini-data" / shop.split, shop.split)
    projectors: dict[str, Plan] = {}
    for cell in cells:
        wanted = plan(cell, shop.overrides)
        if wanted.projector is not None:
            projectors.setdefault(_projector_run(cell, wanted), wanted)
    tasks = {run: functools.partial(ensure_run, shop, run, wanted.projector) for run, wanted in projectors.items()}
    tasks |= {cell.name: functools.partial(run_cell, shop, cell) for cell in cells}
    return in_parallel(shop.jobs, tasks)


def in_parallel(jobs: int, tasks: Mapping[str, Callable[[], Any]]) -> list[str]:
    """Runs tasks by name in their order, some at a time; returns a line for each that failed."""
    failed, done = [], 0
    with ThreadPoolExecutor(jobs) as pool:
        started = time.perf_counter()
        futures = {pool.submit(task): name for name, task in tasks.items()}
        try:
            for future in as_completed(futures):
                done += 1
                problem = future.exception()
                if isinstance(problem, CellFailed | UserError):
                    failed.append(f"{futures[future]}: {problem}")
                elif problem is not None:
                    raise problem
                minutes = (time.perf_counter() - started) / 60
                word = "FAILED" if problem else "done"
                print(f"[{done}/{len(tasks)}] {futures[future]} {word} after {minutes:.1f} min", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def told(shop: Workshop, spent: Mapping[str, Any]) -> dict[str, Any]:
    """Time, place and versions for a record."""
    return {
        "spent": spent,
        "device": f"{device()}, {shop.threads} thread{'s' if shop.threads > 1 else ''} a cell, {shop.jobs} at a time",
        "packages": {name: version for name, version in package_versions().items() if version is not None},
        "git": git_state(),
    }


@functools.cache
def device() -> str:
    """The accelerator, or the processor, that cells run on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {machine()['processor']}"


def _projector_run(cell: Cell, wanted: Plan) -> str:
    settings = wanted.settings["projector"]
    assert settings is not None
    return f"projector-{settings['projector_objective']}-seed{cell.seed}-{digest(settings)}"


def _setting(wanted: Plan, key: str) -> Any:
    settings = wanted.settings["tower"]
    assert settings is not None
    return settings[key]


def _weights(wanted: Plan) -> dict[str, str]:
    return weights(_setting(wanted, "tower"), _setting(wanted, "denoiser"))


def _last_metrics(run: Path) -> dict[str, Any] | None:
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return json.loads(lines[-1]) if lines else None
