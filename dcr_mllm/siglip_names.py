"""A SigLIP of open_clip (timm image side, open_clip's text side) under the names of Hugging Face's `SiglipModel`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import SiglipModel

ANCHOR = "visual.trunk.patch_embed.proj.weight"
"""The tensor by which this layout is known."""

_OUTER = {
    "visual.trunk.patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "visual.trunk.norm": "vision_model.post_layernorm",
    "visual.trunk.attn_pool.proj": "vision_model.head.attention.out_proj",
    "visual.trunk.attn_pool.norm": "vision_model.head.layernorm",
    "visual.trunk.attn_pool.mlp.fc1": "vision_model.head.mlp.fc1",
    "visual.trunk.attn_pool.mlp.fc2": "vision_model.head.mlp.fc2",
    "text.token_embedding": "text_model.embeddings.token_embedding",
    "text.ln_final": "text_model.final_layer_norm",
    "text.text_projection": "text_model.head",
}
_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_SIDES = {"visual.trunk.blocks": "vision_model", "text.transformer.resblocks": "text_model"}


def convert_siglip_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by `SiglipModel`'s names; those that it has not keep their own, for the caller to complain about.

    Fused query, key and value of the blocks are taken apart; those of the pooling head, which timm keeps in two, are
    put together, as `MultiheadAttention` wants them.
    """
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        block = re.fullmatch(r"(visual\.trunk\.blocks|text\.transformer\.resblocks)\.(\d+)\.(.+)", name)
        if block:
            prefix, part = f"{_SIDES[block[1]]}.encoder.layers.{block[2]}", block[3]
            fused = re.fullmatch(r"attn\.(?:qkv\.|in_proj_)(weight|bias)", part)
            if fused:
                for which, piece in zip("qkv", value.chunk(3), strict=True):
                    converted[f"{prefix}.self_attn.{which}_proj.{fused[1]}"] = piece.clone()
            else:
                stem, _, kind = part.rpartition(".")
                converted[f"{prefix}.{_BLOCK.get(stem, stem)}.{kind}"] = value
        elif name == "visual.trunk.pos_embed":
            converted["vision_model.embeddings.position_embedding.weight"] = value[0]
        elif name == "visual.trunk.attn_pool.latent":
            converted["vision_model.head.probe"] = value
        elif name == "text.positional_embedding":
            converted["text_model.embeddings.position_embedding.weight"] = value
        elif name in ("logit_scale", "logit_bias"):
            converted[name] = value.reshape(1)
        elif name.startswith("visual.trunk.attn_pool.q."):
            kind = name.rpartition(".")[2]
            keys_and_values = state.get(f"visual.trunk.attn_pool.kv.{kind}", value[:0])
            converted[f"vision_model.head.attention.in_proj_{kind}"] = torch.cat([value, keys_and_values])
        elif not name.startswith("visual.trunk.attn_pool.kv."):
            stem, _, kind = name.rpartition(".")
            converted[f"{_OUTER.get(stem, stem)}.{kind}"] = value
    return {name: value.contiguous() for name, value in converted.items()}


def empty_siglip(source: Any, config: dict[str, Any]) -> SiglipModel:
    """A `SiglipModel` of an open_clip model's shape, with that model's activations (timm's are the exact GELU)."""
    from transformers import SiglipConfig, SiglipModel

    trunk, text = source.visual.trunk, config["text_cfg"]
    approximate = (text.get("act_kwargs") or {}).get("approximate") == "tanh"
    return SiglipModel(
        SiglipConfig(
            vision_config={
                "hidden_size": trunk.embed_dim,
                "intermediate_size": trunk.blocks[0].mlp.fc1.out_features,
                "num_hidden_layers": len(trunk.blocks),
                "num_attention_heads": trunk.blocks[0].attn.num_heads,
                "image_size": source.visual.image_size[0],
                "patch_size": trunk.patch_embed.patch_size[0],
                "hidden_act": "gelu",
                "layer_norm_eps": trunk.norm.eps,
            },
            text_config={
                "hidden_size": text["width"],
                "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
                "num_hidden_layers": text["layers"],
                "num_attention_heads": text["heads"],
                "max_position_embeddings": text["context_length"],
                "vocab_size": text["vocab_size"],
                "projection_size": config["embed_dim"],
                "hidden_act": "gelu_pytorch_tanh" if approximate else "gelu",
                "layer_norm_eps": (text.get("norm_kwargs") or {}).get("eps", 1e-5),
                "pad_token_id": 1,
                "bos_token_id": None,
                "eos_token_id": 1,
            },
        )
    )
