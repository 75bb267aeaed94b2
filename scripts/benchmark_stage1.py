#!/usr/bin/env python
"""Speed and memory of the row-wise DCR loss against the undivided grid. Prints one JSON object to stdout.

    python scripts/benchmark_stage1.py --batch-size 16 [--full]

The UNet has Stable Diffusion 2's shape (four levels of 1:2:4:4 channels, two layers per block, linear projections, a
prompt of 77 tokens) with a tenth of its channels and random weights; latents are 4 x 28 x 28, precision is fp32.

* **dense** is the plain UNet of diffusers on ``prompt + c`` for all ``B * B + B`` samples in one call, and autograd.
* **row-wise** is what training uses: ``dcr_loss`` over ``Denoiser.predict``.

Each measurement has a process of its own, so that no side finds the other's memory at hand. A process first takes one
step on a smaller batch, which fills caches and thread pools, and hands freed memory back to the system. Memory is the
peak resident size during the first full step minus the resident size just before it; time is the best of all steps.

``overhead_vs_unet`` is the whole step over forward and backward of the UNet alone, on the same samples in the same
chunks and through the *same* savings; ``overhead_vs_plain_unet`` is the same over the plain UNet. ``cpu_time_ratio``
is ``time_ratio`` in processor time, which says more where the machine has other work.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from scripts.measuring import PeakMemory, give_memory_back, machine, timed  # noqa: E402

SIZE, TOKENS, WIDTH = 28, 77, 256
CHANNELS, HEADS = (32, 64, 128, 128), (1, 2, 4, 4)
LIMITS = {"grad_rel_error": 1e-5, "time_ratio": 0.70, "activation_memory_ratio": 0.10, "overhead_vs_unet": 1.10}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=16, help="of the comparison (default 16)")
    parser.add_argument("--full", action="store_true", help="row-wise at batch 32 too")
    parser.add_argument("--repeats", type=int, default=2, help="steps per process, of which the best time counts")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (default: its own choice)")
    parser.add_argument("--rows-per-chunk", type=int, default=None, help="default: as in training")
    parser.add_argument("--side", choices=("dense", "rowwise", "unet"), help=argparse.SUPPRESS)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.batch_size < 2 or options.repeats < 1:
        parser.error("--batch-size must be at least 2 and --repeats at least 1")
    if not Path("/proc/self/status").exists():
        parser.error("memory is read from /proc: Linux is needed")
    if options.side:
        print(json.dumps(measure(options)))
        return 0
    print(json.dumps(compare(options), indent=2))
    return 0


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all measurements, one process each, and puts the ratios together."""
    from safetensors.torch import load_file

    batch = options.batch_size
    others = sorted(({4, 8, 16} | ({32} if options.full else set())) - {batch})
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        files = {side: Path(folder) / f"{side}.safetensors" for side in ("dense", "rowwise")}
        rowwise = run_child(options, "rowwise", batch, files["rowwise"])
        dense = run_child(options, "dense", batch, files["dense"])
        gradients = {side: load_file(path)["gradients"].double() for side, path in files.items()}
    bare = run_child(options, "unet", batch)
    table = [rowwise, *(run_child(options, "rowwise", size) for size in others)]
    result = {
        "batch_size": batch,
        "grad_rel_error": relative_error(gradients["rowwise"], gradients["dense"]),
        "time_ratio": rowwise["seconds"] / dense["seconds"],
        "activation_memory_ratio": rowwise["memory_bytes"] / dense["memory_bytes"],
        "overhead_vs_unet": rowwise["seconds"] / rowwise["unet_seconds"],
        "overhead_vs_plain_unet": rowwise["seconds"] / bare["seconds"],
        "cpu_time_ratio": rowwise["cpu_seconds"] / dense["cpu_seconds"],
    }
    table.sort(key=lambda row: row["batch_size"])
    return {
        **result,
        "limits": LIMITS,
        "within_limits": {key: result[key] <= limit for key, limit in LIMITS.items()},
        "dense": dense,
        "rowwise": table,
        # Bytes per image: must not rise with the batch if memory grows no faster than linearly.
        "rowwise_bytes_per_image": {str(row["batch_size"]): row["memory_bytes"] // row["batch_size"] for row in table},
        "unet": {"channels": CHANNELS, "cross_attention_dim": WIDTH, "parameters": dense["parameters"]},
        "latents": [4, SIZE, SIZE],
        "machine": {**machine(), **{key: dense[key] for key in ("threads", "torch", "diffusers")}},
        "total_seconds": time.perf_counter() - start,
    }


def run_child(options: argparse.Namespace, side: str, batch: int, gradients: Path | None = None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--batch-size", str(batch), "--repeats", str(options.repeats)]
    for flag, value in (
        ("--threads", options.threads),
        ("--rows-per-chunk", options.rows_per_chunk),
        ("--gradients", gradients),
    ):
        command += [flag, str(value)] if value is not None else []
    print(f"{side}, batch {batch} ...", file=sys.stderr, flush=True)
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode != 0:
        killed = " (killed: probably out of memory)" if finished.returncode < 0 else ""
        raise SystemExit(f"error: measuring {side} at batch {batch} failed{killed}; try a smaller --batch-size.")
    result = json.loads(finished.stdout.splitlines()[-1])
    print(f"  {result['seconds']:.2f} s, {result['memory_bytes'] / 1e9:.2f} GB", file=sys.stderr, flush=True)
    return result


def relative_error(found: Any, expected: Any) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One side at one batch size, in this process."""
    import diffusers
    import torch
    from safetensors.torch import save_file

    if options.threads:
        torch.set_num_threads(options.threads)
    case = Case(options.batch_size, options.side, options.rows_per_chunk)
    small = Case.smaller(case)
    small.step()
    if options.side == "rowwise":
        small.bare_unet()
    gc.collect()
    give_memory_back()
    with PeakMemory() as memory:
        seconds = [timed(case.step)]
    bare = []
    for repeat in range(options.repeats):
        if repeat > 0:
            seconds.append(timed(case.step))
        if options.side == "rowwise":  # in turn with the steps, so that a busy machine hits both
            bare.append(timed(case.bare_unet))
    if options.gradients:
        save_file({"gradients": case.gradients()}, options.gradients)
    result = {
        "batch_size": options.batch_size,
        "seconds": min(wall for wall, _ in seconds),
        "cpu_seconds": min(used for _, used in seconds),
        "memory_bytes": memory.peak - memory.before,
        "memory_method": memory.method,
        "samples": case.batch * (case.batch + 1),
        "parameters": case.parameters,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    if options.side != "dense":
        result["rows_per_chunk"] = case.rows
    if bare:
        result["unet_seconds"] = min(wall for wall, _ in bare)
    return result


class Case:
    """A batch, a denoiser and the step of one side."""

    def __init__(self, batch: int, side: str, rows: int | None, denoiser: Any = None, unet: Any = None) -> None:
        import torch

        from stage1_dcr.denoiser import Denoiser
        from stage1_dcr.objective import auto_rows_per_chunk

        self.batch, self.side = batch, side
        self.rows = rows or auto_rows_per_chunk(batch, "cpu")
        torch.manual_seed(0)
        self.unet = unet if unet is not None else build_unet()
        self.parameters = sum(p.numel() for p in self.unet.parameters())
        assert self.parameters >= 8e6
        torch.manual_seed(1)
        self.prompt = torch.randn(TOKENS, WIDTH)
        if denoiser is None:
            alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
            own = self.unet if side != "dense" else build_unet()
            denoiser = Denoiser(build_vae(), own, alphas, self.prompt, prediction_type="epsilon")
        self.denoiser = denoiser
        generator = torch.Generator().manual_seed(2)
        self.conditions = torch.randn(batch, WIDTH, generator=generator)
        self.positives = self.conditions + 0.2 * torch.randn(batch, WIDTH, generator=generator)
        self.latents = torch.randn(batch, 4, SIZE, SIZE, generator=generator)
        self.noise = torch.randn(batch, 4, SIZE, SIZE, generator=generator)
        self.timesteps = torch.randint(0, 1000, (batch,), generator=generator)
        # Any gradient will do for the bare UNet.
        self.output_gradient = torch.randn(1, 1, 4, SIZE, SIZE, generator=generator)

    @classmethod
    def smaller(cls, case: Case) -> Case:
        return cls(2, case.side, case.rows, case.denoiser, case.unet)

    def step(self) -> None:
        """Loss and gradients of one batch; the gradients end up in the leaves."""
        from stage1_dcr.objective import dcr_loss
        from tests.stage1_dcr.dense import dense_dcr_loss, plain_unet

        if self.side == "unet":
            return self.bare_unet(shared_prompt=False)
        leaves = [t.detach().requires_grad_() for t in (self.conditions, self.positives)]
        noisy = self.denoiser.add_noise(self.latents, self.noise, self.timesteps)
        target = self.denoiser.target(self.latents, self.noise, self.timesteps)
        if self.side == "dense":
            loss = dense_dcr_loss(*leaves, noisy, self.timesteps, target, plain_unet(self.unet, self.prompt))
        else:
            predict = self.denoiser.predict
            loss, _ = dcr_loss(*leaves, noisy, self.timesteps, target, predict, rows_per_chunk=self.rows)
        loss.backward()
        self.leaves = leaves

    def bare_unet(self, *, shared_prompt: bool = True) -> None:
        """Forward and backward of the UNet on the samples of the grid, in the same chunks, without any loss."""
        import torch

        for start in range(0, self.batch, self.rows):
            chunk = slice(start, start + self.rows)
            rows = len(self.timesteps[chunk])
            grid = torch.cat([self.conditions.expand(rows, -1, -1), self.positives[chunk, None]], 1).requires_grad_()
            output = self.denoiser.predict(
                self.latents[chunk], self.timesteps[chunk], grid, shared_prompt=shared_prompt
            )
            output.backward(self.output_gradient.expand_as(output))

    def gradients(self) -> Any:
        import torch

        return torch.cat([leaf.grad for leaf in self.leaves])


def build_unet() -> Any:
    import torch
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=SIZE,
            down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            block_out_channels=CHANNELS,
            attention_head_dim=HEADS,
            cross_attention_dim=WIDTH,
            use_linear_projection=True,
        )
    return unet.eval().requires_grad_(False)


def build_vae() -> Any:
    """Only its latents' layout matters here; no image is encoded."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=8)


if __name__ == "__main__":
    sys.exit(main())
