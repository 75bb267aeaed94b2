"""The DCR objective, computed row by row.

Row ``i`` of the grid is noisy latent ``i`` denoised under every condition of the batch and under the condition of its
own augmented view. Row ``i`` alone decides loss ``i``, so the conditions become leaves, each chunk of rows is run
forward and backward at once, and the gradients add up in the leaves. That is exact, and needs the memory of one chunk
instead of the memory of the whole ``B x (B + 1)`` grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(noisy_latents [R, C, h, w], timesteps [R], conditions [R, n, D]) -> predictions [R, n, C, h, w]``."""

Positives = Literal["view+target", "view", "target"]
Part = Literal["view", "target"]

# Keeps the norm of an all-zero prediction differentiable; nothing beside the norm of a real one (about 56 at 28 x 28
# x 4).
_EPS = 1e-6
# Gradients with respect to single output elements are around 1e-5: too small for a float16 denoiser. A power of two
# is exact in every float format, so it can be taken out again without a trace.
_GRAD_SCALE = 1024.0
# Samples per chunk on an accelerator, at 28 x 28 latents; see `auto_rows_per_chunk`.
_CUDA_SAMPLES = 68
# The same on a CPU, where seven samples at 28 x 28 keep the cores busy.
_CPU_SAMPLES = 7
_REFERENCE_AREA = 28 * 28


class DCRStats(NamedTuple):
    """What is worth logging of one evaluation of the loss, detached and on the device: means over rows, unless it says
    otherwise.

    Attributes:
        loss: The loss itself, the mean of the parts of the positives in use.
        loss_view: Part of the augmented view, ``logsumexp - logit``; infinite if it is no positive.
        loss_target: Part of the ground truth; infinite if it is no positive.
        cos_view: Cosine between anchor and the prediction under the augmented view's condition.
        cos_target: Cosine between anchor and ground truth.
        cos_negative: Mean cosine between anchor and negatives.
        cosines: ``[B, 3]``, the last three for each row.
        num_negatives: Negatives per row (an int: known without looking at the device).
    """

    loss: Tensor
    loss_view: Tensor
    loss_target: Tensor
    cos_view: Tensor
    cos_target: Tensor
    cos_negative: Tensor
    cosines: Tensor
    num_negatives: int


def dcr_loss(
    conditions: Tensor,
    positives: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor,
    target: Tensor,
    predict: Predict,
    *,
    tau: float = 0.1,
    rows_per_chunk: int = 1,
    first_row: int | None = None,
    num_negatives: int | None = None,
    positives_used: Positives = "view+target",
    only: Part | None = None,
) -> tuple[Tensor, DCRStats]:
    """Diffusion contrastive reconstruction loss of one batch.

    Per row, the anchor is the prediction under the row's own condition; the positives are the prediction under its
    augmented view and the ground truth; the negatives are the predictions under the other rows' conditions. With
    ``s = cosine(anchor, .) / tau`` over all ``B + 1`` of them, ``loss_i = -1/2 sum_positives (s_p - logsumexp(s))``.

    Negatives from beyond the batch come with ``first_row``: ``conditions`` are then those of a larger batch, of which
    this one is a part. ``num_negatives`` takes as many of the others, those that follow the row's own in cyclic order.

    With one positive in use, the other is no candidate either: ``loss_i = logsumexp(s) - s_p``. The two parts that
    ``only`` tells apart share their candidates and add up to the loss.

    Gradients reach ``conditions`` and ``positives`` only: ``predict`` is treated as frozen, and they are computed
    during this call, so the returned loss can be differentiated once.

    Args:
        conditions: ``[B, D]``, one per image; with ``first_row`` ``[N, D]``, N >= B.
        positives: ``[B, D]``, conditions of the augmented views.
        noisy_latents: ``[B, C, h, w]``.
        timesteps: ``[B]``, integers.
        target: ``[B, C, h, w]``, what the denoiser was trained to output (noise or velocity).
        predict: The frozen denoiser, see :data:`Predict`.
        tau: Temperature.
        rows_per_chunk: Rows of the grid that are in memory at a time.
        first_row: Where in ``conditions`` this batch's own begin; None: they are all its own.
        num_negatives: Negatives per row; None: all other conditions.
        positives_used: Which positives there are.
        only: Leave the other positive's part out of the sum; for diagnostics.

    Returns:
        The scalar loss (fp32) and its statistics.

    Raises:
        ValueError: If there are no negatives (one condition) or the arguments do not fit each other.
    """
    total, batch = len(conditions), len(positives)
    if total < 2:
        raise ValueError(f"The DCR loss needs a batch of at least 2, found {total}: one has no negatives.")
    if first_row is None and positives.shape != conditions.shape:
        raise ValueError(
            f"positives {tuple(positives.shape)} must have the shape of conditions {tuple(conditions.shape)}."
        )
    if not 0 <= (first_row or 0) <= total - batch:
        raise ValueError(f"first_row is {first_row}, but {batch} rows from there on are not in {total} conditions.")
    if num_negatives is not None and not 1 <= num_negatives < total:
        raise ValueError(f"num_negatives must be in 1..{total - 1} for {total} conditions, found {num_negatives}.")
    if not len(noisy_latents) == len(timesteps) == len(target) == batch:
        raise ValueError(
            f"noisy_latents, timesteps and target must have {batch} rows as positives has, found "
            f"{len(noisy_latents)}, {len(timesteps)} and {len(target)}."
        )
    if tau <= 0 or rows_per_chunk < 1:
        raise ValueError(f"tau and rows_per_chunk must be positive, found {tau} and {rows_per_chunk}.")
    if only is not None and only not in positives_used.split("+"):
        raise ValueError(f"only is {only}, which is none of the positives {positives_used}.")
    choice = {"positives_used": positives_used, "only": only}
    arguments = (noisy_latents, timesteps, target, predict, tau, rows_per_chunk, first_row or 0, num_negatives, choice)
    if torch.is_grad_enabled() and (conditions.requires_grad or positives.requires_grad):
        loss, stats = _RowWiseDCR.apply(conditions, positives, *arguments)
    else:
        stats = _forward_rows(conditions, positives, *arguments)
        loss = stats[:, 0].mean()
    rows = stats.detach()
    means = dict(zip(DCRStats._fields, rows.mean(dim=0).unbind(), strict=False))
    return loss, DCRStats(**means, cosines=rows[:, 3:], num_negatives=num_negatives or total - 1)


def reconstruction_loss(
    conditions: Tensor, noisy_latents: Tensor, timesteps: Tensor, target: Tensor, predict: Predict
) -> Tensor:
    """Plain diffusion reconstruction: mean squared error of the prediction under each image's own condition, in fp32.

    Args:
        conditions: ``[B, D]``.
        noisy_latents: ``[B, C, h, w]``.
        timesteps: ``[B]``.
        target: ``[B, C, h, w]``.
        predict: The frozen denoiser, see :data:`Predict`.

    Returns:
        A scalar, differentiable with respect to ``conditions``.
    """
    prediction = predict(noisy_latents, timesteps, conditions[:, None]).squeeze(1)
    with torch.autocast(prediction.device.type, enabled=False):
        return F.mse_loss(_fp32(prediction), _fp32(target))


def auto_rows_per_chunk(
    batch_size: int,
    device: torch.device | str,
    *,
    latent_area: int = _REFERENCE_AREA,
    num_negatives: int | None = None,
) -> int:
    """Rows of the grid to run at a time.

    On a CPU one row of ``B + 1`` samples at 28 x 28 already keeps all cores busy, and larger chunks only leave the
    caches; one row also lets everything before the first cross-attention be shared by views instead of copies. The
    miniature's rows (9 samples at 12 x 12) are so small that starting the operations costs as much as doing them: four
    at a time take two thirds of the time of one by one.

    On an accelerator one row of 17 samples of 28 x 28 latents is too little work for the launch costs of a UNet, and
    several rows fill the card. 68 samples (four rows at batch 16) take about 13 GB with Stable Diffusion 2 in bf16,
    judged by the 53.5 GB published for the undivided grid of 272; larger latents get proportionally fewer. Beyond
    that nothing is gained but memory use. Nothing is measured at run time, so that the choice, and with it the order
    of summation, is reproducible.

    Args:
        batch_size: Images per process.
        device: Where the denoiser runs.
        latent_area: Height times width of the latents.
        num_negatives: Per row; None: ``batch_size - 1``.

    Returns:
        A divisor of ``batch_size``: all chunks have one shape, which compiled kernels and CUDA graphs are made for.
    """
    reference = _CPU_SAMPLES if torch.device(device).type == "cpu" else _CUDA_SAMPLES
    samples = reference * _REFERENCE_AREA / latent_area
    samples_per_row = (batch_size - 1 if num_negatives is None else num_negatives) + 2  # the anchor and its view
    largest = max(1, min(batch_size, int(samples / samples_per_row)))
    return next(rows for rows in range(largest, 0, -1) if batch_size % rows == 0)


class _RowWiseDCR(torch.autograd.Function):
    """Runs forward *and* backward of all rows in its forward; its backward only scales what was found."""

    @staticmethod
    def forward(ctx: Any, conditions: Tensor, positives: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        leaves = [_fp32(t.detach()).clone().requires_grad_() for t in (conditions, positives)]
        with torch.enable_grad():
            stats = _forward_rows(*leaves, *arguments, backward_into=leaves)
        grads = [
            leaf.grad.div_(_GRAD_SCALE).to(t.dtype) if leaf.grad is not None else torch.zeros_like(t)
            for leaf, t in zip(leaves, (conditions, positives), strict=True)
        ]
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(stats)
        return stats[:, 0].mean(), stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_stats: Tensor) -> tuple[Tensor | None, ...]:
        conditions_grad, positives_grad = ctx.saved_tensors
        none = (None,) * 9
        return conditions_grad * grad_loss, positives_grad * grad_loss, *none


def _forward_rows(
    conditions: Tensor,
    positives: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor,
    target: Tensor,
    predict: Predict,
    tau: float,
    rows_per_chunk: int,
    first_row: int,
    num_negatives: int | None,
    choice: dict[str, Any],
    *,
    backward_into: list[Tensor] | None = None,
) -> Tensor:
    """Statistics ``[B, 6]`` of all rows in the order of :class:`DCRStats`; given leaves, their gradients too."""
    total, batch = len(conditions), len(positives)

    def run(chunk: slice) -> Tensor:  # a function, so that nothing of one chunk survives into the next
        rows = torch.arange(first_row, first_row + batch, device=conditions.device)[chunk]
        if num_negatives is None:
            candidates, own = conditions.expand(len(rows), -1, -1), rows
        else:
            following = torch.arange(num_negatives + 1, device=rows.device)
            candidates, own = conditions[(rows[:, None] + following) % total], torch.zeros_like(rows)
        grid = torch.cat([candidates, positives[chunk, None]], dim=1)
        predictions = predict(noisy_latents[chunk], timesteps[chunk], grid)
        loss, stats = contrast(predictions, target[chunk], own, tau=tau, **choice)
        if backward_into is not None:
            # Only these leaves: whatever else `predict` may reach is none of our business.
            torch.autograd.backward(loss * (_GRAD_SCALE / batch), inputs=backward_into)
        return stats.detach()

    chunks = [slice(start, start + rows_per_chunk) for start in range(0, batch, rows_per_chunk)]
    return torch.cat([run(chunk) for chunk in chunks])


def contrast(
    predictions: Tensor,
    target: Tensor,
    rows: Tensor,
    *,
    tau: float,
    positives_used: Positives = "view+target",
    only: Part | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of some rows of the grid, in fp32 whatever the precision of the denoiser.

    Args:
        predictions: ``[R, M + 1, ...]``: under the M conditions of the row, then under the augmented view's.
        target: ``[R, ...]``.
        rows: ``[R]``, which of the M conditions is each row's own, hence its anchor.
        tau: Temperature.
        positives_used, only: See :func:`dcr_loss`.

    Returns:
        The sum of the rows' losses, and the first six statistics of :class:`DCRStats` for each row, ``[R, 6]``.
    """
    with torch.autocast(predictions.device.type, enabled=False):
        outputs = _unit(_fp32(predictions).flatten(2))
        truth = _unit(_fp32(target).flatten(1))
        anchors = outputs.gather(1, rows[:, None, None].expand(-1, 1, outputs.shape[2]))
        # Products and sums rather than a matrix product, which may run in TF32 and lose the digits that tau magnifies.
        cosines = (outputs * anchors).sum(dim=-1)
        to_truth = (truth * anchors[:, 0]).sum(dim=-1, keepdim=True)
        # The anchor's cosine with itself is no candidate; its place is taken by the ground truth.
        own = torch.arange(outputs.shape[1], device=rows.device) == rows[:, None]
        candidates = torch.where(own, to_truth, cosines)
        negatives = (candidates.sum(dim=-1) - cosines[:, -1] - to_truth[:, 0]) / (candidates.shape[1] - 2)
        if "target" not in positives_used:
            candidates = candidates.masked_fill(own, -torch.inf)
        if "view" not in positives_used:
            candidates = torch.cat([candidates[:, :-1], torch.full_like(to_truth, -torch.inf)], dim=1)
        logits = candidates / tau
        normaliser = logits.logsumexp(dim=-1)
        parts = {"view": normaliser - logits[:, -1], "target": normaliser - logits.gather(1, rows[:, None])[:, 0]}
        used = positives_used.split("+")
        loss = torch.stack([parts[name] for name in ([only] if only else used)]).sum(dim=0) / len(used)
        stats = [loss, parts["view"], parts["target"], cosines[:, -1], to_truth[:, 0], negatives]
        return loss.sum(), torch.stack(stats, dim=-1)


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(dim=-1, keepdim=True) + _EPS**2).rsqrt()


def _fp32(x: Tensor) -> Tensor:
    """At least fp32: float64 stays, as the judges of the tests work in it."""
    return x if x.dtype == torch.float64 else x.float()
