"""`dcr-mllm plan`: what a run trains, and the memory, time and disk that it takes, before any weights are loaded.

    dcr-mllm plan CONFIG [key=value ...] --gpus 8 --gpu-memory 80

CONFIG is a YAML file or the bare name of a shipped config, of stage 1 or of stage 2. The machine that trains may be
another one than this: only headers and configs are read, and the training step is run on tensors without data.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from dcr_mllm.cli import commands, run_main
from dcr_mllm.config import load_config, read_yaml, resolve_config_path
from dcr_mllm.errors import UserError
from dcr_mllm.launch import Launch, launch_on

GIB = 2**30
USABLE = 0.9
"""Share of a GPU that the estimate may fill: the rest is for CUDA's context, workspaces of cuDNN and cuBLAS, NCCL and
fragmentation, which are not counted."""


STEP = "step: "
"""Before the components that a step adds to what is there between steps."""


class Problem(str):
    """A block of the plan that says that something is missing or does not fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The machine that will train.

    Attributes:
        gpus: Processes, one per GPU; 0 is one process on a CPU.
        gpu_memory: Bytes of one GPU, or None.
        throughput: Images (stage 2: samples) per second of all processes together, or None.
        measure: Measure it on this machine instead.
    """

    gpus: int
    gpu_memory: int | None
    throughput: float | None
    measure: bool

    def launch(self, precision: str, deepspeed: str) -> Launch:
        """How a config would be launched there."""
        return launch_on("cuda" if self.gpus else "cpu", max(1, self.gpus), precision, deepspeed)

    @property
    def usable(self) -> int | None:
        """Bytes that the estimate may fill."""
        return None if self.gpu_memory is None else int(USABLE * self.gpu_memory)


class Stage(Protocol):
    """The module `plan` of a stage."""

    CONFIG: type
    CONFIGS: Path

    def plan(self, config: Any, target: Target) -> Iterator[str]:
        """The blocks of text of the plan, in order, as they become known; among them `Problem`s."""


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code is 1 where the plan has a problem, and 2 where the config is refused."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_main(lambda: _main(arguments))


def _main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dcr-mllm plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file or name of a shipped config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpus", type=int, default=1, help="of the machine that trains (default 1; 0: on its CPU)")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of each of them, as nvidia-smi shows it")
    parser.add_argument("--stage", choices=("1", "2"), help="default: the one whose keys CONFIG has")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument(
        "--throughput", type=float, metavar="N", help="images (stage 2: samples) per second, all GPUs together"
    )
    speed.add_argument("--measure", action="store_true", help="measure it on this machine, with random weights")
    options = parser.parse_intermixed_args(argv)
    for name in ("gpu_memory", "throughput"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, found {getattr(options, name)}")
    if options.gpus < 0:
        raise UserError(f"--gpus must not be negative, found {options.gpus}")
    if options.gpus == 0 and options.gpu_memory is not None:
        raise UserError("--gpu-memory is given with --gpus 0: leave it out, or say how many GPUs there are")
    stage, path = find_stage(options.config, options.overrides, options.stage)
    config: Any = load_config(stage.CONFIG, path, options.overrides)
    target = Target(
        gpus=options.gpus,
        gpu_memory=None if options.gpu_memory is None else int(options.gpu_memory * GIB),
        throughput=options.throughput,
        measure=options.measure,
    )
    problems = 0
    for block in itertools.chain(check_packages(), stage.plan(config, target)):
        problems += isinstance(block, Problem)
        print(f"{'PROBLEM: ' * isinstance(block, Problem)}{block}\n", flush=True)
    if problems:
        print(f"{problems} problem{'s' * (problems > 1)}, see above")
    return 1 if problems else 0


def stages() -> dict[str, Stage]:
    """The module `plan` in the package of every registered command `stageN`, by N."""
    return {
        name.removeprefix("stage"): cast(Stage, importlib.import_module(f"{point.module.partition('.')[0]}.plan"))
        for name, point in commands().items()
        if name.startswith("stage")
    }


def find_stage(config: str, overrides: list[str], stated: str | None) -> tuple[Stage, Path]:
    """The stage that a config belongs to, and its file.

    Args:
        config: Path or bare name.
        overrides: `key=value`, whose keys count too.
        stated: The stage, where the user said it.

    Raises:
        UserError: No such config, or one that fits no stage, or several.
    """
    known = {number: stage for number, stage in stages().items() if stated in (None, number)}
    found, refusals = {}, []
    for number, stage in known.items():
        try:
            path = resolve_config_path(config, stage.CONFIGS)
        except UserError as error:
            refusals.append(str(error))
            continue
        keys = {*read_yaml(path), *(override.partition("=")[0].partition(".")[0] for override in overrides)}
        if stated is not None or keys <= {field.name for field in dataclasses.fields(stage.CONFIG)}:
            found[number] = (stage, path)
        else:
            refusals.append(f"{path} has keys that stage {number} does not know")
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise UserError(f"config {config!r} fits stages {' and '.join(found)}: say which with --stage")
    raise UserError("; ".join(dict.fromkeys(refusals)))


def check_packages() -> list[str]:
    """A problem for every package that is missing or older than this project needs."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    problems: list[str] = []
    for requirement in map(Requirement, requires("dcr-mllm") or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            problems.append(Problem(f"package {requirement.name} is not installed: pip install '{requirement}'"))
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            problems.append(Problem(f"package {requirement.name} is {found}: pip install '{requirement}'"))
    return problems


def disk_block(folder: Path, parts: Mapping[str, int]) -> str:
    """What a run leaves on disk, against what is free where it will lie; a `Problem` if that is not enough."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free, needed = shutil.disk_usage(existing).free, sum(parts.values())
    listed = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
    text = f"disk: {gib(needed)} GiB in {folder} ({listed}); {gib(free)} GiB are free here"
    return Problem(f"{text}: set runs_dir to a larger disk") if needed > free else text


def memory_block(title: str, columns: Mapping[str, Mapping[str, int]]) -> str:
    """Bytes per device by component, a column each for the phases of a run; in MiB where all of them are small."""
    peaks = [sum(column.values()) for column in columns.values()]
    unit, divisor = ("GiB", GIB) if max(peaks) >= GIB else ("MiB", 2**20)
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    names.sort(key=lambda name: name.startswith(STEP))
    shown = [name for name in names if any(column.get(name, 0) >= divisor / 200 for column in columns.values())]
    table = {name: [column.get(name, 0) for column in columns.values()] for name in shown}
    table["peak, with what is too small to show"] = peaks
    width = max(map(len, table))
    lines = [f"{f'{unit} {title}':<{width + 2}}" + "".join(f"{phase:>12}" for phase in columns)]
    for name, sizes in table.items():
        lines.append(f"  {name:<{width}}" + "".join(f"{size / divisor:>12.2f}" for size in sizes))
    return "\n".join(lines)


def fits_block(peak: int, target: Target, advice: str) -> str | None:
    """Whether a peak fits the target's GPUs; None where their memory is not known."""
    if target.usable is None or target.gpu_memory is None:
        return None
    share = f"{peak / target.gpu_memory:.0%} of {gib(target.gpu_memory)} GiB"
    if peak <= target.usable:
        return f"fits: {share}; up to {USABLE:.0%} may be planned, the rest is for what is not counted"
    return Problem(f"does not fit: {share}, and up to {USABLE:.0%} may be planned; {advice}")


def largest_that_fits(peak: Callable[[int], int], highest: int, usable: int) -> int:
    """The largest whole number up to `highest` whose peak fits, 0 if none: few calls for a nearly linear `peak`.

    Args:
        peak: Bytes, not falling; a call takes seconds.
        highest: At least 1.
        usable: Bytes.
    """
    if (top := peak(highest)) <= usable:
        return highest
    if highest == 1 or (bottom := peak(1)) > usable:
        return 0
    low, high = 1, highest  # fits, does not fit
    while high - low > 1:
        guess = low + (usable - bottom) * (high - low) // max(1, top - bottom)
        guess = min(max(guess, low + 1), high - 1)
        found = peak(guess)
        if found <= usable:
            low, bottom = guess, found
        else:
            high, top = guess, found
    return low


def time_block(units: Mapping[str, int], per_second: float | None, what: str, origin: str) -> str:
    """Duration of each phase.

    Args:
        units: Images or samples by phase.
        per_second: All devices together, or None.
        what: `images` or `samples`.
        origin: Where the number comes from.
    """
    if per_second is None:
        return f"time: give --throughput ({what} per second, the log's images_per_second) or --measure"
    times = ", ".join(f"{phase} {duration(count / per_second)}" for phase, count in units.items())
    return f"time at {per_second:.3g} {what} per second ({origin}): {times}"


def fastest(run: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Seconds of the fastest of a few runs on `cuda` or `cpu`; the first one warms up."""
    import torch

    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def duration(seconds: float) -> str:
    """A duration for people, such as `7.7 h`."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def gib(size: int) -> str:
    """Bytes in GiB, with three digits."""
    return f"{size / GIB:.3g}"


if __name__ == "__main__":
    from dcr_mllm import plan  # the module that the stages know, whose classes `__main__` would have a second time

    sys.exit(plan.main())
