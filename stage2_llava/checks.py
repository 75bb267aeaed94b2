"""Checks before anything heavy is imported: whether towers, LLM, LLaVA, batch sizes and data fit."""

from __future__ import annotations

import functools
import importlib.util
import math
from pathlib import Path
from typing import Any

from dcr_mllm.conversation import get_template
from dcr_mllm.errors import UserError
from dcr_mllm.headers import read_json, resolve_weights
from dcr_mllm.launch import deepspeed_file
from dcr_mllm.llava_headers import (
    LlavaSummary,
    VisionSummary,
    check_swap,
    llava_summary,
    llm_summary,
    vision_summary,
)
from stage2_llava.batches import steps_per_epoch
from stage2_llava.config import KEEP, PhaseConfig, Stage2Config
from stage2_llava.instructions import Instructions, load_instructions

MINI = "mini"


def preflight(config: Stage2Config) -> list[str]:
    """Checks a stage 2 config against the files that it names; what `stage1` will make first is checked afterwards.

    Returns:
        Lines worth printing.

    Raises:
        UserError: something does not fit; says what was found and what to do.
    """
    notes: list[str] = []
    deepspeed_file(config.deepspeed)
    if config.template != "auto" and get_template(config.template).name == "plain":
        raise UserError("template is plain, which serves alignment only; use vicuna_v1, chatml or auto")
    if config.protocol != "swap":
        check_tuning(config)
    if config.llm is not None:
        llm = llm_summary(resolve_weights(config.llm, "llm"))
        check_template(config.template, llm.path)
        notes.append(
            f"language model: {llm.model_type}, {llm.num_layers} layers x {llm.hidden_size}, vocabulary "
            f"{llm.vocab_size:,}, {llm.num_parameters / 1e6:.3g} M parameters"
        )
    llava = llava_summary(resolve_weights(config.llava, "llava")) if config.llava is not None else None
    for name, tower in config.towers.items():
        if tower == KEEP:
            assert llava is not None, "Stage2Config refuses this"
            notes.append(f"tower {name}: the one inside {llava.path}")
        elif tower_to_make(config, tower) is not None:
            notes.append(f"tower {name}: {tower}, which stage 1 ({config.stage1}) makes first")
        else:
            notes.append(describe_tower(name, check_tower(config, tower, llava), config))
    for phase_name, phase in config.phases():
        notes += check_phase(phase_name, phase, config)
    if config.heldout not in (None, MINI):
        questions = load_instructions(config.heldout, config.heldout_images)
        several = next((sample.where for sample in questions if len(sample.turns) != 2), None)
        if several is not None:
            raise UserError(f"heldout: {several} has several turns, expected one question and its answer")
    return notes


def check_tower(config: Stage2Config, tower: str, llava: LlavaSummary | None) -> VisionSummary:
    """Refuses a tower that does not fit the LLaVA it goes into, or has too few layers."""
    summary = vision_summary(resolve_weights(tower, "tower"))
    if llava is not None:
        check_swap(llava, summary)
    layer = config.vision_feature_layer
    if not -summary.num_layers - 1 <= layer <= summary.num_layers or layer == 0:
        raise UserError(
            f"vision_feature_layer is {layer}, but {summary.path} has {summary.num_layers} layers; the recipe takes -2"
        )
    if summary.image_tokens + 8 > config.max_length:
        raise UserError(
            f"max_length is {config.max_length}, but an image of {summary.path} alone takes {summary.image_tokens} "
            "tokens; raise max_length"
        )
    return summary


def describe_tower(name: str, tower: VisionSummary, config: Stage2Config) -> str:
    """One line about a tower and what LLaVA takes from it."""
    return (
        f"tower {name}: {tower.model_type}, {tower.image_size} px, patch {tower.patch_size}, {tower.num_layers} layers "
        f"x {tower.hidden_size}, layer {config.vision_feature_layer}, {tower.image_tokens} tokens an image"
    )


def check_template(template: str, llm: Path) -> None:
    """Refuses `auto` for an LLM that has no chat template, without loading its tokenizer."""
    if template != "auto" or (llm / "chat_template.jinja").is_file():
        return
    tokenizer = llm / "tokenizer_config.json"
    if not tokenizer.is_file() or not read_json(tokenizer).get("chat_template"):
        raise UserError(f"{llm} has no chat template; choose one with template=vicuna_v1 or template=chatml")


def check_tuning(config: Stage2Config) -> None:
    """Refuses QLoRA where bitsandbytes cannot run."""
    if config.instruct.tuning != "qlora":
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError("instruct.tuning is qlora, which needs a CUDA GPU; use instruct.tuning=lora on this machine")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("instruct.tuning is qlora, which needs the package bitsandbytes: pip install bitsandbytes")
    if deepspeed_file(config.deepspeed) is not None and "zero3" in config.deepspeed:
        raise UserError("instruct.tuning is qlora, whose four-bit weights ZeRO 3 cannot shard; use deepspeed=zero2")


def check_phase(name: str, phase: PhaseConfig, config: Stage2Config) -> list[str]:
    """Refuses data that is not there or not sound."""
    if not phase.data:
        raise UserError(f"{name}.data is not set; give LLaVA JSON or JSONL files, or WebDataset tars")
    if phase.data == MINI:
        return [f"{name} data: drawn scenes of the miniature"]
    instructions = load_once(phase.data, phase.images, drop_missing=config.drop_missing)
    return [
        f"{name} data: {len(instructions):,} samples, {int((~instructions.has_image).sum()):,} of them text-only"
        + (f", {instructions.num_dropped:,} dropped" if instructions.num_dropped else "")
        + f"; {num_steps(phase, len(instructions)):,} steps of {phase.batch_size}"
    ]


def num_steps(phase: PhaseConfig, num_samples: int) -> int:
    """Optimizer steps of a phase."""
    return phase.max_steps or max(1, math.ceil(phase.epochs * steps_per_epoch(num_samples, phase.batch_size)))


def load_once(data: str | list[str], images: str | list[str] | None, *, drop_missing: bool) -> Instructions:
    """`load_instructions`, kept: half a million records take a minute to read, and several steps of a run need them."""
    frozen = [tuple(value) if isinstance(value, list) else value for value in (data, images)]
    return _load(*frozen, drop_missing)


@functools.lru_cache(maxsize=2)
def _load(data: Any, images: Any, drop_missing: bool) -> Instructions:
    return load_instructions(data, images, drop_missing=drop_missing)


def accumulation(phase: PhaseConfig, num_processes: int, name: str) -> int:
    """Micro-steps per optimizer step that keep the global batch.

    Raises:
        UserError: it does not divide.
    """
    together = phase.micro_batch_size * num_processes
    if phase.batch_size % together:
        fitting = [n for n in range(1, phase.batch_size + 1) if phase.batch_size % (n * num_processes) == 0]
        near = min(fitting, key=lambda n: abs(n - phase.micro_batch_size), default=None)
        advice = (
            f"set {name}.micro_batch_size={near}"
            if near is not None
            else f"use a number of processes that divides {phase.batch_size}, or another {name}.batch_size"
        )
        raise UserError(
            f"{name}.batch_size is {phase.batch_size}, which {num_processes} processes with micro_batch_size "
            f"{phase.micro_batch_size} cannot make up: {advice}"
        )
    return phase.batch_size // together


def tower_to_make(config: Stage2Config, tower: str) -> tuple[Path, str] | None:
    """Runs folder and name of the stage 1 run that would make a tower `<runs_dir>/<run>/tower`, if it has to run."""
    path = Path(tower)
    if config.stage1 is None or path.name != "tower" or len(path.parts) < 2 or path.exists():
        return None
    return path.parent.parent, path.parent.name
