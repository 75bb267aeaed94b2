"""One training step of DCR: images and their random numbers -> views -> tower -> projector -> loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcr_mllm.towers import ImageStatistics, VisionTower
from dcr_mllm.trainer import Metrics
from stage1_dcr.negatives import Gather, gather_conditions
from stage1_dcr.objective import auto_rows_per_chunk, dcr_loss, reconstruction_loss
from stage1_dcr.projector import Projector
from stage1_dcr.views import augment, normalise, resize

if TYPE_CHECKING:
    from stage1_dcr.config import Stage1Config
    from stage1_dcr.denoiser import Denoiser

Phase = Literal["projector", "tower"]


class TrainingStep(nn.Module):
    """The module that the Trainer sees. Its only submodule is what the phase trains.

    The loss is computed inside `forward`, so that gradients pass through the wrapper of the distributed engine. What
    the phase keeps frozen (projector or tower, and always the denoiser) is held outside the module tree: ZeRO must
    neither shard nor save it.

    Args:
        phase: `projector` trains the projector on the frozen tower, `tower` the tower's LoRA behind the frozen
            projector.
        reference: Frozen copy of the base tower, needed where `config.keep_close` is positive.
    """

    def __init__(
        self,
        *,
        phase: Phase,
        tower: VisionTower,
        projector: Projector,
        denoiser: Denoiser,
        statistics: ImageStatistics,
        config: Stage1Config,
        reference: VisionTower | None = None,
    ):
        super().__init__()
        trained, frozen = (projector, tower) if phase == "projector" else (tower, projector)
        setattr(self, phase, trained)
        frozen.requires_grad_(False).eval()
        # A closure hides what is frozen from the module tree.
        self._tower: Callable[[], VisionTower] = lambda: tower
        self._projector: Callable[[], Projector] = lambda: projector
        self._reference: Callable[[], VisionTower | None] = lambda: reference
        self._phase = phase
        self._frozen: Callable[[], nn.Module] = lambda: frozen
        self._denoiser: Callable[[], Denoiser] = lambda: denoiser
        self._statistics = statistics
        self._diffusion_size = config.diffusion_size or statistics.size
        self._objective = config.projector_objective if phase == "projector" else config.tower_objective
        self._tau = config.tau
        self._views = config.views
        self.negatives = config.negatives
        self.gather: Gather = gather_conditions  # replaced by a replay, which has the other processes' conditions
        self._timestep_range = config.timestep_range
        self._rows_per_chunk = config.rows_per_chunk
        self._keep_close = config.keep_close if phase == "tower" else 0.0
        self.metrics = Metrics()

    def move_frozen(self, device: torch.device, dtype: torch.dtype) -> None:
        """Put what is frozen on the device; ZeRO and the Trainer do not know it."""
        for module in self.frozen():
            module.to(device=device, dtype=dtype)
        self._denoiser().to(device)

    def frozen(self) -> list[nn.Module]:
        """What is frozen beside the denoiser: projector or tower, and the base tower to keep close to."""
        reference = self._reference()
        return [self._frozen()] if reference is None else [self._frozen(), reference]

    def forward(
        self, images: Tensor, view_params: Tensor, timestep_uniform: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """The loss of one batch.

        Args:
            images: uint8 [B, 3, S, S], S the larger of tower and diffusion size.
            view_params: [B, P], drawn by `stage1_dcr.views`.
            timestep_uniform: [B] in [0, 1), becomes the diffusion times.
            noise: [B, C, h, w].

        Returns:
            `{"loss": scalar}`.
        """
        denoiser = self._denoiser()
        pixels = images.float() / 255
        tower_pixels = resize(pixels, self._statistics.size)
        latents = denoiser.encode(resize(pixels, self._diffusion_size))
        low, high = self._timestep_range
        timesteps = (low + timestep_uniform * (high - low)).long().clamp(max=high - 1)
        noisy_latents = denoiser.add_noise(latents, noise, timesteps)
        target = denoiser.target(latents, noise, timesteps)

        normalised = self._normalise(tower_pixels)
        if self._objective == "dcr":
            both = torch.cat([normalised, self._view(tower_pixels, normalised, view_params)])
            features = self._features(both)
            conditions, positives = self._projector()(features).chunk(2)
            first_row = None
            if self.negatives != "local":
                conditions, first_row = self.gather(conditions)
            num_negatives = self.negatives if isinstance(self.negatives, int) else None
            rows = self._rows_per_chunk
            if rows == "auto":
                rows = auto_rows_per_chunk(
                    len(images),
                    images.device,
                    latent_area=noise.shape[-1] * noise.shape[-2],
                    num_negatives=num_negatives or len(conditions) - 1,
                )
            loss, stats = dcr_loss(
                conditions,
                positives,
                noisy_latents,
                timesteps,
                target,
                denoiser.predict,
                tau=self._tau,
                rows_per_chunk=rows,
                first_row=first_row,
                num_negatives=num_negatives,
            )
            values = {name: value for name, value in stats._asdict().items() if isinstance(value, Tensor)}
            values["num_negatives"] = torch.full((), float(stats.num_negatives), device=loss.device)
        else:
            both = normalised
            features = self._features(both)
            loss = reconstruction_loss(self._projector()(features), noisy_latents, timesteps, target, denoiser.predict)
            values = {"reconstruction": loss}
        values.pop("loss", None)  # the Trainer logs the sum of all terms itself

        if self._keep_close:
            distance = self._distance_to_base(features, both)
            values["distance_to_base"] = distance
            loss = loss + self._keep_close * distance
        self.metrics.add(values)
        return {"loss": loss}

    def _normalise(self, pixels: Tensor) -> Tensor:
        return normalise(pixels, self._statistics.mean, self._statistics.std)

    def _view(self, pixels: Tensor, normalised: Tensor, view_params: Tensor) -> Tensor:
        """The positive view of pixels in [0, 1], normalised."""
        if self._views.space == "normalised":
            return augment(normalised, view_params, self._views.interpolation)
        return self._normalise(augment(pixels, view_params, self._views.interpolation))

    def _features(self, normalised: Tensor) -> Tensor:
        """Normalised pixels -> class embeddings [.., width]; no graph where the tower is frozen."""
        tower = self._tower()
        parameter = next(tower.parameters())
        if not torch.is_autocast_enabled(normalised.device.type):
            normalised = normalised.to(parameter.dtype)
        with torch.set_grad_enabled(self._phase == "tower" and torch.is_grad_enabled()):
            return tower(normalised)

    def _distance_to_base(self, features: Tensor, normalised: Tensor) -> Tensor:
        """Mean of 1 - cosine to the frozen base tower's class embeddings, in fp32."""
        reference = self._reference()
        assert reference is not None, "keep_close needs the base tower"
        with torch.no_grad():
            base = reference(normalised.to(next(reference.parameters()).dtype))
        return (1 - F.cosine_similarity(features.float(), base.float(), dim=-1)).mean()
