"""Do the two parts of a loss pull the tower the same way? The cosine between their gradients.

The paper explains by it why a contrastive and a reconstruction loss that are merely added do not go together: the
cosine is negative in 86.3 % of steps (arXiv 2603.04803; the quantity is that of Yu et al. 2020, "Gradient Surgery",
section 2: two gradients conflict where their cosine is negative).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

PARTS = ("contrastive", "reconstruction")


class Conflict:
    """Gradients of both parts, averaged as the optimizer's gradient is: over micro-steps and over processes.

    The cosine is taken of the averages. A mean of cosines would be another number: each of a small batch's gradients is
    mostly noise, whose cosines lie near zero.

    Args:
        parameters: With respect to which, whole on every process (under ZeRO 3 they are not).
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self._parameters = list(parameters)
        self._sums: Tensor | None = None
        self._count = 0

    def add(self, parts: dict[str, Callable[[], Tensor]]) -> None:
        """One micro-step, on every process; before its backward pass, whose graph stays as it is.

        Neither `.grad` nor a random generator is touched, and no hook of DDP or DeepSpeed fires: those wait for
        gradients to be accumulated, and these are only returned.

        Args:
            parts: For each of `PARTS` what gives it as a scalar attached to the graph.
        """
        rows = torch.stack([self._gradient(parts[name]()) for name in PARTS])
        self._sums = rows if self._sums is None else self._sums + rows
        self._count += 1

    def take(self) -> dict[str, float | None] | None:
        """What was added, and start anew; call it on every process, all of which get the same.

        Returns:
            `cosine` (None where a gradient is zero), `dot`, and both norms; None if nothing was added.
        """
        if self._sums is None:
            return None
        means = self._sums / self._count  # [2, num_parameters], fp32
        self._sums, self._count = None, 0
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        # Tens of millions of products: double precision, so that a cosine near zero keeps its sign.
        products = [(means[i].double() * means[j]).sum() for i, j in ((0, 1), (0, 0), (1, 1))]
        dot, *squares = torch.stack(products).tolist()
        norms = [math.sqrt(square) for square in squares]
        cosine = dot / (norms[0] * norms[1]) if all(norms) else None
        return {"cosine": cosine, "dot": dot, **{f"norm_{name}": norm for name, norm in zip(PARTS, norms, strict=True)}}

    def _gradient(self, part: Tensor) -> Tensor:
        """Flat, in fp32."""
        # Outside of the forward pass's autocast, like the backward pass of the loss itself.
        with torch.autocast(part.device.type, enabled=False):
            found = torch.autograd.grad(part, self._parameters, retain_graph=True, allow_unused=True)
        pairs = zip(found, self._parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).detach().float().flatten() for g, p in pairs])
