"""The judge of the row-wise loss: the whole grid in one call of the denoiser and ordinary autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_dcr_loss(
    conditions: Tensor,
    positives: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor,
    target: Tensor,
    unet,
    *,
    tau=0.1,
    num_negatives=None,
) -> Tensor:
    """DCR loss over the undivided grid.

    With `num_negatives` K, row i has the K rows after it as negatives, row 0 following the last one.

    Args:
        conditions, positives: ``[B, D]``.
        noisy_latents, target: ``[B, C, h, w]``.
        timesteps: ``[B]``.
        unet: ``(latents [S, C, h, w], timesteps [S], conditions [S, D]) -> [S, C, h, w]``.
        tau: Temperature.
    """
    batch = len(conditions)
    grid = torch.cat([noisy_latents.repeat_interleave(batch, 0), noisy_latents])
    times = torch.cat([timesteps.repeat_interleave(batch), timesteps])
    samples = torch.cat([conditions.repeat(batch, 1), positives])
    outputs = unet(grid, times, samples).flatten(1)
    table, views = outputs[: batch * batch].view(batch, batch, -1), outputs[batch * batch :]
    losses = []
    for i in range(batch):
        anchor = table[i, i]
        around = [*range(i + 1, batch), *range(i)]
        others = [table[i, j] for j in around[: batch - 1 if num_negatives is None else num_negatives]]
        candidates = torch.stack([views[i], target[i].flatten(), *others])
        logits = F.cosine_similarity(anchor[None], candidates, dim=-1) / tau
        losses.append(-F.log_softmax(logits, dim=0)[:2].mean())
    return torch.stack(losses).mean()


def plain_unet(unet, prompt: Tensor):
    """The UNet as a function of condition vectors, by the book: the vector is added to all tokens of the prompt."""

    def call(latents: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        return unet(latents, timesteps, encoder_hidden_states=prompt + conditions[:, None]).sample

    return call
