"""Conditions of all processes, with gradients: negatives from beyond a process's own batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Gather = Callable[[Tensor], tuple[Tensor, int]]
"""``own [B, D] -> (all [N, D] fp32, place of the first own)``."""


def gather_conditions(own: Tensor) -> tuple[Tensor, int]:
    """The conditions of all processes in the order of their ranks, in fp32.

    Every process contrasts its own rows with all conditions, so a condition's gradient is the sum of what all processes
    say about it. Each process's loss is a mean over its own rows: the mean of the gradients over processes, which DDP
    and ZeRO take, is then the gradient of the mean over all rows.

    Args:
        own: ``[B, D]``, the same B on every process.

    Returns:
        ``[B * processes, D]``, and where among them the process's own begin.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return own.float(), 0
    return _Gather.apply(own.float()), dist.get_rank() * len(own)


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums over processes and keeps the own part; works on every backend."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        ctx.batch = len(own)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.narrow(0, dist.get_rank() * ctx.batch, ctx.batch)
