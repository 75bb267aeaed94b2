"""The plan of a stage 2 run, for `dcr-mllm plan`."""

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
from stage2_llava.checks import MINI, accumulation, load_once, num_steps, preflight
from stage2_llava.config import PhaseConfig, Stage2Config

if TYPE_CHECKING:
    from dcr_mllm.launch import Launch

CONFIG = Stage2Config
CONFIGS = Path(__file__).parent / "configs"
TOKENS_PER_WORD = 2
"""More than most texts have: LLaVA's longest samples are what has to fit."""


def plan(config: Stage2Config, target: Target) -> Iterator[str]:
    """The blocks of the plan; see `dcr_mllm.plan.Stage`."""
    notes = preflight(config)
    launch = target.launch(config.precision, config.deepspeed)
    micro_steps = {name: accumulation(phase, launch.num_processes, name) for name, phase in config.phases()}
    described = [
        f"{name}: {launch.describe(phase.micro_batch_size, micro_steps[name])}" for name, phase in config.phases()
    ]
    yield "\n".join([*described, *notes])
    if not config.phases():
        yield "protocol swap trains nothing"
        return

    from stage2_llava.train import phase_tables

    yield phase_tables(config)
    arms = len(config.towers)
    samples = {name: phase.batch_size * steps_of(phase, config) for name, phase in config.phases()}
    yield "\n".join(
        f"{name}: {steps_of(phase, config):,} steps of {phase.batch_size} = {samples[name]:,} samples"
        f" for each of {arms} tower{'s' * (arms > 1)}"
        for name, phase in config.phases()
    )
    memory = Memory(config, launch)
    columns = {name: memory.components(name) for name, _ in config.phases()}
    yield memory_block("per device", columns)
    yield "\n".join(
        f"{name} with every sample {memory.length(phase):,} tokens long, all text learned"
        for name, phase in config.phases()
    )
    for name, phase in config.phases():
        memory.phase = name
        verdict = fits_block(sum(columns[name].values()), target, f"see {name} with other settings below")
        if verdict is not None:
            yield type(verdict)(f"{name} {verdict}")
        yield other_settings(memory, phase)
        if target.usable is not None:
            yield micro_batch_that_fits(memory, phase, target.usable)
    speed, origin = target.throughput, "given"
    if target.measure:
        speed = measured_samples_per_second(config) * launch.num_processes
        origin = f"instruct, measured on this machine with random weights, times {launch.num_processes}"
    yield time_block({name: count * arms for name, count in samples.items()}, speed, "samples", origin)
    yield disk_block(Path(config.runs_dir), disk_parts(config, launch))


def steps_of(phase: PhaseConfig, config: Stage2Config) -> int:
    """Optimizer steps of a phase; the miniature's data are drawn when it runs, so it must state them."""
    if phase.max_steps is not None:
        return phase.max_steps
    if phase.data == MINI:
        return 0
    assert phase.data is not None, "preflight refuses empty data"
    return num_steps(phase, len(load_once(phase.data, phase.images, drop_missing=config.drop_missing)))


class Memory:
    """Peaks of one config under other micro-batches, each counted once.

    Attributes:
        phase: The one that `peak` speaks of.
    """

    def __init__(self, config: Stage2Config, launch: Launch):
        self.config, self.launch = config, launch
        self.phases = dict(config.phases())
        self.phase = next(iter(self.phases))
        self._known: dict[tuple[str, int], dict[str, int]] = {}

    def components(self, name: str, **changed: Any) -> dict[str, int]:
        """Bytes per device at the peak of a step."""
        from stage2_llava.plan_step import planned_memory

        phase = dataclasses.replace(self.phases[name], **changed)
        key = (name, phase.micro_batch_size)
        if key not in self._known:
            resident, step = planned_memory(self.config, self.launch, name, phase, self.length(phase))
            self._known[key] = {**resident, **{f"{STEP}{part}": size for part, size in step.items()}}
        return self._known[key]

    def peak(self, **changed: Any) -> int:
        """Their sum."""
        return sum(self.components(self.phase, **changed).values())

    def length(self, phase: PhaseConfig) -> int:
        """Tokens of the longest sample: of the data where they are known, and `max_length` at most."""
        config = self.config
        if phase.data in (None, MINI):
            return config.max_length
        assert phase.data is not None
        words = int(load_once(phase.data, phase.images, drop_missing=config.drop_missing).num_words.max())
        return min(config.max_length, image_tokens(config) + TOKENS_PER_WORD * words)


def image_tokens(config: Stage2Config) -> int:
    """Tokens that an image becomes, of the first tower or of the given LLaVA."""
    from dcr_mllm.headers import resolve_weights
    from dcr_mllm.llava_headers import llava_summary, vision_summary

    if config.llava is not None:
        return llava_summary(resolve_weights(config.llava, "llava")).image_tokens
    return vision_summary(resolve_weights(next(iter(config.towers.values())), "tower")).image_tokens


def other_settings(memory: Memory, phase: PhaseConfig) -> str:
    """Peaks of the next smaller and larger micro-batch."""
    size = phase.micro_batch_size
    lines = [f"{f'{memory.phase}, other settings':<33}{'GiB':>8}"]
    for other in sorted({max(1, size // 2), size, size * 2}):
        configured = "  as configured" if other == size else ""
        lines.append(f"  micro_batch_size={other:<14}{gib(memory.peak(micro_batch_size=other)):>8}{configured}")
    return "\n".join(lines)


def micro_batch_that_fits(memory: Memory, phase: PhaseConfig, usable: int) -> str:
    """The largest `micro_batch_size` that fits and makes up the global batch, in a sentence."""
    share = phase.batch_size // memory.launch.num_processes
    fitting = largest_that_fits(lambda size: memory.peak(micro_batch_size=size), share, usable)
    if fitting:
        size = max(size for size in range(1, fitting + 1) if share % size == 0)
        return (
            f"largest {memory.phase}.micro_batch_size that fits: {size} ({gib(memory.peak(micro_batch_size=size))} GiB)"
        )
    return Problem(
        f"no {memory.phase}.micro_batch_size fits: a single sample needs {gib(memory.peak(micro_batch_size=1))} GiB of "
        f"the {usable / GIB:.1f} that may be planned; use deepspeed=zero3, more GPUs or a smaller max_length"
    )


def measured_samples_per_second(config: Stage2Config) -> float:
    """Samples per second of one process on this machine, in the last phase: the real step on random weights."""
    import torch

    from dcr_mllm.launch import decide
    from stage2_llava.plan_step import PlannedStep

    here = decide(config.precision, "none")
    device = torch.device(here.device)
    name, phase = config.phases()[-1]
    step = PlannedStep.build(config, here, name, phase, Memory(config, here).length(phase))
    step.module.to(device)
    step.batch = {key: tensor.to(device) for key, tensor in step.batch.items()}
    return phase.micro_batch_size / fastest(step.run, device.type)


def disk_parts(config: Stage2Config, launch: Launch) -> dict[str, int]:
    """Bytes that a run leaves for all towers: checkpoints (the last two of each phase) and the written LLaVAs."""
    import torch

    from dcr_mllm.zero import checkpoint_bytes
    from stage2_llava.train import empty_llava, make_trainable

    arms = len(config.towers)
    parts: dict[str, int] = {}
    for name, _ in config.phases():
        with torch.device("meta"):
            llava = empty_llava(config)
            whole = sum(p.numel() for p in llava.parameters()) * (2 if launch.precision == "bf16" else 4)
            model = make_trainable(llava, config, name)
        parts[f"checkpoints of {name}"] = 2 * arms * checkpoint_bytes(model, launch)
        if name == "instruct" and config.instruct.tuning != "full":
            parts["adapter"] = 4 * arms * sum(p.numel() for p in model.parameters() if p.requires_grad)
        parts["aligned" if name == "align" else "llava"] = arms * whole
    return parts
