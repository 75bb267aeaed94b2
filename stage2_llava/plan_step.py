"""Stage 2's own training step on a model without weights: what plans count and benchmarks measure.

Made on the meta device, it takes neither memory nor time and `planned_memory` counts it; made elsewhere, the model is
random and the step is real.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dcr_mllm.launch import Launch
from dcr_mllm.memory import (
    default_dtype,
    fake_like,
    fake_tensors,
    held_by,
    kernels_of,
    make_fake,
    num_bytes,
    step_memory,
)
from dcr_mllm.zero import parameter_memory
from stage2_llava.config import PhaseConfig, Stage2Config
from stage2_llava.step import LlavaStep
from stage2_llava.train import empty_llava, make_trainable
from stage2_llava.tuning import trainable_in_fp32

REST = "loss"


@dataclass(kw_only=True)
class PlannedStep:
    """A phase's training step and its inputs.

    Attributes:
        module: What the Trainer would train.
        batch: Inputs of a micro-step.
        autocast: Whether the Trainer would run it under bf16 autocast (DeepSpeed casts the weights instead).
    """

    module: LlavaStep
    batch: dict[str, Tensor]
    autocast: bool

    @classmethod
    def build(cls, config: Stage2Config, launch: Launch, name: str, phase: PhaseConfig, length: int) -> PlannedStep:
        """Model and inputs as a process of this launch would hold them.

        Args:
            config: Of the stage; its first tower.
            launch: How it runs.
            name: `align` or `instruct`.
            phase: Its part of the config.
            length: Tokens of every sample, image tokens included; all of its text is learned.
        """
        dtype = torch.bfloat16 if launch.precision == "bf16" else torch.float32
        in_engine = launch.deepspeed is not None
        with default_dtype(dtype):
            model = make_trainable(empty_llava(config).to(dtype), config, name)
        step = LlavaStep(model)
        if config.gradient_checkpointing:
            step.llava.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
        if in_engine:
            step.to(dtype)
        elif launch.precision == "bf16":
            trainable_in_fp32(model)
        for parameter in step.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # of an earlier micro-step
        batch = inputs(step, phase, length)
        return cls(module=step.train(), batch=batch, autocast=launch.precision == "bf16" and not in_engine)

    def run(self) -> None:
        """Forward and backward pass of a micro-step."""
        device = self.batch["input_ids"].device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.autocast):
            loss = self.module(**self.batch)["loss"]
        loss.backward()

    def components(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules whose activations are told apart."""
        llava: Any = self.module.llava
        yield "tower", llava.model.vision_tower
        yield "projector", llava.model.multi_modal_projector
        yield "language model", llava.model.language_model
        yield "logits", llava.lm_head


def inputs(step: LlavaStep, phase: PhaseConfig, length: int) -> dict[str, Tensor]:
    """A micro-batch of samples with one image each, none of them padded."""
    config = step.llava.config
    size, images, count = config.vision_config.image_size, step.image_tokens, phase.micro_batch_size
    text = length - images
    # Any two tokens will do: the one for images is added to the vocabulary only when a LLaVA is assembled.
    config.image_token_id = 1
    ids = torch.zeros(count, length, dtype=torch.long)
    ids[:, :images] = config.image_token_id
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones(count, length, dtype=torch.long),
        "target_positions": (torch.arange(count)[:, None] * length + images - 1 + torch.arange(text)).flatten(),
        "labels": torch.zeros(count * text, dtype=torch.long),
    }
    if phase.cache_features:
        width = config.vision_config.hidden_size
        batch["image_features"] = torch.randn(count, images, width, dtype=step.llava.lm_head.weight.dtype)
    else:
        batch["pixel_values"] = torch.randn(count, 3, size, size)
    return batch


def planned_memory(
    config: Stage2Config, launch: Launch, name: str, phase: PhaseConfig, length: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes on each device by component: between the steps of a phase, and what a micro-step adds at its peak."""
    with torch.device("meta"):
        step = PlannedStep.build(config, launch, name, phase, length)
        resident = {**parameter_memory(step.module, launch), "batch": num_bytes(step.batch.values())}
    with fake_tensors(), kernels_of(launch.device), _no_data_checks():
        make_fake(step.module)
        step.batch = {key: fake_like(tensor) for key, tensor in step.batch.items()}
        before = [*held_by(step.module), *step.batch.values()]
        return resident, step_memory(step.run, step.components(), before, rest=REST)


@contextmanager
def _no_data_checks() -> Iterator[None]:
    """The library counts image tokens in `input_ids`, which hold nothing here; its own switch turns that off."""
    with mock.patch.dict(os.environ, {"TRANSFORMERS_DISABLE_TORCH_CHECK": "1"}):
        yield
