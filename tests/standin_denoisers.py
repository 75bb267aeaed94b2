"""Stand-ins of the Stable Diffusion repositories: tiny random weights in their exact layout.

Four levels in UNet and VAE as in the real ones, so that sizes divide (or do not divide) alike. Configs are written by
hand in the spelling of the hub; the VAE keeps the attention names of 2022 (`query`, `proj_attn`), which diffusers
renames.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tests.standins import clip_state, save_safetensors, save_sharded, write_clip_tokenizer, write_json

Layout = Literal["single", "sharded", "fp16", "fp16-sharded"]
CHANNELS = (8, 16, 16, 16)
SCHEDULE = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
}
# What tells the four models apart: width (768 or 1024 for real), heads, spelling of the scheduler.
MODELS: dict[str, dict[str, Any]] = {
    "CompVis/stable-diffusion-v1-4": {
        "cross": 24,
        "unet": {"attention_head_dim": 2, "_diffusers_version": "0.2.2"},
        "text": {"hidden_act": "quick_gelu", "projection_dim": 24, "torch_dtype": "float32"},
        "scheduler": {"_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0", "skip_prk_steps": True},
        "pad": "<|endoftext|>",
    },
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {
        "cross": 24,
        "unet": {"attention_head_dim": 2, "_diffusers_version": "0.6.0"},
        "text": {"hidden_act": "quick_gelu", "projection_dim": 24, "torch_dtype": "float32"},
        "scheduler": {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "skip_prk_steps": True},
        "pad": "<|endoftext|>",
    },
    "Manojb/stable-diffusion-2-1-base": {
        "cross": 32,
        "unet": {
            "attention_head_dim": [1, 2, 2, 2],
            "dual_cross_attention": False,
            "num_class_embeds": None,
            "only_cross_attention": False,
            "use_linear_projection": True,
            "_diffusers_version": "0.10.0.dev0",
        },
        "text": {"hidden_act": "gelu", "projection_dim": 16, "torch_dtype": "float32"},
        "scheduler": {
            "_class_name": "PNDMScheduler",
            "_diffusers_version": "0.10.0.dev0",
            "prediction_type": "epsilon",
            "skip_prk_steps": True,
        },
        "pad": "!",
    },
    "Manojb/stable-diffusion-2-1": {
        "cross": 32,
        "unet": {
            "attention_head_dim": [1, 2, 2, 2],
            "dual_cross_attention": False,
            "num_class_embeds": None,
            "only_cross_attention": False,
            "upcast_attention": True,
            "use_linear_projection": True,
            "_diffusers_version": "0.10.0.dev0",
        },
        "text": {"hidden_act": "gelu", "projection_dim": 16, "torch_dtype": "float32"},
        "scheduler": {
            "_class_name": "DDIMScheduler",
            "_diffusers_version": "0.8.0",
            "prediction_type": "v_prediction",
            "skip_prk_steps": True,
        },
        "pad": "!",
    },
}


def save_denoiser(hub_id: str, path: str | Path, layout: Layout = "single") -> Path:
    """The stand-in of a Stable Diffusion repository.

    Args:
        hub_id: One of `MODELS`.
        layout: How the weights lie: one file per part, the UNet in shards, or only those of the fp16 variant.
    """
    path, model = Path(path), MODELS[hub_id]
    vocabulary = write_clip_tokenizer(path / "tokenizer", fast=False, pad=model["pad"])
    write_json(path / "scheduler" / "scheduler_config.json", {**SCHEDULE, **model["scheduler"]})
    _save_part(path / "vae", _vae_config(hub_id), "AutoencoderKL", layout)
    _save_part(path / "unet", _unet_config(model), "UNet2DConditionModel", layout)
    _save_text_encoder(path / "text_encoder", model, vocabulary, layout)
    # Folders that a pipeline needs and stage 1 does not.
    write_json(path / "feature_extractor" / "preprocessor_config.json", {"crop_size": 224, "size": 224})
    if model["cross"] == 24:
        write_json(path / "safety_checker" / "config.json", {"model_type": "clip"})
        save_safetensors(path / "safety_checker" / "model.safetensors", {"concept_embeds": torch.zeros(17, 24)})
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"] if model["cross"] == 24 else [None, None]
    write_json(
        path / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.8.0",
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "safety_checker": checker,
            "scheduler": ["diffusers", model["scheduler"]["_class_name"]],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    return path


def _unet_config(model: dict[str, Any]) -> dict[str, Any]:
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "block_out_channels": list(CHANNELS),
        "center_input_sample": False,
        "cross_attention_dim": model["cross"],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 1,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 4,
        "out_channels": 4,
        "sample_size": 8,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        **model["unet"],
    }


def _vae_config(hub_id: str) -> dict[str, Any]:
    config = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.2.2",
        "act_fn": "silu",
        "block_out_channels": [8, 8, 16, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "out_channels": 3,
        "sample_size": 64,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    return config if "v1-4" in hub_id else config | {"_name_or_path": "vae/", "scaling_factor": 0.18215}


def _save_part(path: Path, config: dict[str, Any], class_name: str, layout: Layout) -> None:
    import diffusers

    write_json(path / "config.json", config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(class_name))
        model = getattr(diffusers, class_name).from_config(config)
    state = {_old_name(name): value for name, value in model.state_dict().items()}
    fp16 = layout.startswith("fp16")
    if fp16:
        state = {name: value.half() for name, value in state.items()}
    if class_name.startswith("UNet") and layout.endswith("sharded"):
        save_sharded(path, state, "diffusion_pytorch_model", variant="fp16" if fp16 else "")
    else:
        save_safetensors(path / f"diffusion_pytorch_model{'.fp16' if fp16 else ''}.safetensors", state)


def _old_name(name: str) -> str:
    """The VAE's attention as it was called before diffusers had one attention for all."""
    if ".mid_block.attentions.0." not in f".{name}" or "transformer_blocks" in name or "proj_in" in name:
        return name
    if not name.startswith(("encoder.", "decoder.")):
        return name
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f".{new}.", f".{old}.")
    return name


def _save_text_encoder(path: Path, model: dict[str, Any], vocabulary: int, layout: Layout) -> None:
    width = model["cross"]
    write_json(
        path / "config.json",
        {
            "_name_or_path": "openai/clip-vit-large-patch14",
            "architectures": ["CLIPTextModel"],
            "attention_dropout": 0.0,
            # The old ids: this text encoder's output is read token by token, so its end token does not matter.
            "bos_token_id": 0,
            "dropout": 0.0,
            "eos_token_id": 2,
            "hidden_size": width,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "intermediate_size": 4 * width,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 77,
            "model_type": "clip_text_model",
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "pad_token_id": 1,
            "transformers_version": "4.25.0.dev0",
            "vocab_size": vocabulary,
            **model["text"],
        },
    )
    full = clip_state(8, 2, 14, 14, width, 8, vocabulary, position_ids=True)
    state: dict[str, Tensor] = {name: value for name, value in full.items() if name.startswith("text_model.")}
    if layout.startswith("fp16"):
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_safetensors(path / f"model{'.fp16' if layout.startswith('fp16') else ''}.safetensors", state)
