"""Compute a step of stage 2 again whose loss was not finite.

    python -m stage2_llava.replay RUNS_DIR/RUN/ARM/bad-step-N [--rank R] [--device cpu]

What trains, the inputs and the random state come from the folder; frozen models from where the run's config.yaml names
them, or from the arm that the folder lies in. One process is enough, also for a run of many. Exit status 0: the loss is
not finite here either; 1: it is, so look at the device or the software.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

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
from stage2_llava.config import KEEP, Stage2Config
from stage2_llava.step import LlavaStep


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse_replay(argv, prog="python -m stage2_llava.replay", description=__doc__ or "")
    return run_main(lambda: replay(options.directory, rank=options.rank, device=options.device))


def replay(directory: Path, *, rank: int | None, device: str) -> int:
    """Print the losses of a step as they were and as they come out now; see `dcr_mllm.bad_step.compute_again`."""
    record = read_step(directory)
    step = build(directory, record, device)

    def loss_of(micro_steps: list[MicroStep], r: int) -> float:
        micro_steps[r].restore_random()
        inputs = {name: value.to(device) for name, value in micro_steps[r].inputs.items()}
        # The Trainer's factor: gradients are averaged over processes, but the loss is divided by the tokens of all.
        return step(**inputs)["loss"].item() * record["num_processes"]

    with precision(record, device):
        return compute_again(directory, loss_of, rank=rank, where=device)


def build(directory: Path, record: dict[str, Any], device: str) -> LlavaStep:
    """The module of the phase with its weights before the step."""
    from safetensors.torch import load_file

    from dcr_mllm.headers import resolve_weights
    from dcr_mllm.llava import load_llava
    from dcr_mllm.trainer import keep_trainable_only
    from stage2_llava.assemble import assemble
    from stage2_llava.train import quantised
    from stage2_llava.tuning import add_adapter, freeze_for_alignment, freeze_for_full_tuning, trainable_in_fp32

    config, arm = load_config(Stage2Config, directory / CONFIG_FILE, []), directory.resolve().parent
    dtype = torch.bfloat16 if record["precision"] == "bf16" else torch.float32
    tower = config.towers[arm.name]
    if record["phase"] == "align":
        model, _, _ = assemble(
            resolve_weights(tower, "tower"),
            resolve_weights(config.llm or "", "llm"),
            template=config.template,
            vision_feature_layer=config.vision_feature_layer,
            seed=config.seed,
            dtype=dtype,
        )
        model = freeze_for_alignment(model)
    else:
        base = arm / ("aligned" if config.protocol == "recipe" else "swapped")
        if config.protocol != "recipe" and tower == KEEP:
            base = resolve_weights(config.llava or "", "llava")
        phase = config.instruct
        if phase.tuning == "full":
            model = freeze_for_full_tuning(load_llava(base, dtype))
        else:
            model = add_adapter(load_llava(base, dtype, **quantised(phase, dtype)), phase, str(base), config.seed)
    if not record["deepspeed"] and dtype == torch.bfloat16:
        trainable_in_fp32(model)
    step = LlavaStep(model)
    keep_trainable_only(step)
    step.load_state_dict(load_file(directory / WEIGHTS_FILE))
    step.to(device)
    if record["deepspeed"]:
        step.to(dtype)  # as DeepSpeed trains it
    return step.train()


if __name__ == "__main__":
    sys.exit(main())
