"""Tensor names of open_clip's models and of transformers' CLIP and SigLIP, in both directions.

Two families: `clip` is open_clip's own ViT with its text side, `siglip` a timm ViT that pools by attention. Tables go
from open_clip to transformers; fused query, key and value, transposed projections and added axes are treated below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_TEXT = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
}
_OUTER = {
    "clip": {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        **_TEXT,
    },
    "siglip": {
        "visual.trunk.patch_embed.proj": "vision_model.embeddings.patch_embedding",
        "visual.trunk.pos_embed": "vision_model.embeddings.position_embedding.weight",
        "visual.trunk.norm": "vision_model.post_layernorm",
        "visual.trunk.attn_pool.latent": "vision_model.head.probe",
        "visual.trunk.attn_pool.proj": "vision_model.head.attention.out_proj",
        "visual.trunk.attn_pool.norm": "vision_model.head.layernorm",
        "visual.trunk.attn_pool.mlp.fc1": "vision_model.head.mlp.fc1",
        "visual.trunk.attn_pool.mlp.fc2": "vision_model.head.mlp.fc2",
        "text_projection": "text_model.head",
        "logit_bias": "logit_bias",
        **_TEXT,
    },
}
_OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TIMM_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# Where the blocks of a side stand, what they call their parts, and what goes before `weight` in the fused projection.
_BLOCKS = {
    ("clip", "vision"): ("visual.transformer.resblocks", _OPEN_CLIP_BLOCK, "attn.in_proj_"),
    ("siglip", "vision"): ("visual.trunk.blocks", _TIMM_BLOCK, "attn.qkv."),
    ("clip", "text"): ("transformer.resblocks", _OPEN_CLIP_BLOCK, "attn.in_proj_"),
    ("siglip", "text"): ("transformer.resblocks", _OPEN_CLIP_BLOCK, "attn.in_proj_"),
}
_POOL, _HEAD = "visual.trunk.attn_pool.", "vision_model.head.attention.in_proj_"
# CLIP's projections are bare matrices, applied from the right.
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors under the names of `CLIPModel` or `SiglipModel`; what is unknown keeps its name."""
    state = {name.removeprefix("text."): value for name, value in state.items() if name != "attn_mask"}
    family = "siglip" if any(name.startswith("visual.trunk.") for name in state) else "clip"
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith((f"{_POOL}q.", f"{_POOL}kv.")):
            kind = name.rpartition(".")[2]
            # A file that lacks one of them gives a tensor of the wrong shape, which the model then names.
            halves = [state[part] for part in (f"{_POOL}q.{kind}", f"{_POOL}kv.{kind}") if part in state]
            converted[_HEAD + kind] = torch.cat(halves)
        elif family == "clip" and name in _TRANSPOSED:
            converted[_TRANSPOSED[name]] = value.T
        elif not _block_to_hugging_face(name, value, family, converted):
            value = value[0] if name == "visual.trunk.pos_embed" else value
            if family == "siglip" and name.startswith("logit_"):
                value = value.reshape(1)
            converted[_renamed(name, _OUTER[family])] = value
    return {name: value.contiguous() for name, value in converted.items()}


def to_open_clip(state: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """The tensors of a `CLIPModel` (`family` clip) or `SiglipModel` (siglip) under open_clip's names.

    The inverse of `to_hugging_face`; SigLIP's text side stands below `text.`, as open_clip has it for timm towers.

    Raises:
        KeyError: a tensor that the family has not, by name.
    """
    outer = {new: old for old, new in _OUTER[family].items()}
    transposed = {new: old for old, new in _TRANSPOSED.items()} if family == "clip" else {}
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("position_ids"):
            continue  # a buffer that older files have
        if name.startswith(_HEAD) and family == "siglip":
            kind, width = name.removeprefix(_HEAD), value.shape[0] // 3
            converted[f"{_POOL}q.{kind}"], converted[f"{_POOL}kv.{kind}"] = value[:width], value[width:]
        elif name in transposed:
            converted[transposed[name]] = value.T
        elif not _block_to_open_clip(name, state, family, converted):
            new = _renamed(name, outer)
            if new == name and name not in outer:
                raise KeyError(name)
            value = value[None] if new == "visual.trunk.pos_embed" else value
            converted[new] = value.reshape(()) if new.startswith("logit_") else value
    if family == "siglip":
        outside = ("visual.", "logit_")
        converted = {n if n.startswith(outside) else f"text.{n}": value for n, value in converted.items()}
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in converted.items()}


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """A tensor by its whole name, or by the name of its module."""
    stem, _, kind = name.rpartition(".")
    if name in table:
        return table[name]
    return f"{table[stem]}.{kind}" if stem in table else name


def _block_to_hugging_face(name: str, value: Tensor, family: str, converted: dict[str, Tensor]) -> bool:
    for side in ("vision", "text"):
        prefix, table, fused = _BLOCKS[family, side]
        found = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name)
        if not found:
            continue
        stem = f"{side}_model.encoder.layers.{found[1]}"
        if found[2].startswith(fused):
            kind = found[2].removeprefix(fused)
            for which, piece in zip("qkv", value.chunk(3), strict=True):
                converted[f"{stem}.self_attn.{which}_proj.{kind}"] = piece.clone()
        else:
            converted[f"{stem}.{_renamed(found[2], table)}"] = value
        return True
    return False


def _block_to_open_clip(name: str, state: Mapping[str, Tensor], family: str, converted: dict[str, Tensor]) -> bool:
    found = re.fullmatch(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(\w+)", name)
    if not found:
        return False
    side, layer, part, kind = found.groups()
    prefix, table, fused = _BLOCKS[family, side]
    parts = {new: old for old, new in table.items()}
    if projection := re.fullmatch(r"self_attn\.([qkv])_proj", part):
        if projection[1] == "q":
            pieces = [state[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            converted[f"{prefix}.{layer}.{fused}{kind}"] = torch.cat(pieces)
    elif part in parts:
        converted[f"{prefix}.{layer}.{parts[part]}.{kind}"] = state[name]
    else:
        raise KeyError(name)
    return True
