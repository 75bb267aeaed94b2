"""What becomes of the tower's embeddings: collapse and drift, on images that stay the same during a run.

Everything is measured of the base tower and of the trained one by the same code, in the type of the trained weights and
without dropout.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcr_mllm.towers import ImageStatistics, VisionTower
from stage1_dcr.images import ImageLoader
from stage1_dcr.view_config import ViewConfig
from stage1_dcr.views import normalise, resize, view_of

NUM_IMAGES = 256
NUM_PATCHES = 8  # of each image, as in the evaluation
_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class ProbeImages:
    """Images as training sees them.

    Attributes:
        images: uint8 [M, 3, S, S].
        view_params: [M, P], what makes the one view of each.
    """

    images: Tensor
    view_params: Tensor


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a tower makes of the images, in fp32 on the CPU.

    Attributes:
        embeddings: [M, D] class embeddings.
        views: [M, D], those of the views.
        class_tokens: [L+1, M, H], None without a class token. Layer 0 is the input of the first block.
        patch_tokens: [L+1, M, NUM_PATCHES, H], at positions that depend only on the image's index.
    """

    embeddings: Tensor
    views: Tensor
    class_tokens: Tensor | None
    patch_tokens: Tensor


def effective_rank(embeddings: Tensor) -> float:
    """In how many directions the embeddings [M, D] vary: exp of the entropy of their normalised singular values.

    Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", of the centred embeddings. Between
    1 (all on a line) and min(M - 1, D); 0 where all are the same.
    """
    centred = embeddings.double() - embeddings.double().mean(dim=0)
    values = torch.linalg.svdvals(centred)
    if values[0] == 0:
        return 0.0
    return torch.special.entr(values / values.sum()).sum().exp().item()


def uniformity(embeddings: Tensor) -> float:
    """How evenly the embeddings [M, D] cover the sphere: log of the mean over pairs of exp(-2 |z_i - z_j|^2).

    Wang & Isola 2020, "Understanding contrastive representation learning through alignment and uniformity on the
    hypersphere", with t = 2. 0 where all point the same way; the lower the more even.
    """
    distances = F.pdist(F.normalize(embeddings.double(), dim=-1))
    return (-2 * distances.square()).exp().mean().log().item()


def alignment(embeddings: Tensor, views: Tensor) -> float:
    """How near an image and its view are: the mean of |z - z+|^2 on the sphere; both [M, D].

    Wang & Isola 2020 with alpha = 2. Between 0 and 4, and twice the mean of 1 - cosine.
    """
    pair = (F.normalize(embeddings.double(), dim=-1), F.normalize(views.double(), dim=-1))
    return (pair[0] - pair[1]).square().sum(dim=-1).mean().item()


def drift(base: Tensor, tower: Tensor) -> float:
    """Mean of 1 - cosine between the same tokens [.., H] of two towers, as `token_drift` of the evaluation has it."""
    # Half the squared distance of unit vectors is the same number, and exactly zero for equal tokens.
    return (F.normalize(base, dim=-1) - F.normalize(tower, dim=-1)).square().sum(dim=-1).mean().item() / 2


def read_images(loader: ImageLoader, num: int = NUM_IMAGES) -> ProbeImages:
    """The first images of a loader, each once: fewer than `num` where its data hold no more."""
    keys: set[str] = set()
    batches = []
    for batch in loader:
        if not keys.isdisjoint(batch["keys"]):  # the data begin anew
            break
        keys.update(batch["keys"])
        batches.append((batch["images"], batch["view_params"]))
        if len(keys) >= num:
            break
    images, view_params = (torch.cat(parts)[:num] for parts in zip(*batches, strict=True))
    return ProbeImages(images=images, view_params=view_params)


class Probe:
    """Looks at the same images each time, and compares with the base tower.

    The base is run once, on a copy that goes again: another pass at every look would want the whole base beside the
    trained tower on the device, for good. What is kept of it are tokens at a few positions, in main memory: 236 MB for
    256 images and the 25 layers of a ViT-L/14.

    Args:
        images: To look at.
        base: The base tower; it stays where it is.
        tower: The trained one, where and in the type in which it trains.
        statistics: Of the tower's pixels.
        views: How views are made.
    """

    def __init__(
        self,
        images: ProbeImages,
        base: VisionTower,
        tower: VisionTower,
        statistics: ImageStatistics,
        views: ViewConfig,
    ):
        self._images, self._statistics, self._views = images, statistics, views
        parameter = next(tower.parameters())
        self._base = self.look(copy.deepcopy(base).to(parameter.device, parameter.dtype))
        self._of_base = _collapse(self._base)

    def measure(self, tower: VisionTower) -> dict[str, Any]:
        """What `diagnostics.jsonl` holds of a look: effective rank, uniformity and alignment of both, and drift."""
        look, base = self.look(tower), self._base
        of_tower = _collapse(look)
        drifts = {
            "class": _drift_by_layer(base.class_tokens, look.class_tokens),
            "patches": _drift_by_layer(base.patch_tokens, look.patch_tokens),
        }
        both = {name: {"base": value, "tower": of_tower[name]} for name, value in self._of_base.items()}
        return {**both, "drift": drifts}

    @torch.no_grad()
    def look(self, tower: VisionTower) -> Look:
        """Run a tower on the images and their views."""
        parameter = next(tower.parameters())
        first = int(tower.has_class_token)
        generator = torch.Generator().manual_seed(0)
        embeddings, views, classes, patches = [], [], [], []
        # TF32 convolutions are on by default and are not fp32.
        with _evaluating(tower), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for start in range(0, len(self._images.images), _BATCH):
                part = slice(start, start + _BATCH)
                inputs, view = self._inputs(part, parameter)
                views.append(tower(view).float().cpu())
                output = tower.vision_model(pixel_values=inputs, output_hidden_states=True)
                embeddings.append(tower.project(output.pooler_output).float().cpu())
                states = output.hidden_states
                available = states[0].shape[1] - first
                chosen = [torch.randperm(available, generator=generator)[:NUM_PATCHES] for _ in inputs]
                index = (torch.stack(chosen) + first).to(inputs.device)
                rows = torch.arange(len(inputs), device=inputs.device)[:, None]
                patches.append(torch.stack([state[rows, index] for state in states]).float().cpu())
                classes.append(torch.stack([state[:, 0] for state in states]).float().cpu())
        return Look(
            embeddings=torch.cat(embeddings),
            views=torch.cat(views),
            class_tokens=torch.cat(classes, dim=1) if tower.has_class_token else None,
            patch_tokens=torch.cat(patches, dim=1),
        )

    def _inputs(self, part: slice, like: Tensor) -> tuple[Tensor, Tensor]:
        """Some images and their views as the tower takes them, on its device and in its type."""
        pixels = resize(self._images.images[part].to(like.device).float() / 255, self._statistics.size)
        normalised = normalise(pixels, self._statistics.mean, self._statistics.std)
        view = view_of(pixels, normalised, self._images.view_params[part], self._views, self._statistics)
        return normalised.to(like.dtype), view.to(like.dtype)


def _collapse(look: Look) -> dict[str, float]:
    return {
        "effective_rank": effective_rank(look.embeddings),
        "uniformity": uniformity(look.embeddings),
        "alignment": alignment(look.embeddings, look.views),
    }


def _drift_by_layer(base: Tensor | None, tower: Tensor | None) -> list[float] | None:
    if base is None or tower is None:
        return None
    return [drift(*layers) for layers in zip(base, tower, strict=True)]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every part is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
