"""How a command is launched: one process, or `torchrun` over all visible GPUs, or NPROC processes on the CPU.

MAX_RESTARTS lets `torchrun` start the processes again, from the last checkpoint, when one of them has died.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dcr_mllm.errors import UserError
from dcr_mllm.headers import read_json
from dcr_mllm.log import get_logger

logger = get_logger(__name__)

# What every launcher sets for each of its processes.
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_RENDEZVOUS = (*_LAUNCHED, "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_ANNOUNCED = "DCR_MLLM_ANNOUNCED"
DEEPSPEED_DIR = Path(__file__).parent / "deepspeed"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What was decided.

    Attributes:
        device: `cuda` or `cpu`.
        num_processes: Processes in all.
        precision: `bf16` or `fp32`.
        deepspeed: Path of the DeepSpeed JSON, or None.
    """

    device: Literal["cuda", "cpu"]
    num_processes: int
    precision: Literal["bf16", "fp32"]
    deepspeed: Path | None

    def describe(self, batch_size: int, accumulation: int) -> str:
        """One line for the person who started the run."""
        zero = self.deepspeed.stem if self.deepspeed else "no DeepSpeed"
        effective = batch_size * accumulation * self.num_processes
        return (
            f"{self.num_processes} process{'es' if self.num_processes > 1 else ''} on {self.device}, {self.precision}, "
            f"{zero}, effective batch {effective} = {batch_size} x {accumulation} accumulation x {self.num_processes}"
        )


def is_child() -> bool:
    """Whether a launcher (torchrun, deepspeed) has started this process."""
    return all(name in os.environ for name in _LAUNCHED)


def forget_other_launches() -> None:
    """Drop what an earlier launch, or a scheduler, has left in the environment of a process that nobody launched.

    A RANK, a MASTER_ADDR or a default for torchrun (PET_NNODES) that belongs to something else would have this process
    wait for others that never come.
    """
    if is_child():
        return
    left = [name for name in os.environ if name in _RENDEZVOUS or name.startswith(("PET_", "TORCHELASTIC_"))]
    for name in sorted(left):
        del os.environ[name]
    if left:
        logger.warning("no launcher has started this process, so these variables are ignored: %s", ", ".join(left))


def announces() -> bool:
    """Whether this process says what was decided: the one that a person started, or rank 0 of their own torchrun."""
    return not is_child() or (_ANNOUNCED not in os.environ and os.environ.get("RANK", "0") == "0")


def num_processes_wanted() -> int:
    """`WORLD_SIZE` under a launcher, else `NPROC`, else the number of visible GPUs, at least 1."""
    name = "WORLD_SIZE" if is_child() else "NPROC"
    if name in os.environ:
        return _number(name, "processes", least=1)
    import torch

    return max(1, torch.cuda.device_count())


def _number(name: str, of: str, *, least: int) -> int:
    value = os.environ[name]
    if not value.isdigit() or int(value) < least:
        raise UserError(f"{name} must be a number of {of}, at least {least}, found {value!r}.")
    return int(value)


def decide(precision: str, deepspeed: str) -> Launch:
    """Devices, processes, precision and ZeRO stage for a config.

    Args:
        precision: `auto`, `fp32` or `bf16`.
        deepspeed: `auto`, `none`, the name of a shipped file, or the path of a JSON file.

    Raises:
        UserError: As `deepspeed_file` does.
    """
    import torch

    forget_other_launches()
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        # Otherwise DeepSpeed, which libraries import by themselves, warns that it has to guess.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return launch_on(device, num_processes_wanted(), precision, deepspeed)


def launch_on(device: Literal["cuda", "cpu"], count: int, precision: str, deepspeed: str) -> Launch:
    """Precision and ZeRO stage for `count` processes on such devices; the rest is as for `decide`."""
    chosen: Literal["bf16", "fp32"] = (
        "bf16" if precision == "bf16" or (precision == "auto" and device == "cuda") else "fp32"
    )
    if deepspeed == "auto":
        deepspeed = "zero2" if count > 1 else "none"
    file = deepspeed_file(deepspeed)
    return Launch(device=device, num_processes=count, precision=chosen, deepspeed=file)


def deepspeed_file(value: str) -> Path | None:
    """The JSON file behind a `deepspeed` setting: a shipped name or a path; None for `auto` and `none`.

    Raises:
        UserError: No such file, or one that leaves gradients unclipped.
    """
    if value in ("auto", "none"):
        return None
    names = sorted(path.stem for path in DEEPSPEED_DIR.glob("*.json"))
    path = DEEPSPEED_DIR / f"{value}.json" if value in names else Path(value).expanduser()
    if not path.is_file():
        raise UserError(f"deepspeed is {value!r}, expected auto, none, {', '.join(names)} or the path of a JSON file")
    # Without the key DeepSpeed does not clip, whatever max_grad_norm says: the Trainer leaves clipping to it.
    if "gradient_clipping" not in read_json(path):
        raise UserError(
            f'{path} does not state gradient_clipping, so nothing would be clipped; add "gradient_clipping": 1.0'
        )
    return path


def zero_stage(file: Path) -> tuple[int, dict]:
    """Stage and settings of a DeepSpeed JSON."""
    settings = read_json(file).get("zero_optimization") or {}
    return int(settings.get("stage", 0)), settings


def start_processes(num_processes: int, module: str, argv: list[str]) -> None:
    """Replace this process by `torchrun --standalone` with the same command; returns only if one process is enough.

    It is `dcr_mllm.torchrun`, which ends with 0 when its processes have saved and stopped as they were told.
    """
    if num_processes == 1 or is_child():
        return
    restarts = _number("MAX_RESTARTS", "restarts", least=0) if "MAX_RESTARTS" in os.environ else 0
    command = [sys.executable, "-m", "dcr_mllm.torchrun", "--standalone", f"--nproc-per-node={num_processes}"]
    command.append(f"--max-restarts={restarts}")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    os.environ[_ANNOUNCED] = "1"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*command, "-m", module, *argv])


def use_single_process_environment() -> None:
    """DeepSpeed with one process and no launcher still wants rendezvous variables."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        import socket

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
