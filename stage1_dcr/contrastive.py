"""The feature contrast: InfoNCE on class embeddings. DCR moves it into the denoiser's output space.

The paper's naive baseline adds it to plain reconstruction (arXiv 2603.04803, `L_joint`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    embeddings: Tensor,
    views: Tensor,
    *,
    tau: float,
    first_row: int | None = None,
    num_negatives: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """InfoNCE with the same candidates as DCR: an image's augmented view against the other images.

    ``loss_i = logsumexp(s) - s_view`` with ``s = cosine(z_i, .) / tau`` over ``z_i``'s view and the negatives; in fp32
    whatever the precision of the tower.

    Args:
        embeddings: ``[B, W]``, one per image; with ``first_row`` ``[N, W]``, those of all processes.
        views: ``[B, W]``, of the augmented views.
        tau: Temperature.
        first_row: Where in ``embeddings`` this batch's own begin; None: they are all its own.
        num_negatives: Negatives per row, those that follow its own in cyclic order; None: all others.

    Returns:
        The scalar loss, and `feature_cos_view` and `feature_cos_negative`, detached means over rows.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        # Double precision: a product in TF32 would lose the digits that tau magnifies, and this one is small.
        everyone, positives = (F.normalize(tensor.double(), dim=-1) for tensor in (embeddings, views))
        total, batch = len(everyone), len(positives)
        rows = torch.arange(batch, device=views.device) + (first_row or 0)
        anchors = everyone[rows]
        to_view = (anchors * positives).sum(dim=-1, keepdim=True)
        count = total - 1 if num_negatives is None else num_negatives
        others = (rows[:, None] + torch.arange(1, count + 1, device=rows.device)) % total
        to_others = (anchors @ everyone.T).gather(1, others)
        logits = torch.cat([to_view, to_others], dim=1) / tau
        loss = (logits.logsumexp(dim=-1) - logits[:, 0]).mean()
    cosines = {"feature_cos_view": to_view.mean().detach(), "feature_cos_negative": to_others.mean().detach()}
    return loss.float(), cosines
