"""Model directories written by hand, as small as the layouts allow: JSON files and safetensors headers over zeros.

They load in no library; they are for the checks that read headers only, and they need neither torch nor transformers.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

OPENAI_MEAN = [0.48145466, 0.4578275, 0.40821073]
OPENAI_STD = [0.26862954, 0.26130258, 0.27577711]


def write_json(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A valid fp16 safetensors file of zeros."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


def tower_tensors(
    model_type: str, image: int, patch: int, hidden: int, layers: int, width: int
) -> dict[str, tuple[int, ...]]:
    positions = (image // patch) ** 2 + (model_type == "clip")
    tensors: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": (positions, hidden),
        "text_model.embeddings.token_embedding.weight": (10, hidden),
    }
    for layer in range(layers):
        for part in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2", "layer_norm2"):
            tensors[f"vision_model.encoder.layers.{layer}.{part}.weight"] = (hidden, hidden)
    if model_type == "clip":
        tensors["visual_projection.weight"] = (width, hidden)
    else:
        tensors["vision_model.head.attention.in_proj_weight"] = (3 * hidden, hidden)
    return tensors


def write_tower(
    path: Path,
    model_type: str = "clip",
    image: int = 32,
    patch: int = 8,
    hidden: int = 8,
    layers: int = 2,
    width: int = 6,
) -> Path:
    vision = {"hidden_size": hidden, "image_size": image, "patch_size": patch, "num_hidden_layers": layers}
    config = {"model_type": model_type, "vision_config": vision, "text_config": {}}
    write_json(path / "config.json", config | ({"projection_dim": width} if model_type == "clip" else {}))
    mean, std = (OPENAI_MEAN, OPENAI_STD) if model_type == "clip" else ([0.5] * 3, [0.5] * 3)
    write_json(path / "preprocessor_config.json", {"image_mean": mean, "image_std": std})
    write_json(path / "tokenizer.json", {})
    write_safetensors(path / "model.safetensors", tower_tensors(model_type, image, patch, hidden, layers, width))
    return path


def write_denoiser(path: Path, cross: int = 12, levels: int = 2, prediction_type: str = "epsilon") -> Path:
    unet = {"cross_attention_dim": cross, "block_out_channels": [8] * levels, "in_channels": 4}
    write_json(path / "unet" / "config.json", unet)
    write_json(path / "vae" / "config.json", {"latent_channels": 4, "block_out_channels": [8, 8, 8]})
    write_json(path / "text_encoder" / "config.json", {"hidden_size": cross})
    write_json(path / "scheduler" / "scheduler_config.json", {"prediction_type": prediction_type})
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "vocab.json").write_text("{}")
    (path / "tokenizer" / "merges.txt").write_text("")
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    write_safetensors(path / "unet" / "diffusion_pytorch_model.safetensors", {key: (8, cross)})
    write_safetensors(path / "vae" / "diffusion_pytorch_model.safetensors", {"quant_conv.weight": (8, 8)})
    write_safetensors(path / "text_encoder" / "model.safetensors", {"text_model.final_layer_norm.weight": (cross,)})
    return path


def write_projector(path: Path, input_width: int = 6, output_width: int = 12) -> Path:
    widths = {"input_width": input_width, "hidden_width": 16, "output_width": output_width}
    write_json(path / "config.json", widths)
    write_safetensors(path / "model.safetensors", {"net.0.weight": (input_width,)})
    return path
