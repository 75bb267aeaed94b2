"""Frozen Stable Diffusion, reduced to what the objective needs: latents, noise, a target and the UNet's prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from dcr_mllm.errors import UserError
from dcr_mllm.headers import resolve_weights, weight_file
from dcr_mllm.log import get_logger
from stage1_dcr import shared_prompt
from stage1_dcr.graphs import RecordedPredict

logger = get_logger(__name__)

PredictionType = Literal["epsilon", "velocity"]
# What checkpoints call it -> what this project calls it.
_PREDICTION_TYPES: dict[str, PredictionType] = {
    "epsilon": "epsilon",
    "v_prediction": "velocity",
    "velocity": "velocity",
}


class Denoiser:
    """A frozen latent diffusion model.

    Deliberately no ``nn.Module``: as a sub-module of what is trained it would be sharded, saved and moved with it. Load
    it before ``TrainingArguments`` exists, because ZeRO-3 empties whatever is loaded afterwards.

    Args:
        vae: The autoencoder; its decoder is dropped.
        unet: The UNet; this object must be its only user (attention processors are replaced).
        noise_schedule: The ``alphas_cumprod`` of the checkpoint's scheduler, ``[T]``.
        prompt: Text encoder output for the empty prompt, ``[tokens, D]``.
        prediction_type: What the UNet was trained to output.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        noise_schedule: Tensor,
        prompt: Tensor,
        *,
        prediction_type: PredictionType,
    ) -> None:
        if prediction_type not in get_args(PredictionType):
            raise UserError(f"prediction_type must be epsilon or velocity, found {prediction_type!r}.")
        width = unet.config.cross_attention_dim
        if not isinstance(width, int):
            if len(set(width)) != 1:
                raise UserError(f"the UNet has cross-attention of several widths {tuple(width)}: one is needed.")
            width = width[0]
        if prompt.ndim != 2 or prompt.shape[1] != width:
            raise UserError(
                f"the text encoder's output {tuple(prompt.shape)} does not fit the UNet's cross_attention_dim {width}: "
                "they are from different models."
            )
        if unet.config.in_channels != vae.config.latent_channels or unet.config.out_channels != unet.config.in_channels:
            raise UserError(
                f"the UNet maps {unet.config.in_channels} to {unet.config.out_channels} channels, but the latents have "
                f"{vae.config.latent_channels}: a plain text-to-image UNet is needed (no inpainting, no upscaling)."
            )
        self.cross_attention_dim: int = width
        self.prediction_type: PredictionType = prediction_type
        vae.decoder = nn.Identity()
        self._vae = vae.eval().requires_grad_(False)
        self._unet = unet.eval().requires_grad_(False)
        if any(p.numel() == 0 for module in (vae.encoder, unet) for p in module.parameters()):
            raise RuntimeError("the denoiser's parameters are empty: load it before TrainingArguments enables ZeRO-3.")
        self._alphas_cumprod = noise_schedule.detach().float()
        self._prompt = prompt.detach().float()
        self._grid = shared_prompt.install(self._unet, self._prompt)
        self._recorded: RecordedPredict | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        prediction_type: str | None = None,
    ) -> Denoiser:
        """Loads a Stable Diffusion directory (``vae/ unet/ scheduler/ text_encoder/ tokenizer/``).

        The text encoder and the tokenizer run once, on the empty prompt, and are dropped.

        Args:
            path: Directory or downloaded hub id; its weights in one file or in shards, plain or of the fp16 variant.
            device: Where to put it.
            dtype: Precision of the UNet and the autoencoder; noise schedule and targets are always fp32.
            prediction_type: Overrides the scheduler's own, where its config is known to be wrong.
        """
        directory = resolve_weights(path, "denoiser")
        path = str(directory)
        scheduler = _load_scheduler(path)
        declared = scheduler.config.prediction_type if prediction_type is None else prediction_type
        if declared not in _PREDICTION_TYPES:
            raise UserError(
                f"prediction_type {declared!r} of {path} is not supported: a model that predicts the noise "
                "(epsilon) or the velocity (v_prediction) is needed."
            )
        # float16 overflows in the autoencoders of some models, and the encoder is a small part of the work.
        vae_dtype = torch.float32 if dtype == torch.float16 else dtype
        vae = load_part(directory, "vae", AutoencoderKL, vae_dtype)
        unet = load_part(directory, "unet", UNet2DConditionModel, dtype)
        denoiser = cls(
            vae,
            unet,
            scheduler.alphas_cumprod,
            encode_empty_prompt(path),
            prediction_type=_PREDICTION_TYPES[declared],
        )
        return denoiser.to(device)

    @property
    def device(self) -> torch.device:
        return self._unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self._unet.dtype

    @property
    def num_train_timesteps(self) -> int:
        return len(self._alphas_cumprod)

    @property
    def shares_prompt(self) -> bool:
        """Whether the exact savings of :mod:`stage1_dcr.shared_prompt` apply to this UNet."""
        return self._grid is not None

    @property
    def prompt(self) -> Tensor:
        """Text encoder output for the empty prompt, ``[tokens, D]``, fp32."""
        return self._prompt

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """``(C, h, w)`` of the latents of images of ``size`` pixels."""
        factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        if size <= 0 or size % factor:
            raise UserError(
                f"a diffusion image size of {size} is no multiple of the autoencoder's factor {factor}: "
                f"use {max(1, round(size / factor)) * factor}."
            )
        return self._vae.config.latent_channels, size // factor, size // factor

    def to(self, device: torch.device | str) -> Denoiser:
        self._vae.to(device)
        self._unet.to(device)
        self._alphas_cumprod = self._alphas_cumprod.to(device)
        self._prompt = self._prompt.to(device)
        shared_prompt.compute_constants(self._unet)
        return self

    def record_graphs(self) -> None:
        """From now on, replay CUDA graphs where there is CUDA; the denoiser must not be moved after its first use."""
        self._recorded = RecordedPredict(self._predict)

    def attend_as_on(self, device_type: str) -> None:
        """Take the kernels of this kind of device wherever the tensors are; for plans, whose tensors are nowhere."""
        if self._grid is not None:
            self._grid.device_type = device_type

    def modules(self) -> dict[str, nn.Module]:
        """The frozen networks by name, to count and to check them."""
        return {"vae": self._vae, "unet": self._unet}

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents of images.

        Args:
            images: ``[B, 3, S, S]`` in [0, 1].

        Returns:
            ``[B, C, h, w]`` in fp32: the mean of the autoencoder's distribution (no sampling: a second source of noise
            would only blur what the condition can explain), scaled as the UNet expects.
        """
        self.latent_shape(images.shape[-1])
        with torch.autocast(images.device.type, enabled=False):
            moments = self._vae.encode((images.float() * 2 - 1).to(self._vae.dtype)).latent_dist
            latents = moments.mode().float()
        shift = getattr(self._vae.config, "shift_factor", None) or 0.0
        return (latents - shift) * self._vae.config.scaling_factor

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps``, always in fp32.

        In bf16 ``sqrt(1 - abar)`` is zero for the first timesteps: clean latents whose target is pure noise.

        Args:
            latents, noise: ``[B, C, h, w]``.
            timesteps: ``[B]``, integers below :attr:`num_train_timesteps`.

        Returns:
            ``[B, C, h, w]``, fp32.
        """
        signal, sigma = self._signal_and_noise(timesteps)
        return signal * latents.float() + sigma * noise.float()

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet should output for these noisy latents, ``[B, C, h, w]`` in fp32."""
        if self.prediction_type == "epsilon":
            return noise.float()
        signal, sigma = self._signal_and_noise(timesteps)
        return signal * noise.float() - sigma * latents.float()

    def _signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self._alphas_cumprod[timesteps][:, None, None, None]
        return alphas.sqrt(), (1 - alphas).sqrt()

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditions: Tensor, *, shared_prompt: bool = True
    ) -> Tensor:
        """The UNet's output for each noisy latent under each of its conditions.

        The condition vector is added to all tokens of the empty prompt. The UNet runs in its own precision whatever
        autocast says.

        Args:
            noisy_latents: ``[R, C, h, w]``.
            timesteps: ``[R]``.
            conditions: ``[R, n, D]``; the result is differentiable with respect to them.
            shared_prompt: Take the exact savings where the UNet allows them; False is the plain call.

        Returns:
            ``[R, n, C, h, w]`` in the UNet's precision.
        """
        if conditions.shape[2] != self.cross_attention_dim:
            raise ValueError(
                f"conditions have width {conditions.shape[2]}, the denoiser takes {self.cross_attention_dim}."
            )
        if self._recorded is not None and shared_prompt and noisy_latents.is_cuda:
            return self._recorded(noisy_latents, timesteps, conditions)
        return self._predict(noisy_latents, timesteps, conditions, shared_prompt=shared_prompt)

    def _predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditions: Tensor, *, shared_prompt: bool = True
    ) -> Tensor:
        rows, n, width = conditions.shape
        with torch.autocast(noisy_latents.device.type, enabled=False):
            latents = repeat_rows(noisy_latents.to(self.dtype), n)
            times = repeat_rows(timesteps, n)
            vectors = conditions.reshape(rows * n, 1, width)
            if shared_prompt and self._grid is not None:
                with self._grid.of(n):
                    output = self._unet(latents, times, encoder_hidden_states=vectors, return_dict=False)[0]
            else:
                tokens = (self._prompt + vectors).to(self.dtype)
                output = self._unet(latents, times, encoder_hidden_states=tokens, return_dict=False)[0]
        return output.unflatten(0, (rows, n))


repeat_rows = shared_prompt.repeat_each_row


def load_part(directory: Path, part: str, kind: Any, dtype: torch.dtype) -> Any:
    """The `vae` or `unet` of a Stable Diffusion directory, of the diffusers class `kind`."""
    return kind.from_pretrained(
        directory, subfolder=part, torch_dtype=dtype, use_safetensors=True, variant=_variant(directory / part)
    )


def encode_empty_prompt(path: str | Path) -> Tensor:
    """Text encoder output for the empty prompt, ``[tokens, D]`` in fp32, as the Stable Diffusion pipelines make it."""
    from transformers import AutoTokenizer, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(
        path,
        subfolder="text_encoder",
        dtype=torch.float32,
        use_safetensors=True,
        variant=_variant(Path(path) / "text_encoder"),
    ).eval()
    # A tokenizer directory without its vocabulary loads silently, with two tokens.
    if len(tokenizer) != encoder.config.vocab_size:
        raise UserError(
            f"the tokenizer of {path} has {len(tokenizer)} tokens, its text encoder {encoder.config.vocab_size}: "
            "copy the whole tokenizer directory."
        )
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    ids = tokenizer("", padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return encoder(ids).last_hidden_state[0].float()


def _variant(part: Path) -> str | None:
    """`fp16` where a part has weights of that variant only; the libraries look for nothing but what they are told."""
    if "fp16" not in weight_file(part).name:
        return None
    logger.info("%s has fp16 weights only; they are widened to the precision of the run", part)
    return "fp16"


def _load_scheduler(path: str) -> DDPMScheduler:
    """The noise schedule of the checkpoint, whatever sampler its scheduler config names."""
    config = DDPMScheduler.load_config(path, subfolder="scheduler")
    name = str(config.get("_class_name", ""))
    if "FlowMatch" in name or "beta_schedule" not in config:
        raise UserError(
            f"the scheduler of {path} ({name or 'unnamed'}) has no beta schedule: "
            "a Stable Diffusion 1.x or 2.x model is needed."
        )
    keys = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
        "prediction_type",
    )
    return DDPMScheduler(**{key: config[key] for key in keys if config.get(key) is not None})
