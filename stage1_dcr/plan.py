"""The plan of a stage 1 run, for `dcr-mllm plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcr_mllm.plan import (
    GIB,
    STEP,
    Problem,
    Target,
    disk_block,
    fastest,
    fits_block,
    gib,
    largest_that_fits,
    memory_block,
    time_block,
)
from stage1_dcr.checks import preflight
from stage1_dcr.config import Stage1Config

if TYPE_CHECKING:
    from dcr_mllm.launch import Launch
    from stage1_dcr.config import Phase

CONFIG = Stage1Config
CONFIGS = Path(__file__).parent / "configs"


def plan(config: Stage1Config, target: Target) -> Iterator[str]:
    """The blocks of the plan; see `dcr_mllm.plan.Stage`."""
    notes = preflight(config)
    launch = target.launch(config.precision, config.deepspeed)
    yield "\n".join([launch.describe(config.batch_size, config.accumulation), *notes])

    import torch

    from stage1_dcr.estimate import PHASES, conditions_per_row, trainable_table
    from stage1_dcr.plan_step import EmptyStage, unet_flops

    with torch.device("meta"):
        stage = EmptyStage(config, launch)
        table = trainable_table(stage)
    yield table

    steps: dict[Phase, int] = {phase: config.steps_of(phase) for phase in PHASES if config.steps_of(phase)}
    batch = config.batch_size * config.accumulation * launch.num_processes
    images: dict[str, int] = {phase: count * batch for phase, count in steps.items()}
    yield "\n".join(
        f"{phase} phase: {count:,} steps of {batch} = {images[phase]:,} images" for phase, count in steps.items()
    )
    if not steps:
        return

    memory = Memory(config, launch)
    columns: dict[str, dict[str, int]] = {phase: memory.components(phase) for phase in steps}
    yield memory_block("per device", columns)
    memory.phase = max(steps, key=lambda phase: sum(columns[phase].values()))
    verdict = fits_block(memory.peak(), target, "see the settings below, or set a smaller batch_size")
    if verdict is not None:
        yield verdict
    yield other_settings(memory)
    if target.usable is not None:
        yield rows_that_fit(memory, target.usable)

    samples = {phase: conditions_per_row(config, phase, launch.num_processes) for phase in steps}  # per row
    flops = {n: unet_flops(config, launch, n) if n else 0 for n in set(samples.values())}
    yield "\n".join(
        f"UNet in a micro-step of the {phase} phase: {config.batch_size * n:,} samples, {flops[n] / 1e12:.3g} TFLOP "
        f"forward and backward per process; micro-steps in a step: {config.accumulation}"
        for phase, n in samples.items()
    )
    speed, origin = target.throughput, "given"
    if target.measure:
        speed = measured_images_per_second(config, launch.num_processes) * launch.num_processes
        origin = f"measured on this machine with random weights, times {launch.num_processes}"
    yield time_block(images, speed, "images", origin)
    yield disk_block(Path(config.runs_dir), disk_parts(stage, launch, list(steps)))


class Memory:
    """Peaks of one config under other batches and rows, each counted once.

    Attributes:
        phase: The one that `peak` speaks of.
    """

    def __init__(self, config: Stage1Config, launch: Launch):
        self.config, self.launch = config, launch
        self.phase: Phase = "tower"
        self._known: dict[tuple[Any, ...], dict[str, int]] = {}

    def components(self, phase: Phase, **changed: Any) -> dict[str, int]:
        """Bytes per device at the peak of a step."""
        from stage1_dcr.plan_step import planned_memory

        config = dataclasses.replace(self.config, **changed)
        key = (phase, config.batch_size, self.rows(config))
        if key not in self._known:
            resident, step = planned_memory(config, self.launch, phase)
            self._known[key] = {**resident, **{f"{STEP}{name}": size for name, size in step.items()}}
        return self._known[key]

    def peak(self, **changed: Any) -> int:
        """Their sum."""
        return sum(self.components(self.phase, **changed).values())

    def rows(self, config: Stage1Config) -> int:
        """Rows of the grid in memory at a time, in a config of these models."""
        from dcr_mllm.denoiser_headers import denoiser_summary
        from dcr_mllm.headers import resolve_weights, tower_summary
        from stage1_dcr.objective import auto_rows_per_chunk

        if config.rows_per_chunk != "auto":
            return min(config.rows_per_chunk, config.batch_size)
        size = config.diffusion_size or tower_summary(resolve_weights(config.tower, "tower")).image_size
        side = size // denoiser_summary(resolve_weights(config.denoiser, "denoiser")).vae_scale
        return auto_rows_per_chunk(
            config.batch_size,
            self.launch.device,
            latent_area=side * side,
            num_negatives=config.num_negatives(self.launch.num_processes),
        )


def other_settings(memory: Memory) -> str:
    """Peaks of the next smaller and larger batch and rows."""
    config = memory.config
    batch, rows = config.batch_size, memory.rows(config)
    settings: list[dict[str, Any]] = [
        {"rows_per_chunk": max(1, rows // 2)},
        {"rows_per_chunk": min(batch, rows * 2)},
        {"batch_size": max(2, batch // 2)},
        {"batch_size": batch * 2},
    ]
    lines = [f"{f'{memory.phase} phase, other settings':<40}{'GiB':>8}"]
    shown: set[str] = set()
    for changed in ({}, *settings):
        found = dataclasses.replace(config, **changed)
        name = f"batch_size={found.batch_size} rows_per_chunk={memory.rows(found)}"
        if name not in shown:
            shown.add(name)
            lines.append(f"  {name:<38}{gib(memory.peak(**changed)):>8}" + ("  as configured" if not changed else ""))
    return "\n".join(lines)


def rows_that_fit(memory: Memory, usable: int) -> str:
    """The largest `rows_per_chunk` whose peak fits, in a sentence."""
    config = memory.config
    rows = largest_that_fits(lambda rows: memory.peak(rows_per_chunk=rows), config.batch_size, usable)
    if rows:
        peak = memory.peak(rows_per_chunk=rows)
        return f"largest rows_per_chunk that fits: {rows} of {config.batch_size} ({gib(peak)} GiB)"
    return Problem(
        f"no rows_per_chunk fits: a single row needs {gib(memory.peak(rows_per_chunk=1))} GiB of the "
        f"{usable / GIB:.1f} that may be planned; set a smaller batch_size or diffusion_size"
    )


def measured_images_per_second(config: Stage1Config, num_processes: int = 1) -> float:
    """Images per second of one of several processes on this machine: the real step on random weights.

    Data, optimizer and communication are not in it.
    """
    import torch

    from dcr_mllm.launch import decide
    from stage1_dcr.hardware import prepare_denoiser
    from stage1_dcr.plan_step import PlannedStep

    here = dataclasses.replace(decide(config.precision, "none"), num_processes=num_processes)
    device = torch.device(here.device)
    phase: Phase = "tower" if config.tower_steps else "projector"
    step = PlannedStep.build(config, here, phase)
    prepare_denoiser(step.denoiser, config.hardware)
    step.to(device)
    return config.batch_size / fastest(step.run, device.type)


def disk_parts(stage: Any, launch: Launch, phases: list[Phase]) -> dict[str, int]:
    """Bytes that a run leaves: checkpoints (the last two of each phase), and what it exports."""
    import torch

    from dcr_mllm.headers import tower_summary
    from dcr_mllm.zero import checkpoint_bytes
    from stage1_dcr.train import prepare

    parts: dict[str, int] = {}
    for phase in phases:
        with torch.device("meta"):
            module = prepare(stage, phase, stage.new_projector())
        parts[f"checkpoints of the {phase} phase"] = 2 * checkpoint_bytes(module, launch)
        trained = 4 * sum(p.numel() for p in module.parameters() if p.requires_grad)
        parts["projector" if phase == "projector" else "adapter"] = trained
        if phase == "tower":
            # Changed tensors are written in fp32, the others keep their type: at most four bytes each.
            parts["tower"] = 4 * tower_summary(stage.tower_path).num_parameters
    return parts
