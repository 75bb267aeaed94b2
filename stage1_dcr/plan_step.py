"""Stage 1's own training step on models without weights: what plans count and benchmarks measure.

Made on the meta device, it takes neither memory nor time and `memory` counts it; made elsewhere, the models are random
and the step is real.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dcr_mllm.headers import read_json
from dcr_mllm.launch import Launch
from dcr_mllm.memory import default_dtype, fake_like, fake_tensors, held_by, make_fake, step_memory
from dcr_mllm.towers import VisionTower, vision_tower
from stage1_dcr.config import Stage1Config
from stage1_dcr.denoiser import Denoiser
from stage1_dcr.objective import auto_rows_per_chunk
from stage1_dcr.projector import Projector
from stage1_dcr.step import Phase, TrainingStep
from stage1_dcr.train import Stage1, prepare
from stage1_dcr.views import NUM_VIEW_PARAMS

REST = "views and loss"


def conditions_per_row(config: Stage1Config) -> int:
    """UNet samples in a row of the grid: a condition per image, and the augmented view's."""
    return config.batch_size + 1


class EmptyStage(Stage1):
    """Stage 1 with random models in the shapes that the configs on disk say; no weight file is opened but for headers."""

    def load_denoiser(self) -> Denoiser:
        from diffusers import AutoencoderKL, UNet2DConditionModel

        path = self.denoiser_path
        with default_dtype(self.dtype):
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(path, subfolder="vae"))
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(path, subfolder="unet"))
        text = read_json(path / "text_encoder" / "config.json")
        scheduler = read_json(path / "scheduler" / "scheduler_config.json")
        declared = self.config.prediction_type or scheduler.get("prediction_type", "epsilon")
        return Denoiser(
            vae,
            unet,
            torch.linspace(0.999, 0.005, scheduler.get("num_train_timesteps", 1000), device="cpu"),
            torch.randn(text.get("max_position_embeddings", 77), text.get("hidden_size", 512), device="cpu"),
            prediction_type="epsilon" if declared == "epsilon" else "velocity",
        )

    def load_tower(self) -> VisionTower:
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(self.tower_path, local_files_only=True)
        return vision_tower(AutoModel.from_config(config, dtype=torch.float32))

    def new_projector(self) -> Projector:
        return Projector(self.tower.width, self.denoiser.cross_attention_dim, hidden_width=self.config.projector_width)


@dataclasses.dataclass(kw_only=True)
class PlannedStep:
    """A phase's training step and its inputs.

    Attributes:
        module: What the Trainer would train.
        denoiser: Its frozen denoiser.
        batch: Inputs of a micro-step.
        autocast: Whether the Trainer would run it under bf16 autocast (DeepSpeed casts the weights instead).
        rows: Rows of the grid in memory at a time.
    """

    module: TrainingStep
    denoiser: Denoiser
    batch: dict[str, Tensor]
    autocast: bool
    rows: int

    @classmethod
    def build(cls, config: Stage1Config, launch: Launch, phase: Phase) -> PlannedStep:
        """Models and inputs as a process of this launch would hold them."""
        stage = EmptyStage(config, launch)
        rows = config.rows_per_chunk
        if rows == "auto":
            _, height, width = stage.latent_shape
            rows = auto_rows_per_chunk(config.batch_size, launch.device, latent_area=height * width)
        stage.config = dataclasses.replace(config, rows_per_chunk=rows)
        stage.denoiser.attend_as_on(launch.device)
        in_engine = launch.deepspeed is not None
        module = prepare(stage, phase, stage.new_projector())
        for part in (*module.frozen(), *([module] if in_engine else [])):
            part.to(stage.dtype)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # of an earlier micro-step
        size = stage.crop_size
        batch = {
            "images": torch.randint(256, (config.batch_size, 3, size, size), dtype=torch.uint8),
            "view_params": torch.rand(config.batch_size, NUM_VIEW_PARAMS),
            "timestep_uniform": torch.rand(config.batch_size),
            "noise": torch.randn(config.batch_size, *stage.latent_shape),
        }
        autocast = launch.precision == "bf16" and not in_engine
        return cls(module=module.train(), denoiser=stage.denoiser, batch=batch, autocast=autocast, rows=rows)

    def run(self) -> None:
        """Forward and backward pass of a micro-step."""
        with torch.autocast(self.batch["images"].device.type, dtype=torch.bfloat16, enabled=self.autocast):
            loss = self.module(**self.batch)["loss"]
        loss.backward()

    def components(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules whose activations are told apart."""
        for module in (*self.module.children(), *self.module.frozen()):
            yield ("projector" if isinstance(module, Projector) else "tower"), module
        networks = self.denoiser.modules()
        yield "autoencoder", networks["vae"].encoder
        yield "denoiser", networks["unet"]

    def held(self) -> Iterator[Tensor]:
        """Everything that is in memory before the step."""
        for module in (self.module, *self.module.frozen(), *self.denoiser.modules().values()):
            yield from held_by(module)
        yield self.denoiser.prompt
        yield from self.batch.values()


def planned_memory(config: Stage1Config, launch: Launch, phase: Phase) -> dict[str, int]:
    """What a micro-step of this phase adds at its peak to the memory that is held before it, in bytes by component."""
    with torch.device("meta"):
        step = PlannedStep.build(config, launch, phase)
    with fake_tensors():
        for module in (step.module, *step.module.frozen(), *step.denoiser.modules().values()):
            make_fake(module)
        step.batch = {name: fake_like(tensor) for name, tensor in step.batch.items()}
        return step_memory(step.run, step.components(), step.held(), rest=REST)


