"""The mini Stable Diffusion: autoencoder, text encoder and UNet of the real classes, trained on full captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dcr_mllm.log import get_logger
from dcr_mllm.mini.clip import learning_rate_factor, scene_batches, to_pixels
from dcr_mllm.mini.tokenizer import build_tokenizer
from dcr_mllm.mini.world import IMAGE_SIZE, draw, full_caption, random_scene

logger = get_logger(__name__)

MAX_LENGTH = 40
CROSS_ATTENTION_DIM = 128


def build_vae() -> AutoencoderKL:
    """An f=4 autoencoder: 48 px -> 4 x 12 x 12 latents; 16 channels at full resolution, where it is slow."""
    levels = (16, 32, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    """A two-level UNet with cross-attention on both levels, on 4 x 12 x 12 latents."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=4,  # diffusers' historical name: the number of heads
        cross_attention_dim=CROSS_ATTENTION_DIM,
        norm_num_groups=8,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A text transformer of 2 layers x 128, trained together with the UNet."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CROSS_ATTENTION_DIM,
            intermediate_size=4 * CROSS_ATTENTION_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDPMScheduler:
    """The noise schedule of Stable Diffusion 2.1, which predicts the velocity.

    A prediction of the noise hardly depends on the caption: at high noise it is the input itself, at low noise the
    input shows everything. Near the noisy end the velocity is the image, so that it tells captions apart.
    """
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
    )


def _signed(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def train_vae(
    steps: int, seed: int, batch_size: int = 24, learning_rate: float = 2e-3
) -> tuple[AutoencoderKL, list[dict]]:
    """Train the autoencoder by L1 + L2 reconstruction with a small KL term; sets `scaling_factor` to 1 / std.

    Returns:
        The model and its curve: step and reconstruction PSNR in dB on the batches since the last entry.
    """
    torch.manual_seed(seed)
    vae = build_vae().train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    rng = np.random.default_rng(seed)
    curve: list[dict] = []
    errors: list[float] = []
    for step in range(1, steps + 1):
        images = _signed(to_pixels([draw(random_scene(rng, "train")) for _ in range(batch_size)]))
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        mse = F.mse_loss(decoded, images)
        loss = F.l1_loss(decoded, images) + mse + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        errors.append(mse.item())
        if step % 250 == 0 or step == steps:
            curve.append({"step": step, "psnr": float(10 * np.log10(4 / np.mean(errors)))})
            errors.clear()
            logger.info("vae step %d psnr %.2f", step, curve[-1]["psnr"])
    vae.eval()
    with torch.inference_mode():
        images = _signed(to_pixels([draw(random_scene(rng, "train")) for _ in range(256)]))
        vae.register_to_config(scaling_factor=round(1 / vae.encode(images).latent_dist.mean.std().item(), 5))
    return vae, curve


@torch.no_grad()
def _latents(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    return vae.encode(_signed(pixels)).latent_dist.mean * vae.config.scaling_factor


def train_unet(
    vae: AutoencoderKL,
    steps: int,
    seed: int,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    empty_rate: float = 0.1,
) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer, list[dict]]:
    """Train UNet and text encoder to predict the velocity from full captions, one in ten of them empty.

    Returns:
        UNet, text encoder, tokenizer, and the curve: step and mean squared error of the velocity.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(MAX_LENGTH)
    unet, text_encoder = build_unet().train(), build_text_encoder(tokenizer).train()
    scheduler = build_scheduler()
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))

    def caption(scene, rng):
        return "" if rng.random() < empty_rate else full_caption(scene, rng)

    batches = scene_batches(batch_size, seed, caption, tokenizer, MAX_LENGTH, pad_to_max=True)
    curve: list[dict] = []
    losses: list[float] = []
    for step in range(1, steps + 1):
        pixels, ids = next(batches)
        latents = _latents(vae, pixels)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),))
        prompt = text_encoder(input_ids=ids).last_hidden_state
        predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, prompt).sample
        loss = F.mse_loss(predicted, scheduler.get_velocity(latents, noise, timesteps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 250 == 0 or step == steps:
            curve.append({"step": step, "loss": float(np.mean(losses))})
            losses.clear()
            logger.info("unet step %d loss %.4f", step, curve[-1]["loss"])
    return unet.eval(), text_encoder.eval(), tokenizer, curve


def save_denoiser(path: Path, vae, unet, text_encoder, tokenizer) -> None:
    """Write the on-disk layout of Stable Diffusion, fp16 safetensors."""
    for name, model in (("vae", vae), ("unet", unet), ("text_encoder", text_encoder)):
        model.half().save_pretrained(path / name)
    build_scheduler().save_pretrained(path / "scheduler")
    tokenizer.save_pretrained(path / "tokenizer")


@torch.inference_mode()
def generate(path: Path, captions: list[str], seed: int = 0, num_steps: int = 50, guidance: float = 3.0) -> Tensor:
    """Images that the saved mini Stable Diffusion draws for captions: uint8 [N, 3, H, W]."""
    from diffusers import DDIMScheduler

    vae = AutoencoderKL.from_pretrained(path / "vae").float().eval()
    unet = UNet2DConditionModel.from_pretrained(path / "unet").float().eval()
    text_encoder = CLIPTextModel.from_pretrained(path / "text_encoder").float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(path / "tokenizer")
    scheduler = DDIMScheduler.from_pretrained(path / "scheduler")
    ids = tokenizer(
        [""] * len(captions) + captions,
        padding="max_length",
        truncation=True,
        max_length=MAX_LENGTH,
        return_tensors="pt",
    ).input_ids
    prompt = text_encoder(input_ids=ids).last_hidden_state
    generator = torch.Generator().manual_seed(seed)
    side = IMAGE_SIZE // 4
    latents = torch.randn(len(captions), 4, side, side, generator=generator)
    scheduler.set_timesteps(num_steps)
    for timestep in scheduler.timesteps:
        empty, conditional = unet(torch.cat([latents, latents]), timestep, prompt).sample.chunk(2)
        latents = scheduler.step(empty + guidance * (conditional - empty), timestep, latents).prev_sample
    images = vae.decode(latents / vae.config.scaling_factor).sample
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
