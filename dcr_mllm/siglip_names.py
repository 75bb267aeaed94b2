"""A SigLIP of open_clip (timm image side, open_clip's text side): how it is known, and its shape in transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import SiglipModel

ANCHOR = "visual.trunk.patch_embed.proj.weight"
"""The tensor by which this layout is known."""


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
