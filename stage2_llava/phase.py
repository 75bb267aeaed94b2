"""Train one phase of a LLaVA: data, features, optimizer groups and Trainer, from its last checkpoint on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dcr_mllm.conversation import Template
from dcr_mllm.launch import Launch
from dcr_mllm.log import get_logger
from dcr_mllm.trainer import (
    StreamTrainer,
    cut_metrics,
    gathered_trainable_state,
    keep_trainable_only,
    last_checkpoint,
    read_position,
    stage_arguments,
)
from stage2_llava.batches import BatchPlan, BatchPosition
from stage2_llava.checks import accumulation, load_once, num_steps
from stage2_llava.collate import Collator, InstructionDataset
from stage2_llava.config import PhaseConfig, Stage2Config
from stage2_llava.export import module_hash
from stage2_llava.features import FeatureCache, build_cache, cache_directory
from stage2_llava.instructions import Instructions
from stage2_llava.step import LlavaStep
from stage2_llava.tuning import parameter_groups, trainable_in_fp32, trainable_table

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class PhaseData:
    """Where a phase finds its samples, with `mini` already drawn.

    Attributes:
        files: As `data` in the config.
        images: As `images` in the config.
    """

    files: str | list[str]
    images: str | list[str] | None

    def load(self, config: Stage2Config) -> Instructions:
        """Read and check all records."""
        return load_once(self.files, self.images, drop_missing=config.drop_missing)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came out of a phase.

    Attributes:
        state: Trained tensors by their names in the model, fp32 on the CPU.
        facts: For the provenance: steps, samples, data.
    """

    state: dict[str, Tensor]
    facts: dict[str, Any]


class LlavaTrainer(StreamTrainer):
    """Adds optimizer groups, and checkpoints that PEFT can load."""

    def __init__(self, *, groups: list[dict[str, Any]], **kwargs: Any):
        super().__init__(**kwargs)
        self._groups = groups

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer: torch.optim.Optimizer = cls(self._groups, **options)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        inner: Any = self.model.model
        if self.args.should_save and hasattr(inner, "peft_config"):
            state = state_dict if state_dict is not None else self.model.state_dict()
            save_adapter(inner, _inner_names(state), output_dir or self.args.output_dir)


def save_adapter(model: Any, state: dict[str, Tensor], directory: str | Path | None) -> None:
    """Write a PEFT adapter directory.

    Args:
        model: PEFT model.
        state: Its trainable tensors by their names in it.
        directory: Where to.
    """
    model.save_pretrained(directory, state_dict={name: value.detach().cpu() for name, value in state.items()})


def train_phase(
    config: Stage2Config,
    launch: Launch,
    name: str,
    phase: PhaseConfig,
    *,
    model: nn.Module,
    processor: Any,
    template: Template,
    data: PhaseData,
    arm: Path,
) -> Trained:
    """Train a phase to its end, from its last complete checkpoint if there is one.

    Args:
        config: Of the stage.
        launch: How it runs.
        name: `align` or `instruct`.
        phase: Its part of the config.
        model: LLaVA or a PEFT model around it, with `requires_grad` set where it trains.
        processor: Tokenizer, and how images are prepared in this phase.
        template: How turns become text in this phase.
        data: Its samples.
        arm: Folder of this tower's results.
    """
    instructions = data.load(config)
    step = LlavaStep(model)
    if config.gradient_checkpointing:
        step.llava.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    if launch.deepspeed is None and launch.precision == "bf16":
        trainable_in_fp32(model)
    keep_trainable_only(step)
    steps = num_steps(phase, len(instructions))
    checkpoints = arm / "checkpoints" / name
    arguments = _arguments(config, launch, name, phase, steps, checkpoints, f"{arm.name}-{name}")
    if arguments.process_index == 0:
        print(f"{arm.name}: {steps:,} steps of {phase.batch_size} samples out of {len(instructions):,}")
        print(trainable_table(model, name), flush=True)

    features = _features(config, phase, step, processor, instructions, data, arguments)
    checkpoint = last_checkpoint(checkpoints)
    position, done = BatchPosition(), 0
    if checkpoint is not None:
        text = read_position(checkpoint, arguments.process_index, arguments.world_size)
        position, done = BatchPosition.from_json(text), int(checkpoint.name.rsplit("-", 1)[1])
        logger.info("%s, %s goes on from step %d", arm.name, name, done)
    if arguments.process_index == 0:
        cut_metrics(arm / "metrics.jsonl", name, done)
    dataset = InstructionDataset(
        instructions,
        template=template,
        processor=processor,
        image_tokens=step.image_tokens,
        max_length=config.max_length,
        features=features,
    )
    trainer = LlavaTrainer(
        model=step,
        args=arguments,
        loader=_loader(config, phase, step, dataset, position.micro_batches, arguments),
        position=position,
        metrics=step.metrics,
        metrics_file=arm / "metrics.jsonl",
        phase=name,
        prefetch=config.hardware.prefetch,
        config=config,
        replay="stage2_llava.replay",
        groups=parameter_groups(
            step,
            learning_rate=phase.learning_rate,
            projector_learning_rate=getattr(phase, "projector_learning_rate", phase.learning_rate),
            weight_decay=phase.weight_decay,
        ),
    )
    tower = step.llava.model.vision_tower
    tower_before = module_hash(tower)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # ZeRO 3 has scattered the trained one; the tower that is written comes from its files in any case.
    scattered = any(hasattr(parameter, "ds_id") for parameter in tower.parameters())
    if not scattered and module_hash(tower) != tower_before:
        raise RuntimeError(f"the vision tower changed during the {name} phase; nothing was written")
    state = _inner_names(gathered_trainable_state(trainer))
    trainer.accelerator.free_memory()
    facts = {
        "steps": steps,
        "samples": len(instructions),
        "dropped": instructions.num_dropped,
        "tower_parameters_sha256": tower_before,
        "data": {"path": data.files, "sha256": instructions.fingerprint()},
    }
    return Trained(state=state, facts=facts)


def _inner_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as in the model that `LlavaStep` holds."""
    return {name.removeprefix("model."): value for name, value in state.items()}


def _arguments(
    config: Stage2Config, launch: Launch, name: str, phase: PhaseConfig, steps: int, directory: Path, title: str
) -> TrainingArguments:
    return stage_arguments(
        config,
        launch,
        title,
        directory,
        per_device_train_batch_size=phase.micro_batch_size,
        gradient_accumulation_steps=accumulation(phase, launch.num_processes, name),
        learning_rate=phase.learning_rate,
        max_steps=steps,
        weight_decay=phase.weight_decay,
        max_grad_norm=phase.max_grad_norm,
        lr_scheduler_type=phase.schedule,
        warmup_steps=math.ceil(phase.warmup_ratio * steps),
    )


def _features(
    config: Stage2Config,
    phase: PhaseConfig,
    step: LlavaStep,
    processor: Any,
    instructions: Instructions,
    data: PhaseData,
    arguments: TrainingArguments,
) -> FeatureCache | None:
    if not phase.cache_features:
        return None
    directory = cache_directory(Path(config.runs_dir) / "features", step.llava, processor, data.images)
    build_cache(
        directory,
        step.llava,
        processor,
        instructions,
        device=arguments.device,
        rank=arguments.process_index,
        world_size=arguments.world_size,
    )
    barrier()
    return FeatureCache(directory)


def _loader(
    config: Stage2Config,
    phase: PhaseConfig,
    step: LlavaStep,
    dataset: InstructionDataset,
    start: int,
    arguments: TrainingArguments,
) -> DataLoader:
    vision = step.llava.config.vision_config
    cached = dataset.features is not None
    empty = (
        torch.zeros(step.image_tokens, vision.hidden_size, dtype=step.llava.dtype)
        if cached
        else torch.zeros(3, vision.image_size, vision.image_size)
    )
    plan = BatchPlan(
        dataset.instructions.num_words,
        dataset.instructions.has_image,
        batch_size=phase.batch_size,
        micro_batch_size=phase.micro_batch_size,
        group_by_modality=phase.group_by_modality,
        seed=config.seed,
        rank=arguments.process_index,
        world_size=arguments.world_size,
        start=start,
    )
    return DataLoader(
        dataset,
        batch_sampler=plan,
        collate_fn=Collator(
            dataset.processor.tokenizer.pad_token_id, empty, "image_features" if cached else "pixel_values"
        ),
        num_workers=config.num_workers,
        # Its own generator: otherwise it would draw from the one that dropout uses, once more in a resumed run.
        generator=torch.Generator().manual_seed(config.seed),
        pin_memory=arguments.device.type == "cuda",
        prefetch_factor=4 if config.num_workers else None,
    )


def barrier() -> None:
    """Wait for all processes, where there are several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
