"""What of a tower becomes the condition, and what is kept close to the base: its class embedding and patch tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dcr_mllm.towers import VisionTower
from stage1_dcr.config import Condition, Stage1Config


class TowerFeatures(NamedTuple):
    """What a tower says about images.

    Attributes:
        embedding: Class embedding, `[B, W]`.
        patches: Tokens of the layer that LLaVA reads, `[B, P, H]`; None where nobody asked.
    """

    embedding: Tensor
    patches: Tensor | None


def needs_patches(config: Stage1Config) -> bool:
    """Whether a training step reads patch tokens."""
    return config.condition != "class" or (config.keep_close > 0 and "patches" in config.keep_close_tokens)


def read_tower(tower: VisionTower, pixels: Tensor, *, patches: bool) -> TowerFeatures:
    """Normalised pixels `[B, 3, S, S]` through a tower."""
    return TowerFeatures(*tower.with_patches(pixels)) if patches else TowerFeatures(tower(pixels), None)


def projector_input(features: TowerFeatures, condition: Condition) -> Tensor:
    """The vector that the projector turns into a condition, `[B, W]`, `[B, W + H]` or `[B, H]`."""
    if condition == "class":
        return features.embedding
    assert features.patches is not None
    pooled = features.patches.mean(dim=1)
    return pooled if condition == "pooled-patches@-2" else torch.cat([features.embedding, pooled], dim=-1)


def distance_to_base(features: TowerFeatures, base: TowerFeatures, *, tokens: str, distance: str) -> Tensor:
    """How far a tower has moved from its base, in fp32.

    1 - cosine or mean squared error of the class embeddings, of the patch tokens, or the sum of both. KUEA and SALM
    keep a tower's text side fitting by such a term.

    Args:
        features: Of the trained tower.
        base: Of the frozen one, for the same pixels.
        tokens: `class`, `patches` or `class+patches`.
        distance: `cosine` or `mse`.

    Returns:
        A scalar, differentiable with respect to `features`.
    """
    names = {"class": "embedding", "patches": "patches"}
    terms = []
    for name in tokens.split("+"):
        ours, theirs = getattr(features, names[name]).float(), getattr(base, names[name]).float()
        if distance == "mse":
            terms.append(F.mse_loss(ours, theirs))
        else:
            terms.append((1 - F.cosine_similarity(ours, theirs, dim=-1)).mean())
    return torch.stack(terms).sum()
