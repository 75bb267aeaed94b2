"""Stage 1's own training step on models without weights: what plans count and benchmarks measure.

Made on the meta device, it takes neither memory nor time and `memory` counts it; made elsewhere, the models are random
and the step is real.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from dcr_mllm.headers import read_json
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
from dcr_mllm.towers import VisionTower, vision_tower
from dcr_mllm.zero import parameter_memory
from stage1_dcr.config import Phase, Stage1Config
from stage1_dcr.denoiser import Denoiser
from stage1_dcr.objective import Predict, auto_rows_per_chunk
from stage1_dcr.projector import CONFIG_NAME, Projector
from stage1_dcr.step import TrainingStep
from stage1_dcr.train import Stage1, prepare
from stage1_dcr.views import NUM_VIEW_PARAMS

REST = "views and loss"


class EmptyStage(Stage1):
    """Stage 1 with random models in the shapes that the configs on disk say; of weight files, only headers are read."""

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
        hidden_width = self.config.projector_width
        if self.config.projector is not None:
            hidden_width = read_json(Path(self.config.projector) / CONFIG_NAME)["hidden_width"]
        return Projector(self.input_width, self.denoiser.cross_attention_dim, hidden_width=hidden_width)


@dataclasses.dataclass(kw_only=True)
class PlannedStep:
    """A phase's training step and its inputs.

    Attributes:
        module: What the Trainer would train.
        denoiser: Its frozen denoiser.
        batch: Inputs of a micro-step.
        autocast: Whether the Trainer would run it under bf16 autocast (DeepSpeed casts the weights instead).
        objective: Of the phase.
        rows: Rows of the grid in memory at a time.
    """

    module: TrainingStep
    denoiser: Denoiser
    batch: dict[str, Tensor]
    autocast: bool
    objective: str
    rows: int

    @classmethod
    def build(cls, config: Stage1Config, launch: Launch, phase: Phase) -> PlannedStep:
        """Models and inputs as a process of this launch would hold them."""
        stage = EmptyStage(config, launch)
        rows = config.rows_per_chunk
        if rows == "auto":
            _, height, width = stage.latent_shape
            rows = auto_rows_per_chunk(
                config.batch_size,
                launch.device,
                latent_area=height * width,
                num_negatives=config.num_negatives(launch.num_processes),
            )
        stage.config = dataclasses.replace(config, rows_per_chunk=rows)
        stage.denoiser.attend_as_on(launch.device)
        in_engine = launch.deepspeed is not None
        module = prepare(stage, phase, stage.new_projector())
        # There are no other processes here: their conditions are copies of this one's.
        module.gather = lambda own: (own.float().repeat(launch.num_processes, 1), 0)
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
        return cls(
            module=module.train(),
            denoiser=stage.denoiser,
            batch=batch,
            autocast=launch.precision == "bf16" and not in_engine,
            objective=config.objective_of(phase),
            rows=min(rows, config.batch_size),
        )

    def to(self, device: torch.device) -> None:
        """Move models and inputs."""
        for module in (self.module, *self.module.frozen()):
            module.to(device)
        self.denoiser.to(device)
        self.batch = {name: tensor.to(device) for name, tensor in self.batch.items()}

    def run(self) -> None:
        """Forward and backward pass of a micro-step."""
        with torch.autocast(self.batch["images"].device.type, dtype=torch.bfloat16, enabled=self.autocast):
            loss = self.module(**self.batch)["loss"]
        loss.backward()

    def components(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules whose activations are told apart."""
        for module in self.module.children():
            yield ("projector" if isinstance(module, Projector) else "tower"), module
        yield from self.frozen_parts()

    @property
    def num_full_chunks(self) -> int:
        """Calls of the denoiser with as many rows as are in memory at a time."""
        return len(self.batch["noise"]) // self.rows if self.objective == "dcr" else 1

    def resident(self, launch: Launch) -> dict[str, int]:
        """Bytes on each device between steps, by component."""
        parts = {f"{name} weights": num_bytes(held_by(part)) for name, part in self.frozen_parts()}
        return {**parts, **parameter_memory(self.module, launch), "batch": num_bytes(self.batch.values())}

    def frozen_parts(self) -> Iterator[tuple[str, nn.Module]]:
        """What lies on the device outside of the trained module."""
        for module in self.module.frozen():
            # In the tower phase, a frozen tower is the base that the trained one is kept close to.
            tower = "reference tower" if hasattr(self.module, "tower") else "tower"
            yield "projector" if isinstance(module, Projector) else tower, module
        networks = self.denoiser.modules()
        yield "autoencoder", networks["vae"].encoder
        yield "denoiser", networks["unet"]

    def make_fake(self) -> None:
        """From the meta device to fake tensors."""
        for module in (self.module, *self.module.frozen(), *self.denoiser.modules().values()):
            make_fake(module)
        self.batch = {name: fake_like(tensor) for name, tensor in self.batch.items()}

    def held(self) -> Iterator[Tensor]:
        """Everything that is in memory before the step."""
        for module in (self.module, *self.module.frozen(), *self.denoiser.modules().values()):
            yield from held_by(module)
        yield self.denoiser.prompt
        yield from self.batch.values()


def planned_memory(
    config: Stage1Config, launch: Launch, phase: Phase, *, shared_prompt: bool = True
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes on each device by component: between the steps of a phase, and what a micro-step adds at its peak.

    Args:
        config: Of the stage.
        launch: How it runs.
        phase: `projector` or `tower`.
        shared_prompt: False counts the plain UNet call, for comparisons.
    """
    with torch.device("meta"):
        step = PlannedStep.build(config, launch, phase)
        resident = step.resident(launch)
    with fake_tensors(), kernels_of(launch.device):
        step.make_fake()
        # All full chunks need the same, but the first one finds no gradients of earlier ones.
        chunk = 2 if step.num_full_chunks > 1 else 1
        predict = functools.partial(step.denoiser.predict, shared_prompt=shared_prompt)
        step.denoiser.predict = _only_at_call(chunk, predict)  # type: ignore[method-assign, assignment]
        return resident, step_memory(step.run, step.components(), step.held(), rest=REST)


def _only_at_call(number: int, predict: Predict) -> Predict:
    """`predict` at one of its calls; at the others a stand-in that costs nothing and depends on the conditions too."""
    calls = itertools.count(1)

    def chosen(noisy_latents: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        if next(calls) == number:
            return predict(noisy_latents, timesteps, conditions)
        return conditions.mean(dim=-1)[..., None, None, None].expand(-1, -1, *noisy_latents.shape[1:])

    return chosen


def unet_flops(config: Stage1Config, launch: Launch, conditions_per_row: int) -> int:
    """Floating-point operations of the UNet in one micro-step, forward and backward (by activations: it is frozen)."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    with torch.device("meta"):
        stage = EmptyStage(config, launch)
    stage.denoiser.attend_as_on(launch.device)
    aten = torch.ops.aten
    attention = {  # the CPU's names of what the counter knows by CUDA's
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
            sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    with fake_tensors():
        make_fake(stage.denoiser.modules()["unet"])
        conditions = torch.randn(1, conditions_per_row, stage.denoiser.cross_attention_dim, requires_grad=True)
        latents, timesteps = torch.randn(1, *stage.latent_shape), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            stage.denoiser.predict(latents, timesteps, conditions).sum().backward()
    return counter.get_total_flops() * config.batch_size
