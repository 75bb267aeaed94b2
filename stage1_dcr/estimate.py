"""What a dry run tells about a run: what trains, and how long it will take on this device."""

from __future__ import annotations

import torch

from dcr_mllm.denoiser_headers import denoiser_summary
from dcr_mllm.plan import duration, fastest
from stage1_dcr.step import Phase
from stage1_dcr.train import Stage1, prepare


def trainable_table(stage: Stage1) -> str:
    """What each phase trains: module, tensors, parameters; and the size of what stays frozen."""
    lines = [f"{'phase':<10} {'trains':<10} {'tensors':>8} {'parameters':>12}"]
    phases: tuple[Phase, ...] = ("projector", "tower")
    for phase in phases:
        module = prepare(stage, phase, stage.new_projector())
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        count = sum(parameter.numel() for parameter in trained)
        lines.append(
            f"{phase:<10} {'projector' if phase == 'projector' else 'LoRA':<10} {len(trained):>8} {count:>12,}"
        )
    frozen = denoiser_summary(stage.denoiser_path).num_parameters
    lines.append(f"{'never':<10} {'UNet':<10} {'':>8} {frozen:>12,}")
    return "\n".join(lines)


def seconds_per_step(stage: Stage1) -> float:
    """Estimated seconds of an optimizer step: one row of the grid, measured here, times the rows of a step.

    The denoiser is nearly all of the work; tower and data loading come on top.
    """
    config, denoiser = stage.config, stage.denoiser
    device = torch.device(stage.launch.device)
    denoiser.to(device)
    latents = torch.randn(1, *stage.latent_shape, device=device)
    timesteps = torch.full((1,), denoiser.num_train_timesteps // 2, device=device)
    samples_per_row = config.num_negatives(stage.launch.num_processes) + 2  # the anchor and its view

    def row() -> None:
        conditions = torch.randn(1, samples_per_row, denoiser.cross_attention_dim, device=device, requires_grad=True)
        denoiser.predict(latents, timesteps, conditions).float().square().mean().backward()

    return fastest(row, device.type) * config.batch_size * config.accumulation


def time_table(stage: Stage1) -> str:
    """Estimated time of both phases on this device."""
    step = seconds_per_step(stage)
    config = stage.config
    phases = (("projector", config.projector_steps), ("tower", config.tower_steps))
    times = ", ".join(f"{phase} phase {steps:,} steps = {duration(step * steps)}" for phase, steps in phases)
    return f"estimated {step:.2f} s per step on this {stage.launch.device}: {times}"
