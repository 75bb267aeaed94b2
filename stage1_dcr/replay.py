"""Compute a step of stage 1 again whose loss was not finite.

    python -m stage1_dcr.replay RUNS_DIR/RUN/bad-step-N [--rank R] [--device cpu]

The weights, inputs and random state of the step come from the folder, frozen models from where the run's config.yaml
names them, and for the tower phase the projector from the run that the folder lies in. One process is enough, also for
a run of many. Exit status 0: the loss is not finite here either; 1: it is, so look at the device or the software.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcr_mllm.bad_step import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    MicroStep,
    compute_again,
    parse_replay,
    precision,
    read_step,
)
from dcr_mllm.cli import run_main
from dcr_mllm.config import load_config
from dcr_mllm.errors import UserError
from dcr_mllm.launch import Launch
from stage1_dcr.config import Stage1Config
from stage1_dcr.step import TrainingStep


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse_replay(argv, prog="python -m stage1_dcr.replay", description=__doc__ or "")
    return run_main(lambda: replay(options.directory, rank=options.rank, device=options.device))


def replay(directory: Path, *, rank: int | None, device: str) -> int:
    """Print the losses of a step as they were and as they come out now; see `dcr_mllm.bad_step.compute_again`."""
    record = read_step(directory)
    module = build(directory, record, device)
    with precision(record, device):
        return compute_again(directory, lambda steps, r: loss_of(module, steps, r, device), rank=rank, where=device)


def build(directory: Path, record: dict[str, Any], device: str) -> TrainingStep:
    """The module of the phase with its weights before the step."""
    from safetensors.torch import load_file

    from dcr_mllm.trainer import keep_trainable_only
    from stage1_dcr.projector import Projector
    from stage1_dcr.train import Stage1, prepare

    config = load_config(Stage1Config, directory / CONFIG_FILE, [])
    launch = Launch(
        device="cuda" if device == "cuda" else "cpu", num_processes=1, precision=record["precision"], deepspeed=None
    )
    stage = Stage1(config, launch)
    projector = stage.new_projector()
    if record["phase"] == "tower" and config.steps_of("projector") > 0:
        trained = directory.parent / "projector"
        if not trained.is_dir():
            raise UserError(f"{trained} does not exist; put {directory.name} back into its run's directory")
        projector = Projector.load(trained)
    module = prepare(stage, record["phase"], projector)
    keep_trainable_only(module)
    module.load_state_dict(load_file(directory / WEIGHTS_FILE))
    module.to(device)
    if record["deepspeed"] and record["precision"] == "bf16":
        module.to(torch.bfloat16)  # as DeepSpeed trains it
    module.move_frozen(torch.device(device), stage.dtype)
    return module.train()


class _Enough(Exception):
    """The conditions are there; the rest of the step is not needed."""


def loss_of(module: TrainingStep, micro_steps: list[MicroStep], rank: int, device: str) -> float:
    """Loss of a rank's micro-step; the conditions that it has from other ranks are computed one rank after another."""
    others: list[Tensor] = []

    def capture(own: Tensor) -> tuple[Tensor, int]:
        others.append(own.detach().float())
        raise _Enough

    if module.negatives != "local":
        module.gather = capture
        for step in micro_steps:
            try:
                _forward(module, step, device)
            except _Enough:
                pass

    def gather(own: Tensor) -> tuple[Tensor, int]:
        parts = [own.float() if index == rank else other for index, other in enumerate(others)]
        return torch.cat(parts), sum(len(part) for part in parts[:rank])

    module.gather = gather
    return _forward(module, micro_steps[rank], device).item()


def _forward(module: TrainingStep, step: MicroStep, device: str) -> Tensor:
    step.restore_random()
    return module(**{name: value.to(device) for name, value in step.inputs.items()})["loss"].detach()


if __name__ == "__main__":
    sys.exit(main())
