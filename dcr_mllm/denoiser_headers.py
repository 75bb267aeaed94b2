"""What a Stable Diffusion directory says of itself, from JSON files and safetensors headers, as in `headers`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from dcr_mllm.errors import UserError
from dcr_mllm.headers import count, has_tokenizer, read_json, read_weights, weight_file

DENOISER_PARTS = ("vae", "unet", "scheduler", "text_encoder", "tokenizer")


@dataclasses.dataclass(kw_only=True, frozen=True)
class DenoiserSummary:
    """A Stable Diffusion directory.

    Attributes:
        cross_attention_dim: width of the conditions the UNet takes.
        text_width: width of the text encoder's output.
        prediction_type: what the UNet predicts, from its scheduler.
        num_train_timesteps: diffusion times that it was trained on, from its scheduler.
        latent_channels: channels of the VAE's latents.
        vae_scale: pixels per latent cell and side.
        unet_scale: by how much the UNet shrinks the latents on its way down.
        variant: `fp16` where the UNet only has weights of that variant, else None.
        addition_embed_type: set for SDXL-like UNets, which need more conditions than one text encoder gives.
        num_parameters: stored numbers of the UNet.
    """

    path: Path
    cross_attention_dim: int
    text_width: int
    prediction_type: str
    num_train_timesteps: int
    latent_channels: int
    vae_scale: int
    unet_scale: int
    variant: str | None
    addition_embed_type: str | None
    num_parameters: int


def denoiser_summary(directory: str | os.PathLike[str]) -> DenoiserSummary:
    """Reads a Stable Diffusion directory and checks that it is whole.

    Raises:
        UserError: a part is missing or damaged, or the parts do not fit each other.
    """
    directory = Path(directory)
    for part in DENOISER_PARTS:
        if not (directory / part).is_dir():
            raise UserError(
                f"denoiser directory {directory} lacks its {part}/ folder (needed: {', '.join(DENOISER_PARTS)})"
            )
    vae, unet, text = (read_json(directory / part / "config.json") for part in ("vae", "unet", "text_encoder"))
    scheduler = read_json(directory / "scheduler" / "scheduler_config.json")
    if not has_tokenizer(directory / "tokenizer"):
        raise UserError(
            f"{directory / 'tokenizer' / 'tokenizer.json'} is missing (nor are there vocab.json and merges.txt)"
        )
    tensors = {part: read_weights(directory / part) for part in ("vae", "unet", "text_encoder")}
    cross = unet.get("cross_attention_dim", 1280)
    if isinstance(cross, list):
        if len(set(cross)) != 1:
            raise UserError(
                f"{directory / 'unet' / 'config.json'} has several cross_attention_dim {cross}, expected one"
            )
        cross = cross[0]
    if cross is None:
        raise UserError(
            f"{directory / 'unet' / 'config.json'} has no cross_attention_dim: this UNet takes no conditions"
        )
    # The stored key matrices are the truth: a config edited by hand must not get past this point.
    keys = {header.shape[1] for name, header in tensors["unet"].items() if name.endswith("attn2.to_k.weight")}
    if keys != {cross}:
        raise UserError(
            f"{directory / 'unet'} says cross_attention_dim {cross} in config.json, but its weights take "
            f"{', '.join(map(str, sorted(keys))) or 'no conditions'}"
        )
    latent = int(vae.get("latent_channels", 4))
    if (taken := int(unet.get("in_channels", 4))) != latent:
        raise UserError(
            f"{directory / 'unet'} takes {taken} channels, but the VAE's latents have {latent}; "
            "inpainting, depth and upscaling models cannot be used"
        )
    return DenoiserSummary(
        path=directory,
        cross_attention_dim=int(cross),
        text_width=int(text.get("hidden_size", 512)),
        prediction_type=str(scheduler.get("prediction_type", "epsilon")),
        num_train_timesteps=int(scheduler.get("num_train_timesteps", 1000)),
        latent_channels=latent,
        vae_scale=2 ** (len(vae.get("block_out_channels", [64])) - 1),
        unet_scale=2 ** (len(unet.get("block_out_channels", [320, 640, 1280, 1280])) - 1),
        variant="fp16" if "fp16" in weight_file(directory / "unet").name else None,
        addition_embed_type=unet.get("addition_embed_type"),
        num_parameters=count(tensors["unet"]),
    )
