"""The mini CLIP: a `CLIPModel` trained from scratch on coarse captions of freshly drawn scenes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from dcr_mllm.log import get_logger
from dcr_mllm.mini.tokenizer import build_tokenizer
from dcr_mllm.mini.world import COLOURS, IMAGE_SIZE, KINDS, coarse_caption, draw, random_scene

logger = get_logger(__name__)

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's, so that the miniature meets the same traps
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LENGTH = 24


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A randomly initialised CLIP: ViT of 4 layers x 128, patch 8, 48 px; text transformer of 2 layers x 128."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "projection_dim": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "projection_dim": 128,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def build_image_processor() -> CLIPImageProcessor:
    """The processor that goes with the mini CLIP: resize, crop and normalise at 48 px."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_mean=list(MEAN), image_std=list(STD)
    )


def to_pixels(images: list) -> Tensor:
    """Pillow images -> uint8 [B, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> CLIP-normalised float32."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def scene_batches(
    batch_size: int, seed: int, caption: Callable, tokenizer: CLIPTokenizer, max_length: int, pad_to_max: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of fresh training scenes: (uint8 pixels [B, 3, H, W], input ids [B, L])."""
    rng = np.random.default_rng(seed)
    while True:
        scenes = [random_scene(rng, "train") for _ in range(batch_size)]
        captions = [caption(scene, rng) for scene in scenes]
        padding = "max_length" if pad_to_max else True
        ids = tokenizer(
            captions, padding=padding, truncation=True, max_length=max_length, return_tensors="pt"
        ).input_ids
        yield to_pixels([draw(scene) for scene in scenes]), ids


class CoarseBatches(Dataset):
    """Batches of fresh training scenes with coarse captions: (uint8 pixels [B, 3, H, W], input ids [B, L]).

    Batch i depends on the seed and on i alone, so that any number of workers draws the same ones.
    """

    def __init__(self, num_batches: int, batch_size: int, seed: int, detail_rate: float, tokenizer: CLIPTokenizer):
        self.num_batches, self.batch_size, self.seed = num_batches, batch_size, seed
        self.detail_rate, self.tokenizer = detail_rate, tokenizer

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, index])
        scenes = [random_scene(rng, "train") for _ in range(self.batch_size)]
        captions = [coarse_caption(scene, rng, self.detail_rate) for scene in scenes]
        ids = self.tokenizer(captions, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        return to_pixels([draw(scene) for scene in scenes]), ids.input_ids


def learning_rate_factor(step: int, steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then cosine to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.inference_mode()
def zero_shot_accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, split: str, num_images: int = 960) -> float:
    """Share of drawn scenes whose colour and kind (one of 96) the model names, with one prompt."""
    rng = np.random.default_rng(7)
    scenes = [random_scene(rng, split) for _ in range(num_images)]
    labels = [f"{colour} {kind}" for colour in COLOURS for kind in KINDS]
    ids = tokenizer([f"a photo of a {label}" for label in labels], padding=True, return_tensors="pt")
    model.eval()
    texts = model.get_text_features(**ids.to(model.device)).pooler_output
    pixels = normalise(to_pixels([draw(scene) for scene in scenes])).to(model.device)
    images = torch.cat([model.get_image_features(pixel_values=chunk).pooler_output for chunk in pixels.split(240)])
    guesses = (images @ torch.nn.functional.normalize(texts, dim=-1).T).argmax(dim=-1).cpu()
    model.train()
    truth = torch.tensor([labels.index(scene.label) for scene in scenes])
    return (guesses == truth).float().mean().item()


def train_clip(
    steps: int, detail_steps: int, seed: int, batch_size: int = 128, *, device: str = "cpu", num_workers: int = 0
) -> tuple[CLIPModel, CLIPTokenizer, list[dict]]:
    """Train the mini CLIP by the symmetric contrastive loss, in two parts.

    First on captions of which 15 % name a detail: zero-shot accuracy levels off, details are not seen. Then shorter, on
    captions of which half do, so that the text side learns what its details mean; most pairs stay out of reach.

    Args:
        steps: Of the first part.
        detail_steps: Of the second part.
        seed: Of initialisation and scenes.
        batch_size: Scenes per step, each drawn afresh.
        device: Where it trains.
        num_workers: Processes that draw.

    Returns:
        The model, its tokenizer, and the curve: step, loss, zero-shot accuracy on validation scenes.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(MAX_LENGTH)
    model = build_clip(tokenizer).to(device)
    part = functools.partial(_train_part, model, tokenizer, batch_size=batch_size, num_workers=num_workers)
    curve = part(steps, 0, seed, detail_rate=0.15, learning_rate=1e-3)
    curve += part(detail_steps, steps, seed + 1000, detail_rate=0.5, learning_rate=5e-4)
    return model.eval().cpu(), tokenizer, curve


def _train_part(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    steps: int,
    first_step: int,
    seed: int,
    *,
    batch_size: int,
    num_workers: int,
    detail_rate: float,
    learning_rate: float,
) -> list[dict]:
    """One part of the training with its own optimizer and schedule; returns its curve."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    batches = CoarseBatches(steps, batch_size, seed, detail_rate, tokenizer)
    loader = DataLoader(batches, batch_size=None, num_workers=num_workers, prefetch_factor=8 if num_workers else None)
    curve: list[dict] = []
    losses: list[Tensor] = []
    for step, (pixels, ids) in enumerate(loader, start=1):
        pixels = normalise(pixels).to(model.device)
        loss = model(input_ids=ids.to(model.device), pixel_values=pixels, return_loss=True).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        losses.append(loss.detach())
        if step % 250 == 0 or step == steps:
            accuracy = zero_shot_accuracy(model, tokenizer, "validation")
            curve.append({"step": first_step + step, "loss": torch.stack(losses).mean().item(), "zero_shot": accuracy})
            losses.clear()
            logger.info("clip step %d loss %.3f zero-shot %.3f", first_step + step, curve[-1]["loss"], accuracy)
    return curve
