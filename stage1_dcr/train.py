"""Stage 1 from a checked config to a tower directory: projector phase, tower phase, export.

Both phases run on `transformers.Trainer`. Everything frozen is loaded before `TrainingArguments` exists, since under
ZeRO 3 whatever `from_pretrained` loads after it comes out empty.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dcr_mllm.denoiser_headers import denoiser_summary
from dcr_mllm.headers import resolve_weights, tower_summary
from dcr_mllm.launch import Launch
from dcr_mllm.log import get_logger, rank
from dcr_mllm.runs import PROVENANCE_FILE, Run, atomic_directory, hash_directory, provenance, write_json_atomic
from dcr_mllm.towers import (
    ImageStatistics,
    VisionTower,
    add_lora,
    export_tower,
    image_statistics,
    load_full_model,
    lora_config,
    merged_tensors,
    vision_tower,
)
from stage1_dcr.config import Phase, Stage1Config
from stage1_dcr.denoiser import Denoiser
from stage1_dcr.graphs import require_recording
from stage1_dcr.hardware import choose_attention, prepare_denoiser
from stage1_dcr.images import StreamPosition, fingerprint, make_loader
from stage1_dcr.profiles import OPENAI_MEAN, OPENAI_STD, known_defects
from stage1_dcr.projector import Projector
from stage1_dcr.selection import selected
from stage1_dcr.step import TrainingStep
from stage1_dcr.validation import Validate, Validation, cut_validation
from stage1_dcr.validation_split import validation_directory

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import TrainingArguments

logger = get_logger(__name__)


class Stage1:
    """What both phases share: the frozen models, loaded once, and where things go."""

    def __init__(self, config: Stage1Config, launch: Launch):
        self.config, self.launch = config, launch
        self.tower_path = resolve_weights(config.tower, "tower")
        self.denoiser_path = resolve_weights(config.denoiser, "denoiser")
        self.statistics: ImageStatistics = image_statistics(self.tower_path)
        if config.normalisation == "openai":
            self.statistics = dataclasses.replace(self.statistics, mean=OPENAI_MEAN, std=OPENAI_STD)
        self.dtype = torch.bfloat16 if launch.precision == "bf16" else torch.float32
        self.denoiser, self.tower = self.load_denoiser(), self.load_tower()
        choose_attention(config.hardware.attention)
        self.latent_shape = self.denoiser.latent_shape(config.diffusion_size or self.statistics.size)
        self.crop_size = max(self.statistics.size, config.diffusion_size or self.statistics.size)

    def load_denoiser(self) -> Denoiser:
        """The frozen denoiser, on the CPU."""
        if self.config.hardware.cuda_graphs:
            require_recording()
        denoiser = Denoiser.load(
            self.denoiser_path, device="cpu", dtype=self.dtype, prediction_type=self.config.prediction_type
        )
        prepare_denoiser(denoiser, self.config.hardware)
        return denoiser

    def load_tower(self) -> VisionTower:
        """The base tower in fp32, on the CPU."""
        return vision_tower(load_full_model(self.tower_path))

    def new_projector(self) -> Projector:
        """The projector to start from: the one that the config names, or a fresh one."""
        if self.config.projector is not None:
            return Projector.load(self.config.projector)
        torch.manual_seed(self.config.seed)
        return Projector(self.input_width, self.denoiser.cross_attention_dim, hidden_width=self.config.projector_width)

    @property
    def input_width(self) -> int:
        """Of the projector."""
        return self.config.condition_width(embedding_width=self.tower.width, hidden_size=self.tower.hidden_size)

    def lora(self) -> LoraConfig:
        """What is put into the tower."""
        config = self.config
        return lora_config(
            config.lora_rank,
            config.lora_alpha,
            config.lora_dropout,
            except_block=config.untouched_block(self.tower.num_layers),
        )


def prepare(stage: Stage1, phase: Phase, projector: Projector) -> TrainingStep:
    """The module that a phase trains, with its LoRA in place in the tower phase."""
    config = stage.config
    # Each phase works on its own copy: ZeRO 3 takes the parameters of a trained module apart.
    tower = copy.deepcopy(stage.tower)
    reference = None
    if phase == "tower":
        torch.manual_seed(config.seed)
        add_lora(tower, stage.lora())
        reference = copy.deepcopy(stage.tower) if config.keep_close else None
    projector.requires_grad_(True)  # a step freezes what it does not train
    return TrainingStep(
        phase=phase,
        tower=tower,
        projector=projector,
        denoiser=stage.denoiser,
        statistics=stage.statistics,
        config=config,
        reference=reference,
    )


def training_arguments(config: Stage1Config, launch: Launch, phase: Phase, directory: Path) -> TrainingArguments:
    """The Trainer's arguments for a phase."""
    from dcr_mllm.trainer import stage_arguments

    return stage_arguments(
        config,
        launch,
        phase,
        directory,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.projector_learning_rate if phase == "projector" else config.tower_learning_rate,
        max_steps=config.steps_of(phase),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps,
    )


def run_phase(
    stage: Stage1,
    phase: Phase,
    projector: Projector,
    run: Run,
    data: str | list[str],
    validation: Validation | None = None,
) -> dict[str, Tensor]:
    """Train one phase to its end, from its last complete checkpoint if there is one.

    Args:
        validation: In the tower phase on rank 0, if the config names a split.

    Returns:
        The trained tensors by their names in the training step (`projector.*`, `tower.*`), fp32 on the CPU; those of
        the step that `select` chooses.
    """
    from dcr_mllm.trainer import (
        StreamTrainer,
        cut_metrics,
        gathered_trainable_state,
        keep_trainable_only,
        last_checkpoint,
        read_position,
    )

    config = stage.config
    directory = run.path / "checkpoints" / phase
    module = prepare(stage, phase, projector)
    keep_trainable_only(module)
    arguments = training_arguments(config, stage.launch, phase, directory)
    module.move_frozen(arguments.device, stage.dtype)

    checkpoint = last_checkpoint(directory)
    metrics_file = run.path / "metrics.jsonl"
    if checkpoint is None:
        position, step = StreamPosition(), 0
    else:
        position = StreamPosition.from_json(read_position(checkpoint, arguments.process_index, arguments.world_size))
        step = int(checkpoint.name.rsplit("-", 1)[1])
        logger.info("%s phase goes on from step %d", phase, step)
    if arguments.process_index == 0:
        cut_metrics(metrics_file, phase, step)
        if phase == "tower":
            cut_validation(run.path, step)

    # The tower phase sees other images than the projector phase, not the same ones once more.
    loader = make_loader(
        data,
        batch_size=config.batch_size,
        size=stage.crop_size,
        latent_shape=stage.latent_shape,
        seed=2 * config.seed + (phase == "tower"),
        rank=arguments.process_index,
        world_size=arguments.world_size,
        num_workers=config.num_workers,
        shuffle_buffer=config.shuffle_buffer,
        views=config.views,
        crop_scale=config.crop_scale,
        max_skipped_fraction=config.max_skipped_fraction,
        position=position,
    )
    trainer = StreamTrainer(
        model=module,
        args=arguments,
        loader=loader,
        position=position,
        metrics=module.metrics,
        metrics_file=metrics_file,
        phase=phase,
        prefetch=config.hardware.prefetch,
        config=config,
        replay="stage1_dcr.replay",
        learning_rates={"projector.": config.projector_learning_rate} if phase == "tower" else None,  # end to end
    )
    if phase == "tower" and config.diagnose_every:
        from stage1_dcr.diagnose import DIAGNOSTICS, Diagnose

        trainer.add_callback(Diagnose(module, stage, run.path / DIAGNOSTICS, data))
    if phase == "tower" and config.validation is not None:
        trainer.add_callback(Validate(trainer, validation, config.validate_every))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = gathered_trainable_state(trainer)
    if validation is not None:
        state = validation.selected_state() or state
    trainer.accelerator.free_memory()
    return state


def part_of(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of `projector` or `tower` by their names in it."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def run_stage1(config: Stage1Config, launch: Launch, run: Run, data: str | list[str]) -> dict[str, Any]:
    """Run what is left of a run: projector phase, tower phase, export.

    Args:
        config: Checked by `stage1_dcr.checks.preflight`.
        launch: How it runs.
        run: Its directory.
        data: The image source, with `mini` already turned into shards.

    Returns:
        Paths of what came out, on every rank.
    """
    is_main = rank() == 0
    projector_dir, tower_dir = run.path / "projector", run.path / "tower"
    results: dict[str, Any] = {}
    projector_left = config.steps_of("projector") > 0 and not projector_dir.is_dir()
    tower_left = config.tower_steps > 0 and not tower_dir.is_dir()
    # All or nothing: whatever a later phase needs has to be loaded before the first TrainingArguments.
    stage = Stage1(config, launch) if projector_left or tower_left else None
    validation, directory = None, validation_directory(config)
    if stage is not None and tower_left and is_main and directory is not None:
        validation = Validation(stage, directory, run.path)

    if projector_left:
        assert stage is not None
        state = run_phase(stage, "projector", stage.new_projector(), run, data)
        if is_main:
            _save_projector(stage, state, projector_dir)
        _barrier()

    if tower_left:
        assert stage is not None
        trained = config.steps_of("projector") > 0
        projector = Projector.load(projector_dir) if trained else stage.new_projector()
        state = run_phase(stage, "tower", projector, run, data, validation)
        if is_main:
            if part_of(state, "projector"):
                _save_projector(stage, state, projector_dir)
            _export(stage, part_of(state, "tower"), run, data)
        _barrier()
    if projector_dir.is_dir() or config.projector is not None:
        results["projector"] = str(projector_dir if projector_dir.is_dir() else config.projector)
    if config.tower_steps > 0:
        results["tower"] = str(tower_dir)
    return results


def _save_projector(stage: Stage1, state: dict[str, Tensor], directory: Path) -> None:
    projector = stage.new_projector()
    projector.denoiser_hash = hash_directory(stage.denoiser_path)
    with atomic_directory(directory, replace=True) as temporary:
        projector.save(temporary, state_dict=part_of(state, "projector"))


def _export(stage: Stage1, state: dict[str, Tensor], run: Run, data: str | list[str]) -> None:
    """Merge and write the tower with its provenance and card; zero.Init must be off, or the base would load empty."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from stage1_dcr.card import model_card

    unset_hf_deepspeed_config()
    config = stage.config
    with atomic_directory(run.path / "adapter", replace=True) as temporary:
        changed = merged_tensors(stage.tower_path, stage.lora(), state, temporary)
    with atomic_directory(run.path / "tower") as temporary:
        export_tower(stage.tower_path, changed, temporary)
        record = provenance(
            config,
            base_tower=stage.tower_path,
            denoiser=stage.denoiser_path,
            data=fingerprint(data),
            prediction_type=stage.denoiser.prediction_type,
            known_defects=known_defects(config, tower_summary(stage.tower_path), denoiser_summary(stage.denoiser_path)),
            steps={"projector": config.steps_of("projector"), "tower": config.tower_steps},
            selected=selected(config, run.path),
            seeds={"seed": config.seed},
            num_processes=stage.launch.num_processes,
            precision=stage.launch.precision,
        )
        write_json_atomic(temporary / PROVENANCE_FILE, record)
        (temporary / "README.md").write_text(model_card(config, record), encoding="utf-8")


def _barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
