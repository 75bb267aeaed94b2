"""What a frozen denoiser draws under given conditions, and how well it denoises an image under them.

Training never decodes a latent, so the decoder, which :class:`stage1_dcr.denoiser.Denoiser` drops, is loaded here.
Everything runs without gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor, nn

from stage1_dcr.denoiser import Denoiser, PredictionType, load_part

_ROWS = 8  # images at a time
_DIFFUSERS_NAMES = {"epsilon": "epsilon", "velocity": "v_prediction"}


def load_decoder(directory: Path, device: torch.device | str = "cpu") -> AutoencoderKL:
    """The autoencoder of a Stable Diffusion directory in fp32, without its encoder."""
    vae = load_part(directory, "vae", AutoencoderKL, torch.float32)
    vae.encoder = nn.Identity()
    return vae.eval().requires_grad_(False).to(device)


def load_sampler(directory: Path, prediction_type: PredictionType) -> DDIMScheduler:
    """DDIM with the noise schedule of a Stable Diffusion directory, whatever sampler its scheduler config names.

    Args:
        directory: Of the model.
        prediction_type: What its UNet outputs, see `Denoiser.prediction_type`.
    """
    # DDIM clips unless told otherwise, which is meant for pixels: latents leave [-1, 1].
    return DDIMScheduler.from_pretrained(
        directory, subfolder="scheduler", prediction_type=_DIFFUSERS_NAMES[prediction_type], clip_sample=False
    )


@torch.inference_mode()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w], as `Denoiser.encode` makes them -> images [B, 3, S, S] in [0, 1]."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    decoded = [vae.decode(part / vae.config.scaling_factor + shift).sample for part in latents.float().split(_ROWS)]
    return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)


@torch.inference_mode()
def generate(
    denoiser: Denoiser,
    sampler: DDIMScheduler,
    conditions: Tensor,
    noise: Tensor,
    *,
    steps: int = 50,
    guidance: float = 1.0,
    latents: Tensor | None = None,
    start: int | None = None,
) -> Tensor:
    """Draw one latent per condition by deterministic DDIM (eta 0).

    Args:
        denoiser: Predicts under the empty prompt plus the condition.
        sampler: From `load_sampler`; its time steps are set here.
        conditions: [B, D].
        noise: [C, h, w]: every latent begins with the same, so that they differ by their conditions alone.
        steps: Of the whole schedule.
        guidance: Scale of classifier-free guidance against the bare empty prompt; 1 is none.
        latents: [B, C, h, w] of the originals, where `start` is given.
        start: Begin from the originals' latents noised to the schedule's last step before this time; None: from noise.

    Returns:
        [B, C, h, w] in fp32, scaled as `Denoiser.encode` does.
    """
    sampler.set_timesteps(steps)
    timesteps = [int(t) for t in sampler.timesteps if start is None or t < start]
    noise = noise.to(denoiser.device, torch.float32)
    if start is None:
        sample = noise.expand(len(conditions), *noise.shape) * sampler.init_noise_sigma
    else:
        assert latents is not None, "start needs the originals' latents"
        first = torch.full((len(latents),), timesteps[0], device=latents.device)
        sample = denoiser.add_noise(latents, noise.expand_as(latents), first)
    candidates = conditions[:, None]
    if guidance != 1:
        candidates = torch.cat([torch.zeros_like(candidates), candidates], dim=1)  # the empty prompt first
    return torch.cat(
        [
            _denoise(denoiser, sampler, sample[rows], candidates[rows], timesteps, guidance)
            for rows in _chunks(len(conditions))
        ]
    )


def _denoise(
    denoiser: Denoiser,
    sampler: DDIMScheduler,
    sample: Tensor,
    candidates: Tensor,
    timesteps: list[int],
    guidance: float,
) -> Tensor:
    """The rows [R, C, h, w] denoised under their conditions [R, 1 or 2, D]."""
    for timestep in timesteps:
        times = torch.full((len(sample),), timestep, device=sample.device)
        outputs = denoiser.predict(sample, times, candidates).float()
        output = outputs[:, -1]
        if outputs.shape[1] == 2:
            output = outputs[:, 0] + guidance * (output - outputs[:, 0])
        sample = sampler.step(output, timestep, sample).prev_sample
    return sample


@torch.inference_mode()
def denoising_losses(denoiser: Denoiser, latents: Tensor, conditions: Tensor, noise: Tensor) -> Tensor:
    """How well images are denoised under several conditions each, all at the same times and with the same noise.

    Args:
        denoiser: The frozen denoiser.
        latents: [B, C, h, w].
        conditions: [B, n, D].
        noise: [B, K, C, h, w], for K times spread evenly over the whole schedule.

    Returns:
        [B, n]: mean squared error of the prediction, over times and elements, in fp32.
    """
    num_times = noise.shape[1]
    length = denoiser.num_train_timesteps
    losses = torch.zeros(conditions.shape[:2], device=latents.device)
    for rows in _chunks(len(latents)):
        clean = latents[rows]
        for index in range(num_times):
            timesteps = torch.full((len(clean),), (2 * index + 1) * length // (2 * num_times), device=clean.device)
            drawn = noise[rows, index].to(clean.device)
            noisy_latents = denoiser.add_noise(clean, drawn, timesteps)
            target = denoiser.target(clean, drawn, timesteps)
            prediction = denoiser.predict(noisy_latents, timesteps, conditions[rows]).float()
            losses[rows] += (prediction - target[:, None]).square().flatten(2).mean(dim=-1)
    return losses / num_times


def _chunks(length: int) -> Iterator[slice]:
    return (slice(first, first + _ROWS) for first in range(0, length, _ROWS))
