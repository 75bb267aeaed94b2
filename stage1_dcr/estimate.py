"""What a dry run tells about a run: what trains, and how long it will take on this device."""

from __future__ import annotations

import torch

from dcr_mllm.denoiser_headers import denoiser_summary
from dcr_mllm.plan import duration, fastest
from stage1_dcr.config import Phase, Stage1Config
from stage1_dcr.train import Stage1, prepare

PHASES: tuple[Phase, ...] = ("projector", "tower")


def trainable_table(stage: Stage1) -> str:
    """What each phase trains: module, tensors, parameters; and the size of what stays frozen."""
    lines = [f"{'phase':<10} {'trains':<10} {'tensors':>8} {'parameters':>12}"]
    for phase in PHASES:
        if phase == "projector" and stage.config.objective in ("contrastive", "dcr-end-to-end"):
            continue
        for name, module in prepare(stage, phase, stage.new_projector()).named_children():
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            count = sum(parameter.numel() for parameter in trained)
            kind = "projector" if name == "projector" else "LoRA"
            lines.append(f"{phase:<10} {kind:<10} {len(trained):>8} {count:>12,}")
    frozen = denoiser_summary(stage.denoiser_path).num_parameters
    lines.append(f"{'never':<10} {'UNet':<10} {'':>8} {frozen:>12,}")
    return "\n".join(lines)


def conditions_per_row(config: Stage1Config, phase: Phase, num_processes: int) -> int:
    """UNet samples per noisy latent: its own condition, its view's and the negatives' in DCR; one in reconstruction;
    none in the feature contrast."""
    objective = config.objective_of(phase)
    if objective == "contrastive":
        return 0
    return config.num_negatives(num_processes) + 2 if objective == "dcr" else 1


def seconds_per_step(stage: Stage1, phase: Phase) -> float:
    """Estimated seconds of an optimizer step: one row of the grid, measured here, times the rows of a step.

    The denoiser is nearly all of the work of DCR; tower and data loading come on top, and are all of the work of the
    feature contrast, of which nothing is estimated here.
    """
    config, denoiser = stage.config, stage.denoiser
    device = torch.device(stage.launch.device)
    denoiser.to(device)
    latents = torch.randn(1, *stage.latent_shape, device=device)
    timesteps = torch.full((1,), denoiser.num_train_timesteps // 2, device=device)
    samples_per_row = conditions_per_row(config, phase, stage.launch.num_processes)
    if samples_per_row == 0:
        return 0.0

    def row() -> None:
        conditions = torch.randn(1, samples_per_row, denoiser.cross_attention_dim, device=device, requires_grad=True)
        denoiser.predict(latents, timesteps, conditions).float().square().mean().backward()

    return fastest(row, device.type) * config.batch_size * config.accumulation


def time_table(stage: Stage1) -> str:
    """Estimated time of both phases on this device: the denoiser's part of it."""
    config = stage.config
    known: dict[int, float] = {}  # by samples per row, so that two phases of one objective are measured once
    parts = []
    for phase in PHASES:
        steps = config.steps_of(phase)
        if steps:
            samples = conditions_per_row(config, phase, stage.launch.num_processes)
            if samples not in known:
                known[samples] = seconds_per_step(stage, phase)
            step = known[samples]
            parts.append(f"{phase} phase {steps:,} steps of {step:.2f} s = {duration(step * steps)}")
    return f"estimated time of the denoiser on this {stage.launch.device}: {', '.join(parts) or 'no steps'}"
