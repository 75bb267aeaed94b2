"""CUDA graphs of the denoiser: its kernels are recorded once per shape and replayed as a whole.

A UNet of Stable Diffusion starts thousands of kernels per chunk of rows, which a host may take longer to start than a
fast GPU takes to run. Recording wants what the row loop already gives: chunks of one shape, nothing that the host waits
for, and no branch on values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dcr_mllm.errors import UserError

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""See `stage1_dcr.objective.Predict`."""


def _records_beside_threads() -> bool:
    return "capture_error_mode" in inspect.signature(torch.cuda.make_graphed_callables).parameters


def require_recording() -> None:
    """Refuse releases of PyTorch that can only record while no thread of the process calls CUDA: the one that pins
    batches does, and the error would end the run."""
    if not _records_beside_threads():
        raise UserError(
            "hardware.cuda_graphs needs a PyTorch whose torch.cuda.make_graphed_callables takes capture_error_mode, as "
            f"2.14 does; this is {torch.__version__}: upgrade it or leave hardware.cuda_graphs out."
        )


def record(predict: Predict, inputs: tuple[Tensor, ...]) -> Predict:
    """Record forward and backward pass for inputs like these; what comes back copies its arguments in and replays.

    Where `require_recording` would refuse, no other thread of the process may call CUDA meanwhile.
    """
    mode = {"capture_error_mode": "thread_local"} if _records_beside_threads() else {}
    samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
    # PyTorch refuses to record while autocast caches its casts; the denoiser runs without autocast anyway.
    with torch.autocast("cuda", enabled=False):
        return torch.cuda.make_graphed_callables(predict, samples, **mode)


class RecordedPredict:
    """`predict` that replays CUDA graphs wherever gradients are wanted, one for each shape it has met.

    Predictions and gradients live in the recording's own memory: use them before the next call, as the row loop does.

    Args:
        predict: The frozen denoiser; its parameters must not move once it has been called.
        record: How a recording is made.
    """

    def __init__(self, predict: Predict, record: Callable[[Predict, tuple[Tensor, ...]], Predict] = record):
        self._predict = predict
        self._record = record
        self._recordings: dict[tuple[Any, ...], Predict] = {}

    def __call__(self, noisy_latents: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and conditions.requires_grad):
            return self._predict(noisy_latents, timesteps, conditions)
        inputs = (noisy_latents, timesteps, conditions)
        key = tuple((x.shape, x.dtype, x.device) for x in inputs)
        if key not in self._recordings:
            self._recordings[key] = self._record(self._predict, inputs)
        # The gradient that a replay returns is overwritten by the next one, and autograd may put it into a leaf as it
        # is. The backward pass of a product makes a tensor of its own.
        return self._recordings[key](noisy_latents, timesteps, conditions * 1)
