"""Diffusion times: how they are drawn, and how cosines depend on them."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_BINS = 5


def draw_timesteps(uniform: Tensor, *, sampling: str, low: int, high: int) -> Tensor:
    """Times in `[low, high)`.

    `logit-normal` is the sigmoid of a standard normal variable (Esser et al. 2024, arXiv 2403.03206; GenHancer draws a
    scaled form of it), reached from the uniform number by the inverse of the normal distribution, so that both kinds
    use the same random numbers.

    Args:
        uniform: `[B]` in [0, 1).
        sampling: `uniform` or `logit-normal`.
        low: First time.
        high: One past the last time.

    Returns:
        `[B]`, integers.
    """
    share = torch.special.ndtri(uniform).sigmoid() if sampling == "logit-normal" else uniform
    return (low + share * (high - low)).long().clamp(max=high - 1)


def by_timestep(
    values: dict[str, Tensor], timesteps: Tensor, num_train_timesteps: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Means of per-image values in equal ranges of time, without a look at the device.

    Args:
        values: Each `[B]`.
        timesteps: `[B]`.
        num_train_timesteps: Of the noise schedule.

    Returns:
        Means by `name@low-high`, and the numbers of images behind them, by the same names.
    """
    bins = timesteps * NUM_BINS // num_train_timesteps
    member = (bins[:, None] == torch.arange(NUM_BINS, device=bins.device)).float()  # [B, bins]
    counts = member.sum(dim=0)
    edges = [num_train_timesteps * index // NUM_BINS for index in range(NUM_BINS + 1)]
    means: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, value in values.items():
        sums = (member * value.detach().float()[:, None]).sum(dim=0)
        for index in range(NUM_BINS):
            key = f"{name}@{edges[index]}-{edges[index + 1]}"
            means[key], weights[key] = sums[index] / counts[index].clamp(min=1), counts[index]
    return means, weights
