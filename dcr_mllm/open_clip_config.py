"""The configuration that open_clip needs to build a given Hugging Face CLIP or SigLIP."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcr_mllm.config import nearest
from dcr_mllm.errors import UserError
from dcr_mllm.headers import TowerSummary, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "quick_gelu": {},
    "gelu": {},
    "gelu_pytorch_tanh": {"act_kwargs": {"approximate": "tanh"}},
}
_INTERPOLATION = {2: "bilinear", 3: "bicubic"}
# open_clip's default; timm's SigLIPs have the other one.
_EPS, _SIGLIP_EPS = 1e-5, 1e-6


def architecture_config(architecture: str) -> dict[str, Any]:
    """open_clip's own `model_cfg` of an architecture.

    Raises:
        UserError: It knows none of that name.
    """
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None:
        raise UserError(
            f"open_clip knows no architecture {architecture!r}{nearest(architecture, open_clip.list_models())}"
        )
    return config


def tower_config(tower: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """A `model_cfg` that describes a tower directory.

    Args:
        tower: The directory.
        shapes: Of its tensors under open_clip's names; a SigLIP's timm model is found by them.

    Raises:
        UserError: Something in its config.json has no counterpart in open_clip; names it.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tower, local_files_only=True)
    source = tower / "config.json"
    for side in ("vision_config", "text_config"):
        activation = getattr(config, side).hidden_act
        if activation not in _ACTIVATIONS:
            raise UserError(
                f"{source} has {side}.hidden_act {activation!r}, open_clip has {', '.join(sorted(_ACTIVATIONS))}"
            )
    if config.vision_config.num_channels != 3:
        raise UserError(f"{source} has vision_config.num_channels {config.vision_config.num_channels}, open_clip has 3")
    return _siglip_config(config, source, shapes) if config.model_type == "siglip" else _clip_config(config, source)


def image_config(tower: Path, summary: TowerSummary) -> dict[str, Any]:
    """open_clip's `preprocess_cfg` for a tower's own image processor.

    Raises:
        UserError: Its resampling or resizing is unknown to open_clip.
    """
    source = tower / "preprocessor_config.json"
    if source.is_file() or not (tower / "processor_config.json").is_file():
        stored = read_json(source)
    else:
        stored = read_json(tower / "processor_config.json").get("image_processor") or {}
    resample = stored.get("resample", 3)
    if resample not in _INTERPOLATION:
        raise UserError(f"{source} has resample {resample}, open_clip has 2 (bilinear) and 3 (bicubic)")
    size = stored.get("size")
    shortest = isinstance(size, int) or (isinstance(size, dict) and "shortest_edge" in size)
    return {
        "mean": list(summary.image_mean),
        "std": list(summary.image_std),
        "interpolation": _INTERPOLATION[resample],
        "resize_mode": "shortest" if shortest else "squash",
    }


def _clip_config(config: PreTrainedConfig, source: Path) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    quick = {side.hidden_act == "quick_gelu" for side in (vision, text)}
    if len(quick) > 1:
        raise UserError(
            f"{source} has hidden_act {vision.hidden_act!r} in vision_config and {text.hidden_act!r} in text_config; "
            "open_clip has quick_gelu on both sides or on none"
        )
    # A text's end is the highest id in open_clip, unless it is told another one; 2 stands for the same in old configs.
    ends = {} if text.eos_token_id in (2, text.vocab_size - 1) else {"pool_type": "eos", "eos_id": text.eos_token_id}
    return {
        "embed_dim": config.projection_dim,
        **({"quick_gelu": True} if quick == {True} else {}),
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "patch_size": vision.patch_size,
            **_block_config(vision, _EPS),
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            **_block_config(text, _EPS),
            **ends,
        },
    }


def _siglip_config(config: PreTrainedConfig, source: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    if not getattr(vision, "vision_use_head", True):
        raise UserError(f"{source} has vision_config.vision_use_head false; open_clip's SigLIPs pool by attention")
    if vision.layer_norm_eps != _SIGLIP_EPS:
        raise UserError(f"{source} has vision_config.layer_norm_eps {vision.layer_norm_eps}, timm's ViTs have 1e-6")
    return {
        "embed_dim": vision.hidden_size,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision.image_size,
            "timm_model_name": _timm_model(vision, source, shapes),
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            **_block_config(text, _EPS),
        },
    }


def _timm_model(vision: PreTrainedConfig, source: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """timm's SigLIP of this image size, head count and these tensor shapes; one with its activation, if there is."""
    import timm
    import torch

    found: list[str] = []
    for name in timm.list_models("*siglip*", exclude_filters=["*gap*", "naflex*"]):
        known = timm.get_pretrained_cfg(name)
        if known is None or known.input_size[-1] != vision.image_size or f"patch{vision.patch_size}_" not in name:
            continue
        with torch.device("meta"):
            trunk = timm.create_model(name, num_classes=0, global_pool="map")
        own = {f"visual.trunk.{key}": tuple(value.shape) for key, value in trunk.state_dict().items()}
        same = own == {key: shape for key, shape in shapes.items() if key.startswith("visual.trunk.")}
        if same and trunk.blocks[0].attn.num_heads == vision.num_attention_heads:
            tanh = not isinstance(trunk.blocks[0].mlp.act, torch.nn.GELU)
            found.insert(0 if tanh == (vision.hidden_act == "gelu_pytorch_tanh") else len(found), name)
    if not found:
        raise UserError(
            f"{source}: timm has no SigLIP of {vision.image_size} px, patch {vision.patch_size}, "
            f"{vision.num_hidden_layers} layers x {vision.hidden_size} and {vision.num_attention_heads} heads, which "
            "open_clip would need; --architecture takes one that you have registered"
        )
    return found[0]


def _block_config(side: PreTrainedConfig, usual_eps: float) -> dict[str, Any]:
    config = copy.deepcopy(_ACTIVATIONS[side.hidden_act])
    if side.layer_norm_eps != usual_eps:
        config["norm_kwargs"] = {"eps": side.layer_norm_eps}
    if side.intermediate_size != 4 * side.hidden_size:
        config["mlp_ratio"] = _ratio(side.hidden_size, side.intermediate_size)
    return config


def _ratio(width: int, inner: int) -> float:
    """A ratio of four digits if it gives the inner width back by truncation, which is how open_clip computes it."""
    for ratio in (inner / width, round(inner / width, 4), round(inner / width + 5e-5, 4), (inner + 0.5) / width):
        if int(width * ratio) == inner:
            return ratio
    raise AssertionError(f"no ratio gives {inner} of {width}")
