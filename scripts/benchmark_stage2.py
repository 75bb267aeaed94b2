#!/usr/bin/env python
"""Speed and memory of stage 2's training step against a plain one. Prints one JSON object to stdout.

    python scripts/benchmark_stage2.py [--samples 256]

Random weights in LLaVA's shape on a small scale: vocabulary 32,000, 576 image tokens, fp32. The data are synthetic:
6 % of the samples are text-only; text lengths are log-normal (sigma 0.8) with median 120, or 600 without an image,
capped at 2,048 tokens in all; half of the text is learned. Both sides see the same samples of the same model:

* **plain** shuffles, takes batches of 16, pads every sample to the longest, and lets
  ``LlavaForConditionalGeneration`` compute the loss from the logits of all positions.
* **ours** is what training uses: global batches of 128 out of ``stage2_llava.batches``, in micro-batches of 16, through
  ``stage2_llava.step.LlavaStep``.

``step_time_ratio`` is the time per sample, forward and backward. A language-model head weighs more in a small model
than in a 7B one (2 % of its parameters), so ``step_time_ratio_same_head`` also gives the plain side our head, and
what is left is padding alone. ``logits_memory_ratio`` is the peak of head and loss alone, on a batch of 16.
``cached_epoch_ratio`` is an epoch of alignment from cached features over one from pixels.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from scripts.measuring import PeakMemory, give_memory_back, machine, timed  # noqa: E402

VOCABULARY, IMAGE_TOKENS, CAP, BATCH, GLOBAL_BATCH = 32_000, 576, 2048, 16, 128
TEXT_ONLY, SIGMA, MEDIAN, MEDIAN_TEXT_ONLY, LEARNED = 0.06, 0.8, 120, 600, 0.5
ALIGN_SAMPLES, ALIGN_TEXT = 32, 40
LIMITS = {"step_time_ratio": 0.67, "logits_memory_ratio": 0.35, "loss_difference": 1e-5}
SIDES = ("plain", "same-head", "ours", "head-plain", "head-ours", "align")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=GLOBAL_BATCH, help="a multiple of 128 (default 128)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.samples < GLOBAL_BATCH or options.samples % GLOBAL_BATCH:
        parser.error("--samples must be a multiple of 128")
    if not Path("/proc/self/status").exists():
        parser.error("memory is read from /proc: Linux is needed")
    if options.side:
        print(json.dumps(measure(options)))
        return 0
    print(json.dumps(compare(options), indent=2))
    return 0


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all sides, one process each, and puts the ratios together."""
    start = time.perf_counter()
    found = {side: run_child(options, side) for side in SIDES}
    plain, ours, align = found["plain"], found["ours"], found["align"]
    losses = [found[side]["loss"] for side in ("plain", "same-head", "ours")]
    result = {
        "step_time_ratio": ours["seconds"] / plain["seconds"],
        "logits_memory_ratio": found["head-ours"]["memory_bytes"] / found["head-plain"]["memory_bytes"],
        "cached_epoch_ratio": align["cached_seconds"] / align["pixel_seconds"],
        "loss_difference": max([max(losses) - min(losses), align["loss_difference"]]),
    }
    return {
        **result,
        "limits": LIMITS,
        "within_limits": {key: result[key] <= limit for key, limit in LIMITS.items()},
        "step_time_ratio_same_head": ours["seconds"] / found["same-head"]["seconds"],
        "cpu_time_ratio": ours["cpu_seconds"] / plain["cpu_seconds"],
        "tower_share_of_align_step": 1 - result["cached_epoch_ratio"],
        "padding_share": {side: found[side]["padding_share"] for side in ("plain", "ours")},
        "samples": options.samples,
        "seed": options.seed,
        "sides": found,
        "machine": machine(),
        "total_seconds": time.perf_counter() - start,
    }


def run_child(options: argparse.Namespace, side: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--samples", str(options.samples), "--seed", str(options.seed)]
    print(f"{side} ...", file=sys.stderr, flush=True)
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode != 0:
        raise SystemExit(f"error: measuring {side} failed with status {finished.returncode}; is there enough memory?")
    return json.loads(finished.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process."""
    import torch

    model = build_model()
    if options.side == "align":
        return measure_align(model)
    samples = draw_samples(options.samples, options.seed)
    if options.side.startswith("head"):
        return measure_head(model, samples, options.side)
    batches = our_batches(samples) if options.side == "ours" else plain_batches(samples, options.seed)
    total = sum(int((torch.tensor(encoded.labels) != -100).sum()) for encoded, _ in samples)
    run_step(model, options.side, collate(samples[:2]), total)  # fills caches and thread pools
    model.zero_grad()
    losses, wall, used, padded = [], 0.0, 0.0, []
    for batch in batches:
        tensors = collate([samples[k] for k in batch])
        padded.append(1 - tensors["attention_mask"].float().mean().item())
        result: dict[str, float] = {}

        def step(tensors: Any = tensors, result: dict[str, float] = result) -> None:
            result["loss"] = run_step(model, options.side, tensors, total)

        seconds = timed(step)
        wall, used = wall + seconds[0], used + seconds[1]
        losses.append(result["loss"])
    return {
        "seconds": wall,
        "cpu_seconds": used,
        "loss": sum(losses),
        "padding_share": sum(padded) / len(padded),
        "parameters": sum(p.numel() for p in model.parameters()),
        "head_parameters": model.lm_head.weight.numel(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def run_step(model: Any, side: str, tensors: dict[str, Any], total: int) -> float:
    """Forward and backward of a batch; the sum of its token losses over all learned tokens of the data."""
    import torch

    from stage2_llava.step import LlavaStep

    if side == "plain":
        labels = torch.full(tensors["input_ids"].shape, -100).flatten()
        labels[tensors["target_positions"] + 1] = tensors["labels"]
        output = model(
            input_ids=tensors["input_ids"],
            attention_mask=tensors["attention_mask"],
            pixel_values=tensors.get("pixel_values"),
            labels=labels.view_as(tensors["input_ids"]),
            num_items_in_batch=total,
        )
        loss = output.loss
    else:
        loss = LlavaStep(model)(**tensors, num_items_in_batch=total)["loss"]
    loss.backward()
    return loss.item()


def measure_head(model: Any, samples: Sequence[Any], side: str) -> dict[str, Any]:
    """Peak memory of language-model head and loss, forward and backward, on the first 16 samples with images."""
    import torch
    import torch.nn.functional as F

    tensors = collate([sample for sample in samples if sample[1]][:BATCH])
    batch, length = tensors["input_ids"].shape
    torch.manual_seed(1)
    hidden = torch.randn(batch * length, model.config.text_config.hidden_size, requires_grad=True)

    def step(positions: Any, labels: Any) -> None:
        chosen = hidden if positions is None else hidden[positions]
        F.cross_entropy(model.lm_head(chosen).float(), labels, reduction="sum", ignore_index=-100).backward()

    step(tensors["target_positions"][:8], tensors["labels"][:8])
    labels = torch.full((batch * length,), -100)
    labels[tensors["target_positions"]] = tensors["labels"]
    gc.collect()
    give_memory_back()
    with PeakMemory() as memory:
        if side == "head-plain":
            step(None, labels)
        else:
            step(tensors["target_positions"], tensors["labels"])
    return {
        "memory_bytes": memory.peak - memory.before,
        "memory_method": memory.method,
        "positions": batch * length if side == "head-plain" else len(tensors["labels"]),
    }


def measure_align(model: Any) -> dict[str, Any]:
    """An epoch of alignment from pixels and from cached features."""
    import torch
    from safetensors.torch import load_file, save_file

    from stage2_llava.collate import Collator
    from stage2_llava.step import LlavaStep, tower_features
    from stage2_llava.tuning import freeze_for_alignment

    freeze_for_alignment(model)
    generator = torch.Generator().manual_seed(3)
    samples = [draw_sample(generator, ALIGN_TEXT, image=True) for _ in range(ALIGN_SAMPLES)]
    step = LlavaStep(model)
    seconds = {"pixel": 0.0, "cached": 0.0}
    losses = {"pixel": 0.0, "cached": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        for k, (_, images) in enumerate(samples):
            save_file(
                {"features": tower_features(model, images[0][None])[0].clone()}, Path(folder) / f"{k}.safetensors"
            )
        for number, start in enumerate([0, *range(0, ALIGN_SAMPLES, BATCH)]):
            chosen = list(range(start, start + BATCH))
            for kind in seconds:

                def run(kind: str = kind, chosen: list[int] = chosen, losses: dict[str, float] = losses) -> None:
                    if kind == "pixel":
                        batch = collate([samples[k] for k in chosen])
                    else:
                        cached = [
                            (samples[k][0], [load_file(Path(folder) / f"{k}.safetensors")["features"]]) for k in chosen
                        ]
                        batch = Collator(0, cached[0][1][0], "image_features")(cached)
                    loss = step(**batch)["loss"]
                    loss.backward()
                    losses[kind] += loss.item()

                wall, _ = timed(run)
                seconds[kind] += wall
            if number == 0:  # a warm-up
                seconds, losses = dict.fromkeys(seconds, 0.0), dict.fromkeys(losses, 0.0)
    return {
        "pixel_seconds": seconds["pixel"],
        "cached_seconds": seconds["cached"],
        "loss_difference": abs(losses["pixel"] - losses["cached"]) * BATCH / ALIGN_SAMPLES,
        "tower_parameters": sum(p.numel() for p in model.model.vision_tower.parameters()),
    }


def build_model() -> Any:
    """A LLaVA with a ViT of 4 layers x 128 at 336 px and a Llama of 6 layers x 192."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=VOCABULARY - 1)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.requires_grad_(False)
    return model.train()


def draw_samples(count: int, seed: int) -> list[Any]:
    """Encoded samples with random tokens, and pixels for those that have an image."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        image = torch.rand((), generator=generator).item() >= TEXT_ONLY
        samples.append(draw_sample(generator, MEDIAN if image else MEDIAN_TEXT_ONLY, image=image))
    return samples


def draw_sample(generator: Any, median: int, *, image: bool) -> Any:
    import torch

    from stage2_llava.labels import Encoded

    length = int(median * torch.exp(SIGMA * torch.randn((), generator=generator)).item())
    prefix = IMAGE_TOKENS if image else 0
    length = max(8, min(length, CAP - prefix))
    text = torch.randint(10, VOCABULARY - 10, (length,), generator=generator).tolist()
    answered = int(length * LEARNED)
    labels = [-100] * (prefix + length - answered) + text[length - answered :]
    pixels = [torch.randn(3, 336, 336, generator=generator)] if image else []
    return Encoded(input_ids=[VOCABULARY - 1] * prefix + text, labels=labels, num_truncated=0), pixels


def collate(samples: Sequence[Any]) -> dict[str, Any]:
    import torch

    from stage2_llava.collate import Collator

    return Collator(0, torch.zeros(3, 336, 336))(samples)


def plain_batches(samples: Sequence[Any], seed: int) -> list[list[int]]:
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(samples))
    return [part.tolist() for part in np.split(order, len(samples) // BATCH)]


def our_batches(samples: Sequence[Any]) -> list[list[int]]:
    """As in training, from the number of words; here words are tokens of text."""
    from itertools import islice

    import numpy as np

    from stage2_llava.batches import BatchPlan

    words = np.array([len(encoded.input_ids) - (IMAGE_TOKENS if images else 0) for encoded, images in samples])
    has_image = np.array([bool(images) for _, images in samples])
    plan = BatchPlan(words, has_image, batch_size=GLOBAL_BATCH, micro_batch_size=BATCH, group_by_modality=True, seed=0)
    return list(islice(plan, len(samples) // BATCH))


if __name__ == "__main__":
    sys.exit(main())
