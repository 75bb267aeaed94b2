"""Directories of published models with everything but weights: real configs, and weight files that are one hole.

Sizes and headers are those of the real files, disk usage is a few hundred kilobytes; for what reads headers only.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch

# openai/clip-vit-large-patch14, what differs from the defaults of CLIPConfig.
CLIP_L14 = {
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "image_size": 224,
        "projection_dim": 768,
    },
}
# Stable Diffusion 2.1-base: unet, vae, text_encoder and scheduler.
SD21_UNET = {
    "sample_size": 64,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 768,
}
SD21_TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
VICUNA_7B: dict[str, Any] = {"vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False}


def hollow_weights(module: torch.nn.Module, file: Path) -> None:
    """A safetensors file with this module's names, types and shapes, and nothing behind them."""
    header, offset = {}, 0
    for name, tensor in module.state_dict().items():
        size = tensor.numel() * tensor.element_size()
        kind = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + offset)


def save_hollow_clip(path: Path, config: dict[str, Any] = CLIP_L14) -> Path:
    """A CLIP directory; `CLIP_L14` by default."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    path.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**config))
    model.config.architectures = ["CLIPModel"]
    model.config.save_pretrained(path)
    hollow_weights(model, path / "model.safetensors")
    size = config["vision_config"]["image_size"]
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


def save_hollow_denoiser(
    path: Path,
    unet: dict[str, Any] = SD21_UNET,
    vae: dict[str, Any] = SD_VAE,
    text: dict[str, Any] = SD21_TEXT,
) -> Path:
    """A Stable Diffusion directory; 2.1-base by default."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel(**unet),
            "vae": AutoencoderKL(**vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
        }
    for name, part in parts.items():
        (path / name).mkdir(parents=True, exist_ok=True)
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        hollow_weights(part, path / name / f"{stem}.safetensors")
        getattr(part, "save_config", part.config.save_pretrained if name == "text_encoder" else None)(path / name)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.save_pretrained(path / "scheduler")
    (path / "tokenizer").mkdir(exist_ok=True)
    (path / "tokenizer" / "tokenizer.json").write_text("{}")
    return path


def save_hollow_llama(path: Path, config: dict[str, Any] = VICUNA_7B) -> Path:
    """A Llama directory in Vicuna's layout; 7B by default."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config)).half()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(path)
    hollow_weights(model, path / "model.safetensors")
    (path / "tokenizer.json").write_text("{}")
    return path
