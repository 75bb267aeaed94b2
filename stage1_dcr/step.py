"""One training step of stage 1: images and their random numbers -> views -> tower -> projector -> loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dcr_mllm.towers import ImageStatistics, VisionTower
from dcr_mllm.trainer import Metrics
from stage1_dcr.condition import TowerFeatures, distance_to_base, needs_patches, projector_input, read_tower
from stage1_dcr.config import Phase
from stage1_dcr.contrastive import contrastive_loss
from stage1_dcr.negatives import Gather, gather_conditions
from stage1_dcr.objective import auto_rows_per_chunk, dcr_loss, reconstruction_loss
from stage1_dcr.projector import Projector
from stage1_dcr.timesteps import by_timestep, draw_timesteps
from stage1_dcr.views import normalise, resize, view_of

if TYPE_CHECKING:
    from stage1_dcr.config import Stage1Config
    from stage1_dcr.denoiser import Denoiser

Parts = dict[str, Callable[[], Tensor]]
"""The contrastive and the reconstruction part of a loss, computed when called."""


class TrainingStep(nn.Module):
    """The module that the Trainer sees. Its only submodules are what the phase trains.

    The loss is computed inside `forward`, so that gradients pass through the wrapper of the distributed engine. What
    the phase keeps frozen (projector or tower, and always the denoiser) is held outside the module tree: ZeRO must
    neither shard nor save it.

    Args:
        phase: `projector` trains the projector on the frozen tower, `tower` the tower's LoRA behind the frozen
            projector; end to end, it trains both.
        reference: Frozen copy of the base tower, needed where `config.keep_close` is positive.

    Attributes:
        on_parts: Called with the parts of the loss before each `forward` returns, where there are two: in `joint` its
            weighted terms, in DCR with both positives the halves of the loss that have the view and the target as their
            positive. Their gradients add up to that of the loss without `keep_close`.
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
        end_to_end = phase == "tower" and config.objective == "dcr-end-to-end"
        frozen: list[nn.Module] = []
        for name, module in (("projector", projector), ("tower", tower)):
            if name == phase or end_to_end:
                setattr(self, name, module)
            else:
                frozen.append(module.requires_grad_(False).eval())
        # A closure hides what is frozen from the module tree.
        self._tower: Callable[[], VisionTower] = lambda: tower
        self._projector: Callable[[], Projector] = lambda: projector
        self._reference: Callable[[], VisionTower | None] = lambda: reference
        self._phase = phase
        self._frozen: Callable[[], list[nn.Module]] = lambda: frozen
        self._denoiser: Callable[[], Denoiser] = lambda: denoiser
        self._statistics = statistics
        self._diffusion_size = config.diffusion_size or statistics.size
        self._objective = config.objective_of(phase)
        self._config = config
        self.negatives = config.negatives
        self.gather: Gather = gather_conditions  # replaced by a replay, which has the other processes' conditions
        self._keep_close = config.keep_close if phase == "tower" else 0.0
        self._needs_patches = needs_patches(config)
        self.metrics = Metrics()
        self.on_parts: Callable[[Parts], None] | None = None

    def move_frozen(self, device: torch.device, dtype: torch.dtype) -> None:
        """Put what is frozen on the device; ZeRO and the Trainer do not know it."""
        for module in self.frozen():
            module.to(device=device, dtype=dtype)
        self._denoiser().to(device)

    def frozen(self) -> list[nn.Module]:
        """What is frozen beside the denoiser: projector or tower, and the base tower to keep close to."""
        reference = self._reference()
        return self._frozen() if reference is None else [*self._frozen(), reference]

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
        pixels = images.float() / 255
        tower_pixels = resize(pixels, self._statistics.size)
        seen = self._normalise(tower_pixels)
        if self._objective != "reconstruction":
            seen = torch.cat([seen, self._view(tower_pixels, seen, view_params)])
        features = self._read(self._tower(), seen, trains=self._phase == "tower")

        values: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        parts: Parts = {}
        if self._objective == "dcr":
            loss = self._dcr(features, pixels, timestep_uniform, noise, values, weights, parts)
        else:
            terms: dict[str, Tensor] = {}
            if self._objective != "reconstruction":
                terms["contrastive"] = self._contrastive(features, values)
            if self._objective != "contrastive":
                originals = TowerFeatures(*(None if x is None else x[: len(images)] for x in features))
                terms["reconstruction"] = self._reconstruction(originals, pixels, timestep_uniform, noise)
            values |= terms
            if self._objective == "joint":
                terms["contrastive"] = terms["contrastive"] * self._config.contrastive_weight
                terms["reconstruction"] = terms["reconstruction"] * self._config.reconstruction_weight
                parts = {name: partial(terms.__getitem__, name) for name in terms}
            loss = torch.stack(list(terms.values())).sum()

        if self._keep_close:
            distance = self._distance_to_base(features, seen)
            values["distance_to_base"] = distance
            loss = loss + self._keep_close * distance
        self.metrics.add(values, weights)
        if self.on_parts is not None and parts:
            self.on_parts(parts)
        return {"loss": loss}

    def _dcr(
        self,
        features: TowerFeatures,
        pixels: Tensor,
        timestep_uniform: Tensor,
        noise: Tensor,
        values: dict[str, Tensor],
        weights: dict[str, Tensor],
        parts: Parts,
    ) -> Tensor:
        """The DCR loss of features of images and their views [2 B]; fills in what is logged, and the loss's parts."""
        denoiser, config = self._denoiser(), self._config
        noisy_latents, timesteps, target = self._noisy(pixels, timestep_uniform, noise)
        conditions, positives = self._projector()(projector_input(features, config.condition)).chunk(2)
        first_row = None
        if self.negatives != "local":
            conditions, first_row = self.gather(conditions)
        num_negatives = self.negatives if isinstance(self.negatives, int) else None
        rows = config.rows_per_chunk
        if rows == "auto":
            rows = auto_rows_per_chunk(
                len(pixels),
                pixels.device,
                latent_area=noise.shape[-1] * noise.shape[-2],
                num_negatives=num_negatives or len(conditions) - 1,
            )
        compute = partial(
            dcr_loss,
            conditions,
            positives,
            noisy_latents,
            timesteps,
            target,
            denoiser.predict,
            tau=config.tau,
            rows_per_chunk=rows,
            first_row=first_row,
            num_negatives=num_negatives,
            positives_used=config.positives,
        )
        loss, stats = compute()
        for name in config.positives.split("+"):
            values[f"loss_{name}"] = getattr(stats, f"loss_{name}")
        values |= {name: getattr(stats, name) for name in ("cos_view", "cos_target", "cos_negative")}
        values["num_negatives"] = torch.full((), float(stats.num_negatives), device=loss.device)
        by_kind = dict(zip(("cos_view", "cos_target", "cos_negative"), stats.cosines.unbind(dim=1), strict=True))
        means, counts = by_timestep(by_kind, timesteps, denoiser.num_train_timesteps)
        values |= means
        weights |= counts
        if config.positives == "view+target":
            parts["contrastive"] = lambda: compute(only="view")[0]
            parts["reconstruction"] = lambda: compute(only="target")[0]
        return loss

    def _contrastive(self, features: TowerFeatures, values: dict[str, Tensor]) -> Tensor:
        """The feature contrast of images and their views [2 B]."""
        embeddings, views = features.embedding.chunk(2)
        first_row = None
        if self.negatives != "local":
            embeddings, first_row = self.gather(embeddings)
        num_negatives = self.negatives if isinstance(self.negatives, int) else None
        loss, cosines = contrastive_loss(
            embeddings, views, tau=self._config.tau, first_row=first_row, num_negatives=num_negatives
        )
        values |= cosines
        return loss

    def _reconstruction(
        self, features: TowerFeatures, pixels: Tensor, timestep_uniform: Tensor, noise: Tensor
    ) -> Tensor:
        conditions = self._projector()(projector_input(features, self._config.condition))
        return reconstruction_loss(conditions, *self._noisy(pixels, timestep_uniform, noise), self._denoiser().predict)

    def _noisy(self, pixels: Tensor, timestep_uniform: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents [B, C, h, w], their times [B], and the denoiser's target [B, C, h, w]."""
        denoiser = self._denoiser()
        latents = denoiser.encode(resize(pixels, self._diffusion_size))
        low, high = self._config.timestep_range
        timesteps = draw_timesteps(timestep_uniform, sampling=self._config.timestep_sampling, low=low, high=high)
        return denoiser.add_noise(latents, noise, timesteps), timesteps, denoiser.target(latents, noise, timesteps)

    def _normalise(self, pixels: Tensor) -> Tensor:
        return normalise(pixels, self._statistics.mean, self._statistics.std)

    def _view(self, pixels: Tensor, normalised: Tensor, view_params: Tensor) -> Tensor:
        """The positive view of pixels in [0, 1], normalised."""
        return view_of(pixels, normalised, view_params, self._config.views, self._statistics)

    def _read(self, tower: VisionTower, normalised: Tensor, *, trains: bool) -> TowerFeatures:
        """Normalised pixels through a tower; no graph where it is frozen."""
        parameter = next(tower.parameters())
        if not trains or not torch.is_autocast_enabled(normalised.device.type):
            normalised = normalised.to(parameter.dtype)
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            return read_tower(tower, normalised, patches=self._needs_patches)

    def _distance_to_base(self, features: TowerFeatures, normalised: Tensor) -> Tensor:
        reference = self._reference()
        assert reference is not None, "keep_close needs the base tower"
        base = self._read(reference, normalised, trains=False)
        return distance_to_base(
            features, base, tokens=self._config.keep_close_tokens, distance=self._config.keep_close_distance
        )
