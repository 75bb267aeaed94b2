#!/usr/bin/env python
"""Memory that `dcr-mllm plan` predicts for a training step, against what the step takes. Prints a Markdown table.

    python scripts/benchmark_plan.py [--settings mini|mid|stage2|all] [--published]

Both sides are peak memory minus what is held before the step (weights, gradients, inputs, libraries), fp32 on the CPU.
**Estimated** counts tensors while the step runs on tensors without data. **Measured** is the same step on random
weights in a process of its own: the kernel's high-water mark of the resident size over the second step, minus the
resident size before it; the first step fills caches. The C library is told to hand freed blocks of 64 KiB and more
back at once, so that the resident size follows the tensors.

`mini` is the shipped miniature; `mid` a UNet of Stable Diffusion 2's shape with a quarter of its channels (54 M
parameters), an autoencoder with a quarter of the channels and a CLIP of 10 M; `stage2` the miniature's LLaVA.
`--published` adds what is predicted for CLIP L/14 at 224 px and Stable Diffusion 2.1-base, where nothing is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

LIMIT = 0.15
GB = 1e9
MID_UNET = {
    "sample_size": 28,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (80, 160, 320, 320),
    "norm_num_groups": 16,
    "attention_head_dim": (2, 4, 8, 8),
    "cross_attention_dim": 256,
    "use_linear_projection": True,
}
MID_VAE = {
    "block_out_channels": (32, 64, 128, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
MID_TEXT = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 2}
MID_CLIP = {
    "projection_dim": 256,
    "text_config": {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1},
    "vision_config": {
        "hidden_size": 320,
        "intermediate_size": 1280,
        "num_attention_heads": 5,
        "num_hidden_layers": 8,
        "patch_size": 16,
        "image_size": 128,
        "projection_dim": 256,
    },
}
MINI = {"tower": "mini", "denoiser": "mini", "data": "mini", "projector_width": 256}
# Group, phase, what differs from the defaults.
SETTINGS: list[tuple[str, str, dict[str, Any]]] = [
    ("mini", "tower", {"batch_size": 8, "rows_per_chunk": 1}),
    ("mini", "tower", {"batch_size": 8, "rows_per_chunk": 8}),
    ("mini", "tower", {"batch_size": 8, "rows_per_chunk": 4, "keep_close": 3.0}),
    ("mini", "projector", {"batch_size": 16, "rows_per_chunk": 4}),
    ("mini", "tower", {"batch_size": 8, "rows_per_chunk": 4, "diffusion_size": 96}),
    ("mini", "projector", {"batch_size": 16, "projector_objective": "reconstruction", "diffusion_size": 96}),
    ("mid", "tower", {"batch_size": 4, "rows_per_chunk": 1}),
    ("mid", "tower", {"batch_size": 4, "rows_per_chunk": 4}),
    ("mid", "projector", {"batch_size": 8, "rows_per_chunk": 2}),
    ("mid", "tower", {"batch_size": 8, "rows_per_chunk": 1}),
    ("mid", "tower", {"batch_size": 4, "rows_per_chunk": 1, "diffusion_size": 224}),
    ("mid", "projector", {"batch_size": 2, "rows_per_chunk": 2, "diffusion_size": 224}),
    ("stage2", "align", {"micro_batch_size": 8, "length": 128}),
    ("stage2", "instruct", {"micro_batch_size": 8, "length": 128}),
    ("stage2", "instruct", {"micro_batch_size": 2, "length": 512, "gradient_checkpointing": True}),
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", choices=("mini", "mid", "stage2", "all"), default="all")
    parser.add_argument("--published", action="store_true", help="predictions for CLIP L/14 and SD 2.1-base")
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not Path("/proc/self/status").exists():
        parser.error("memory is read from /proc: Linux is needed")
    if options.index is not None:
        print(json.dumps(compare(options.index, options.models)))
        return 0
    print(
        "| models | phase | setting | estimated (MB) | measured (MB) | ratio |\n|---|---|---|---:|---:|---:|",
        flush=True,
    )
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for index, (group, phase, setting) in enumerate(SETTINGS):
            if options.settings in (group, "all"):
                found = run_child(index, Path(folder))
                worst = max(worst, abs(found["ratio"] - 1))
                print(row(group, phase, setting, found), flush=True)
        if options.published:
            published(Path(folder))
    return int(worst > LIMIT)


def row(group: str, phase: str, setting: dict[str, Any], found: dict[str, float]) -> str:
    listed = ", ".join(f"{key} {value}" for key, value in setting.items())
    sizes = f"{found['estimated'] / 1e6:.1f} | {found['measured'] / 1e6:.1f}"
    return f"| {group} | {phase} | {listed} | {sizes} | {found['ratio']:.3f} |"


def run_child(index: int, models: Path) -> dict[str, float]:
    """Both numbers of a setting, from a process of its own."""
    block = str(64 << 10)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": block, "MALLOC_TRIM_THRESHOLD_": block}
    command = [sys.executable, __file__, "--index", str(index), "--models", str(models)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"error: setting {SETTINGS[index]} failed")
    return json.loads(done.stdout.splitlines()[-1])


def compare(index: int, models: Path) -> dict[str, float]:
    """Estimate and measurement of a setting, in this process."""
    from scripts.measuring import PeakMemory, give_memory_back

    estimated, step = stage2_case(index) if SETTINGS[index][0] == "stage2" else stage1_case(index, models)
    step.run()
    gc.collect()
    give_memory_back()
    with PeakMemory() as memory:
        step.run()
    measured = memory.peak - memory.before
    return {"estimated": estimated, "measured": measured, "ratio": estimated / measured}


def stage1_case(index: int, models: Path) -> tuple[int, Any]:
    """The estimate in bytes and the real step."""
    from dcr_mllm.launch import Launch
    from stage1_dcr.config import Stage1Config
    from stage1_dcr.plan_step import PlannedStep, planned_memory

    group, phase, setting = SETTINGS[index]
    launch = Launch(device="cpu", num_processes=1, precision="fp32", deepspeed=None)
    config = Stage1Config(**{**(MINI if group == "mini" else mid_models(models)), **setting})
    _, step = planned_memory(config, launch, phase)
    return sum(step.values()), PlannedStep.build(config, launch, phase)


def mid_models(models: Path) -> dict[str, Any]:
    """Directories without weights, which plans do not read and random models do not need."""
    from tests.published_models import save_hollow_clip, save_hollow_denoiser

    tower, denoiser = models / "clip", models / "denoiser"
    if not denoiser.exists():
        save_hollow_clip(tower, MID_CLIP)
        save_hollow_denoiser(denoiser, MID_UNET, MID_VAE, MID_TEXT)
    return {"tower": str(tower), "denoiser": str(denoiser), "data": "mini"}


def stage2_case(index: int) -> tuple[int, Any]:
    """The same for the miniature's LLaVA."""
    from dcr_mllm.launch import Launch
    from stage2_llava.config import AlignConfig, InstructConfig, Stage2Config
    from stage2_llava.plan_step import PlannedStep, planned_memory

    _, name, setting = SETTINGS[index]
    cls = AlignConfig if name == "align" else InstructConfig
    phase = cls(data="mini", micro_batch_size=setting["micro_batch_size"], batch_size=setting["micro_batch_size"])
    config = Stage2Config(
        towers={"baseline": "mini"},
        llm="mini",
        gradient_checkpointing=setting.get("gradient_checkpointing", False),
        **{name: phase},
    )
    launch = Launch(device="cpu", num_processes=1, precision="fp32", deepspeed=None)
    arguments = (config, launch, name, phase, setting["length"])
    _, step = planned_memory(*arguments)
    return sum(step.values()), PlannedStep.build(*arguments)


def published(folder: Path) -> None:
    """Predictions per GPU for the tower phase of CLIP L/14 at 224 px, and for LLaVA-1.5-7B; bf16, on eight GPUs."""
    from dcr_mllm.launch import launch_on
    from stage1_dcr.config import Stage1Config
    from stage1_dcr.plan_step import planned_memory
    from stage2_llava import plan_step
    from stage2_llava.config import InstructConfig, Stage2Config
    from tests.published_models import CLIP_L14, save_hollow_clip, save_hollow_denoiser, save_hollow_llama

    print("\n| stage | setting | between steps (GB) | step (GB) | peak (GB) |\n|---|---|---:|---:|---:|")

    def show(stage: int, setting: str, memory: tuple[dict[str, int], dict[str, int]]) -> None:
        held, own = (sum(part.values()) / GB for part in memory)
        print(f"| {stage} | {setting} | {held:.1f} | {own:.1f} | {held + own:.1f} |", flush=True)

    models = {
        "tower": str(save_hollow_clip(folder / "clip-l14")),
        "denoiser": str(save_hollow_denoiser(folder / "sd21")),
        "data": "mini",
    }
    for deepspeed, rows, shared in (
        ("none", 16, False),
        ("zero2", 16, False),
        ("zero2", 16, True),
        ("zero2", 4, True),
        ("zero2", 1, True),
    ):
        config = Stage1Config(**models, rows_per_chunk=rows)
        memory = planned_memory(config, launch_on("cuda", 8, "bf16", deepspeed), "tower", shared_prompt=shared)
        show(1, f"{deepspeed}, rows_per_chunk {rows}, {'shared' if shared else 'plain'} prompt", memory)

    large = {**CLIP_L14, "vision_config": {**CLIP_L14["vision_config"], "image_size": 336}}
    instruct = InstructConfig(data="mini")
    llava = Stage2Config(
        towers={"baseline": str(save_hollow_clip(folder / "clip-l14-336", large))},
        llm=str(save_hollow_llama(folder / "vicuna-7b")),
    )
    for deepspeed in ("zero2", "zero3"):
        launch = launch_on("cuda", 8, "bf16", deepspeed)
        memory = plan_step.planned_memory(llava, launch, "instruct", instruct, llava.max_length)
        show(2, f"{deepspeed}, LoRA, micro_batch_size {instruct.micro_batch_size}, {llava.max_length} tokens", memory)


if __name__ == "__main__":
    sys.exit(main())
