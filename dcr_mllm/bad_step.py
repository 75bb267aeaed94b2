"""A step whose loss is not finite, kept on disk so that it can be computed again.

bad-step-N/
  step.json            phase, step, processes, precision, and the loss of every micro-step on every rank
  config.yaml          of the run
  model.safetensors    what trains, as it was before the step
  rank0.safetensors    that rank's inputs and random state, micro-step by micro-step; one file for each rank
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dcr_mllm.errors import UserError
from dcr_mllm.runs import write_json_atomic, write_text_atomic

STEP_FILE, WEIGHTS_FILE, CONFIG_FILE = "step.json", "model.safetensors", "config.yaml"


@dataclass(frozen=True, kw_only=True)
class MicroStep:
    """What a forward pass depends on besides the weights.

    Attributes:
        inputs: On the host, as the loader gave them.
        random: State of the host's generator, and of the device's where there is one.
    """

    inputs: dict[str, Tensor]
    random: dict[str, Tensor]

    @classmethod
    def now(cls, inputs: dict[str, Tensor]) -> MicroStep:
        """With the present random state; neither copies the inputs nor waits for the device."""
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        return cls(inputs=inputs, random=random)

    def restore_random(self) -> None:
        """Put the generators where they were; a state of a device that is not there is left out."""
        torch.set_rng_state(self.random["cpu"])
        if "cuda" in self.random and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.random["cuda"])


def write_rank(directory: Path, rank: int, steps: Sequence[MicroStep]) -> None:
    """A rank's part."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for index, step in enumerate(steps):
        tensors.update(
            {f"{index}.inputs.{name}": value.cpu().contiguous().clone() for name, value in step.inputs.items()}
        )
        tensors.update({f"{index}.random.{name}": value for name, value in step.random.items()})
    safetensors.torch.save_file(tensors, directory / f"rank{rank}.safetensors")


def write_step(directory: Path, *, config: str, weights: dict[str, Tensor], losses: Tensor, **facts: Any) -> None:
    """Everything else; the main process calls it when all parts are written.

    Args:
        directory: Of the step.
        config: YAML of the run.
        weights: What trains, before the step.
        losses: [ranks, micro-steps].
        facts: For `step.json`.
    """
    safetensors.torch.save_file(weights, directory / WEIGHTS_FILE)
    write_text_atomic(directory / CONFIG_FILE, config)
    record = {
        **facts,
        "weights_finite": all(bool(value.isfinite().all()) for value in weights.values()),
        # As text where JSON has no number.
        "losses": [[x if math.isfinite(x) else str(x) for x in row] for row in losses.tolist()],
        "elastic_run": elastic_run(),
    }
    write_json_atomic(directory / STEP_FILE, record)


def read_step(directory: Path) -> dict[str, Any]:
    """`step.json`, its losses as numbers.

    Raises:
        UserError: There is none.
    """
    try:
        record = json.loads((directory / STEP_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory} holds no {STEP_FILE}; give the bad-step-N folder of a run") from None
    record["losses"] = [[float(x) for x in row] for row in record["losses"]]
    return record


def read_rank(directory: Path, rank: int) -> list[MicroStep]:
    """A rank's micro-steps."""
    tensors = safetensors.torch.load_file(directory / f"rank{rank}.safetensors")
    steps: dict[int, dict[str, dict[str, Tensor]]] = {}
    for name, value in tensors.items():
        index, part, key = name.split(".", 2)
        steps.setdefault(int(index), {"inputs": {}, "random": {}})[part][key] = value
    return [MicroStep(**steps[index]) for index in sorted(steps)]


def compute_again(
    directory: Path, loss_of: Callable[[list[MicroStep], int], float], *, rank: int | None, where: str
) -> int:
    """Print the losses of a step as they were and as they come out now.

    Args:
        directory: Of the step.
        loss_of: The loss of a rank, from the same micro-step of all ranks and the rank's number.
        rank: Whose losses; None: all that were not finite.
        where: What computes, for the heading.

    Returns:
        0 if some loss is not finite again, else 1: an exit status.

    Raises:
        UserError: There is no such rank.
    """
    record = read_step(directory)
    chosen = [
        (r, index, then)
        for r, losses in enumerate(record["losses"])
        for index, then in enumerate(losses)
        if (r == rank if rank is not None else not math.isfinite(then))
    ]
    if not chosen:
        raise UserError(f"{directory} has no rank {rank}, expected 0 to {record['num_processes'] - 1}")
    if not record["weights_finite"]:
        print("the weights were not finite before this step: a gradient of an earlier one overflowed")
    ranks = [read_rank(directory, r) for r in range(record["num_processes"])]
    again = False
    print(f"{'rank':>4} {'micro-step':>10} {'loss then':>12} {'loss now':>12}  on {where}, {record['precision']}")
    for r, index, then in chosen:
        micro_steps = [steps[index] for steps in ranks]
        now = loss_of(micro_steps, r)
        again |= not math.isfinite(now)
        bad = [name for name, value in micro_steps[r].inputs.items() if not value.float().isfinite().all()]
        note = f"  not finite in the inputs: {', '.join(bad)}" if bad else ""
        print(f"{r:>4} {index:>10} {then:>12.6g} {now:>12.6g}{note}")
    return 0 if again else 1


def precision(record: dict[str, Any], device: str) -> torch.autocast:
    """A context in which things are computed as the Trainer does: autocast, where DeepSpeed has not cast the module."""
    return torch.autocast(device, torch.bfloat16, enabled=record["precision"] == "bf16" and not record["deepspeed"])


def parse_replay(argv: list[str] | None, *, prog: str, description: str) -> argparse.Namespace:
    """`directory`, `rank` and `device` of a command that computes a step again."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="bad-step-N folder of a run")
    parser.add_argument("--rank", type=int, help="compute this rank's losses; default: those that were not finite")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default, help="default: cuda where there is one")
    return parser.parse_args(argv)


def elastic_run() -> str | None:
    """Identity of the launch that restarts this process, if one does."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def refuse_to_repeat(folder: Path) -> None:
    """A launcher that restarts what failed would run into the same step again and again.

    Raises:
        UserError: This process was restarted by the launch that has found a bad step.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return
    for file in sorted(folder.glob(f"bad-step-*/{STEP_FILE}")):
        if read_step(file.parent)["elastic_run"] == elastic_run():
            raise UserError(f"restarted after a loss that was not finite, see {file.parent}: not trying again.")
