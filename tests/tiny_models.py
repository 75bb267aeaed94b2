"""Random tiny models in the on-disk layouts of the real ones, so that every test loads them through the same code.

`save_tiny_clip`, `save_tiny_siglip`: a dual encoder with tokenizer and image processor. `save_tiny_denoiser`: a Stable
Diffusion directory. All are deterministic in `seed`, take under a second, and are safetensors.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch

CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
OPENAI_MEAN = [0.48145466, 0.4578275, 0.40821073]
OPENAI_STD = [0.26862954, 0.26130258, 0.27577711]


def clip_tokenizer(max_length: int = 77) -> Any:
    """A CLIP tokenizer of bytes only: any text tokenizes, one token per (lower-cased) character."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(f"{byte}</w>" for byte in alphabet), CLIP_BOS, CLIP_EOS]
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], model_max_length=max_length
    )


def _save_siglip_tokenizer(path: Path, max_length: int) -> Any:
    """Train a byte-fallback SentencePiece model on a few words and save it as `spiece.model`."""
    import sentencepiece
    from transformers import SiglipTokenizer

    words = "a photo of the red green blue circle square cat dog left right up down two three letter facing".split()
    lines = [f"a photo of {first} {second}" for first in words for second in words]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.mkdir(parents=True, exist_ok=True)
    (path / "spiece.model").write_bytes(model.getvalue())
    tokenizer = SiglipTokenizer(
        vocab_file=str(path / "spiece.model"), pad_token="<pad>", eos_token="</s>", model_max_length=max_length
    )
    tokenizer.save_pretrained(path)
    return tokenizer


def save_tiny_clip(
    path: str | Path,
    *,
    image_size: int = 32,
    patch_size: int = 8,
    hidden_size: int = 32,
    num_layers: int = 3,
    num_heads: int = 2,
    projection_dim: int = 24,
    max_length: int = 77,
    seed: int = 0,
) -> Path:
    """Save a random `CLIPModel` with its tokenizer and image processor.

    Args:
        path: Directory, made if missing.
        projection_dim: Width of the joint space; not `hidden_size`, so that mixing the two up fails.
        seed: Of the weights; two seeds give two different towers of one shape.

    Returns:
        The directory.
    """
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    path = Path(path)
    tokenizer = clip_tokenizer(max_length)
    shared = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "projection_dim": projection_dim,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={**shared, **text},
        vision_config={**shared, "image_size": image_size, "patch_size": patch_size},
        projection_dim=projection_dim,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config).eval()
    size = {"height": image_size, "width": image_size}
    processor = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size=size, image_mean=OPENAI_MEAN, image_std=OPENAI_STD
    )
    for part in (model, tokenizer, processor):
        part.save_pretrained(path)
    return path


def save_tiny_siglip(
    path: str | Path,
    *,
    image_size: int = 32,
    patch_size: int = 8,
    hidden_size: int = 32,
    num_layers: int = 3,
    num_heads: int = 2,
    max_length: int = 64,
    seed: int = 0,
) -> Path:
    """Save a random `SiglipModel` (no class token, no projection, mean/std 0.5) with its tokenizer and processor."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    path = Path(path)
    tokenizer = _save_siglip_tokenizer(path, max_length)
    shared = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max_length,
        "projection_size": hidden_size,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = SiglipConfig(
        text_config={**shared, **text}, vision_config={**shared, "image_size": image_size, "patch_size": patch_size}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SiglipModel(config).eval()
    processor = SiglipImageProcessor(
        size={"height": image_size, "width": image_size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    for part in (model, processor):
        part.save_pretrained(path)
    return path


def save_tiny_denoiser(
    path: str | Path,
    cross_attention_dim: int = 32,
    prediction_type: str = "epsilon",
    *,
    sample_size: int = 8,
    block_channels: tuple[int, ...] = (16, 32),
    max_length: int = 77,
    seed: int = 0,
) -> Path:
    """Save a random Stable Diffusion directory: `vae/ unet/ scheduler/ text_encoder/ tokenizer/ model_index.json`.

    The VAE halves the image twice (f=4, 4 latent channels), so latents are `sample_size` for images of 4 x that.

    Args:
        path: Directory, made if missing.
        cross_attention_dim: Width of the condition; also the text encoder's.
        prediction_type: "epsilon", "v_prediction" or "sample".

    Returns:
        The directory.
    """
    import diffusers
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    path = Path(path)
    tokenizer = clip_tokenizer(max_length)
    norm_groups = 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=norm_groups,
            sample_size=4 * sample_size,
            scaling_factor=0.18215,
        ).eval()
        unet = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=4,
            out_channels=4,
            down_block_types=(*("CrossAttnDownBlock2D",) * (len(block_channels) - 1), "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * (len(block_channels) - 1)),
            block_out_channels=block_channels,
            layers_per_block=1,
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=2,
            norm_num_groups=norm_groups,
        ).eval()
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=cross_attention_dim,
                intermediate_size=2 * cross_attention_dim,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ).eval()
    scheduler = DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=prediction_type,
    )
    parts = {
        "vae": (vae, "diffusers"),
        "unet": (unet, "diffusers"),
        "scheduler": (scheduler, "diffusers"),
        "text_encoder": (text_encoder, "transformers"),
        "tokenizer": (tokenizer, "transformers"),
    }
    for name, (part, _) in parts.items():
        part.save_pretrained(path / name)
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
    index |= {name: [library, type(part).__name__] for name, (part, library) in parts.items()}
    (path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return path
