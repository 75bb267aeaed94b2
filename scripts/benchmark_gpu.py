#!/usr/bin/env python
"""Time and memory of stage 1's step on one GPU, as a table and as JSON.

    bash scripts/benchmark_gpu.sh [--batch-sizes 8,16,32,64] [--variants eager,compile] [--out FILE]

Three things are measured at each batch size and in each variant:

* **dense**: the loss and the gradients of the conditions, by the plain UNet of diffusers on all B * (B + 1) samples in
  one call and ordinary autograd, as the published code has it;
* **row-wise**: the same by `dcr_loss` over `Denoiser.predict`, as training does;
* **step**: the whole micro-step of the tower phase around it: VAE, views, tower with LoRA, projector, loss, backward.
  No data loading, no optimizer.

A variant is `eager`, or settings of `hardware` joined by `+`: compile, cuda_graphs, channels_last, tf32, fused, math.
Without `--denoiser` and `--tower` the models have random weights and the architecture of Stable Diffusion 2.1-base and
of CLIP ViT-L/14; time and memory do not depend on the values. What does not fit is printed as OOM. Peak memory
is all that PyTorch had allocated at once, weights included (on a CPU: the growth of the resident size).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from dcr_mllm.errors import UserError  # noqa: E402
from dcr_mllm.hardware import set_tf32  # noqa: E402
from dcr_mllm.runs import write_text_atomic  # noqa: E402
from dcr_mllm.towers import ImageStatistics, VisionTower, add_lora, lora_config  # noqa: E402
from scripts.measuring import PeakMemory, give_memory_back, machine  # noqa: E402
from stage1_dcr.config import Stage1Config  # noqa: E402
from stage1_dcr.denoiser import Denoiser  # noqa: E402
from stage1_dcr.hardware import Stage1Hardware, choose_attention, prepare_denoiser  # noqa: E402
from stage1_dcr.objective import auto_rows_per_chunk, contrast, dcr_loss  # noqa: E402
from stage1_dcr.projector import Projector  # noqa: E402
from stage1_dcr.step import TrainingStep  # noqa: E402
from stage1_dcr.view_config import ViewConfig  # noqa: E402
from stage1_dcr.views import draw_view_params  # noqa: E402

SIDES = ("dense", "row-wise", "step")
SETTINGS: dict[str, dict[str, Any]] = {
    "eager": {},
    **{name: {name: True} for name in ("compile", "cuda_graphs", "channels_last", "tf32")},
    **{name: {"attention": name} for name in ("fused", "math")},
}
CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")

# config.json of unet/ and vae/ in stable-diffusion-2-1-base, without what its class has as defaults.
UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (CROSS[0], CROSS[0], CROSS[0], PLAIN[0]),
    "up_block_types": (PLAIN[1], CROSS[1], CROSS[1], CROSS[1]),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
VAE: dict[str, Any] = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
# config.json of openai/clip-vit-large-patch14.
TOWER: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
}
TINY_UNET = UNET | {
    "block_out_channels": (8, 16, 16, 16),
    "attention_head_dim": (1, 2, 2, 2),
    "cross_attention_dim": 32,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
TINY_VAE = VAE | {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
TINY_TOWER = TOWER | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "projection_dim": 24,
}
PROMPT_TOKENS = 77


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[1], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-sizes", type=numbers, default=[8, 16, 32, 64], help="default 8,16,32,64")
    parser.add_argument("--variants", default="eager,compile", help="default eager,compile")
    parser.add_argument("--sides", default=",".join(SIDES), help=f"default {','.join(SIDES)}")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per cell, of which the median counts")
    parser.add_argument("--rows-per-chunk", type=int, default=None, help="default: as in training")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on CUDA, fp32 on a CPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--denoiser", help="Stable Diffusion directory or cached id instead of random weights")
    parser.add_argument("--tower", help="CLIP or SigLIP directory or cached id instead of random weights")
    parser.add_argument("--tiny", action="store_true", help="models that a CPU runs in seconds; for trying out")
    parser.add_argument("--out", type=Path, help="default runs/benchmark-gpu-DATE-TIME.json")
    options = parser.parse_args(argv)
    try:
        variants = {name: hardware_of(name) for name in options.variants.split(",")}
        check(options)
        return run(options, variants)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def hardware_of(variant: str) -> Stage1Hardware:
    """The settings behind a variant such as `compile+channels_last`."""
    settings: dict[str, Any] = {}
    for part in variant.split("+"):
        if part not in SETTINGS:
            raise UserError(f"--variants has {part!r}, expected one or several of {', '.join(SETTINGS)} joined by +")
        settings |= SETTINGS[part]
    return Stage1Hardware(**settings)


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be measured before a model is made."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is visible; --device cpu --tiny shows that the script works, and no more")
    if min(options.batch_sizes) < 2 or options.steps < 1:
        raise UserError("--batch-sizes must be at least 2 and --steps at least 1")
    unknown = set(options.sides.split(",")) - set(SIDES)
    if unknown:
        raise UserError(f"--sides has {sorted(unknown)[0]!r}, expected some of {', '.join(SIDES)}")
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "fp32")
    options.out = options.out or Path("runs") / time.strftime("benchmark-gpu-%Y%m%d-%H%M%S.json")
    if options.out.exists():
        raise UserError(f"{options.out} exists; give another --out")


def run(options: argparse.Namespace, variants: dict[str, Stage1Hardware]) -> int:
    """Measure all cells, print them as they come, and keep the JSON file complete after each."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "precision": options.precision,
        "denoiser": options.denoiser or ("random, tiny" if options.tiny else "random, Stable Diffusion 2.1-base"),
        "tower": options.tower or ("random, tiny" if options.tiny else "random, CLIP ViT-L/14"),
        "machine": {**machine(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "cells": [],
    }
    if options.device == "cuda":
        report["device_memory_gb"] = torch.cuda.get_device_properties(0).total_memory / 1e9
    print(", ".join(str(report[key]) for key in ("device", "precision", "denoiser", "tower")), flush=True)
    print(f"{'side':<9} {'variant':<22} {'batch':>5} {'rows':>4} {'ms/step':>9} {'images/s':>9} {'peak GB':>8} first s")
    for variant, hardware in variants.items():
        models = Models(options, hardware)
        for batch_size in options.batch_sizes:
            for side in options.sides.split(","):
                if side == "dense" and hardware.cuda_graphs:
                    continue  # what is recorded is the row-wise call
                cell = measure_cell(models, side, batch_size, options)
                cell = {"side": side, "variant": variant, "batch_size": batch_size, **cell}
                report["cells"].append(cell)
                write_text_atomic(options.out, json.dumps(report, indent=2) + "\n")
                print(line(cell), flush=True)
        del models
        release(options.device)
    print(f"written to {options.out}")
    return int(any(cell["status"] == "failed" for cell in report["cells"]))


def line(cell: dict[str, Any]) -> str:
    start = f"{cell['side']:<9} {cell['variant']:<22} {cell['batch_size']:>5} {cell['rows_per_chunk']:>4}"
    if cell["status"] != "ok":
        return f"{start} {'OOM' if cell['status'] == 'oom' else 'failed: ' + cell['error']:>9}"
    return (
        f"{start} {1000 * cell['seconds']:>9.1f} {cell['images_per_second']:>9.2f} {cell['peak_bytes'] / 1e9:>8.2f} "
        f"{cell['first_seconds']:>7.2f}"
    )


class Models:
    """The frozen denoiser with one variant's settings, and what the whole step needs beside it."""

    def __init__(self, options: argparse.Namespace, hardware: Stage1Hardware):
        self.device = torch.device(options.device)
        self.hardware = hardware
        self.dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        torch.manual_seed(0)
        if self.device.type == "cuda":
            set_tf32(hardware.tf32)
        choose_attention(hardware.attention)
        self.denoiser = self._denoiser(options)
        prepare_denoiser(self.denoiser, hardware)
        self.denoiser.to(self.device)
        self.tower, self.statistics = self._tower(options)
        add_lora(self.tower, lora_config(16, 16, 0.1))
        self.projector = Projector(self.tower.width, self.denoiser.cross_attention_dim)

    def _denoiser(self, options: argparse.Namespace) -> Denoiser:
        from diffusers import AutoencoderKL, UNet2DConditionModel

        if options.denoiser:
            from dcr_mllm.headers import resolve_weights

            return Denoiser.load(resolve_weights(options.denoiser, "denoiser"), dtype=self.dtype)
        unet = self._random(UNet2DConditionModel, TINY_UNET if options.tiny else UNET)
        vae = self._random(AutoencoderKL, TINY_VAE if options.tiny else VAE)
        prompt = torch.randn(PROMPT_TOKENS, unet.config.cross_attention_dim)
        schedule = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
        return Denoiser(vae, unet, schedule, prompt, prediction_type="epsilon")

    def _random(self, cls: type, config: dict[str, Any]) -> Any:
        """Made in place and in its precision: 865 M parameters take a minute on a CPU and seconds on a GPU."""
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                return cls(**config)
        finally:
            torch.set_default_dtype(torch.float32)

    def _tower(self, options: argparse.Namespace) -> tuple[VisionTower, ImageStatistics]:
        if options.tower:
            from dcr_mllm.headers import resolve_weights
            from dcr_mllm.towers import image_statistics, load_full_model, vision_tower

            path = resolve_weights(options.tower, "tower")
            return vision_tower(load_full_model(path)), image_statistics(path)
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        config = CLIPVisionConfig(**(TINY_TOWER if options.tiny else TOWER))
        with self.device:
            model = CLIPVisionModelWithProjection(config)
        tower = VisionTower(model.vision_model, model.visual_projection, config.projection_dim)
        tower.requires_grad_(False).eval()
        return tower, ImageStatistics(size=config.image_size, mean=(0.5,) * 3, std=(0.5,) * 3)


def case_of(models: Models, side: str, batch_size: int, rows: int) -> Callable[[], Tensor]:
    """A function that runs one step on a fixed batch and returns its loss."""
    device, denoiser = models.device, models.denoiser
    shape = denoiser.latent_shape(models.statistics.size)
    generator = torch.Generator().manual_seed(batch_size)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    noise, uniform = randn(batch_size, *shape), torch.rand(batch_size, generator=generator).to(device)
    if side == "step":
        config = Stage1Config(
            tower="-", denoiser="-", batch_size=batch_size, rows_per_chunk=rows, hardware=models.hardware
        )
        step = TrainingStep(
            phase="tower",
            tower=models.tower,
            projector=models.projector,
            denoiser=denoiser,
            statistics=models.statistics,
            config=config,
        )
        step.move_frozen(device, models.dtype)
        step.to(device).train()
        size = (batch_size, 3, models.statistics.size, models.statistics.size)
        images = torch.randint(256, size, generator=generator, dtype=torch.uint8).to(device)
        views = draw_view_params(ViewConfig(), generator, batch_size).to(device)

        def whole_step() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=models.dtype == torch.bfloat16):
                loss = step(images, views, uniform, noise)["loss"]
            loss.backward()
            step.zero_grad()
            return loss.detach()

        return whole_step

    conditions = randn(batch_size, denoiser.cross_attention_dim)
    positives = conditions + 0.2 * randn(batch_size, denoiser.cross_attention_dim)
    latents, timesteps = randn(batch_size, *shape), (uniform * denoiser.num_train_timesteps).long()
    noisy = denoiser.add_noise(latents, noise, timesteps)
    target = denoiser.target(latents, noise, timesteps)

    def rowwise() -> Tensor:
        leaves = [x.detach().requires_grad_() for x in (conditions, positives)]
        loss, _ = dcr_loss(*leaves, noisy, timesteps, target, denoiser.predict, rows_per_chunk=rows)
        loss.backward()
        return loss.detach()

    def dense() -> Tensor:
        leaves = [x.detach().requires_grad_() for x in (conditions, positives)]
        grid = torch.cat([leaves[0].expand(batch_size, -1, -1), leaves[1][:, None]], dim=1)
        predictions = denoiser.predict(noisy, timesteps, grid, shared_prompt=False)
        loss = contrast(predictions, target, torch.arange(batch_size, device=device), tau=0.1)[0] / batch_size
        loss.backward()
        return loss.detach()

    return {"row-wise": rowwise, "dense": dense}[side]


def measure_cell(models: Models, side: str, batch_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of one cell, or why there are none."""
    area = models.denoiser.latent_shape(models.statistics.size)[1] ** 2
    rows = options.rows_per_chunk or auto_rows_per_chunk(batch_size, models.device, latent_area=area)
    rows = batch_size if side == "dense" else min(rows, batch_size)
    if models.hardware.cuda_graphs:
        models.denoiser.record_graphs()  # anew: recordings of other batch sizes hold memory
    release(options.device)
    try:
        found = measure(case_of(models, side, batch_size, rows), options)
        found = {"status": "ok", **found, "images_per_second": batch_size / found["seconds"]}
    except torch.OutOfMemoryError:
        found = {"status": "oom"}
    except Exception as error:  # the other cells are worth having; this one is shown, and the exit code tells
        traceback.print_exc()
        found = {"status": "failed", "error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"rows_per_chunk": rows, "hardware": asdict(models.hardware), **found}


def measure(step: Callable[[], Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the first step and the median of later ones, and the peak memory of those."""

    def timed() -> tuple[float, Tensor]:
        start = time.perf_counter()
        loss = step()
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, loss

    first, loss = timed()
    timed()  # kernels are chosen and caches are filled within two steps
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        seconds = [timed()[0] for _ in range(options.steps)]
        peak = torch.cuda.max_memory_allocated()
    else:
        give_memory_back()
        with PeakMemory() as memory:
            seconds = [timed()[0] for _ in range(options.steps)]
        peak = memory.peak - memory.before
    return {
        "seconds": statistics.median(seconds),
        "first_seconds": first,
        "peak_bytes": peak,
        "loss": loss.item(),
    }


def release(device: str) -> None:
    """Hand back the memory of what ran before, also of what an exception's frames held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
