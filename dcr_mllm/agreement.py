"""What all processes must know before the weights change: is a loss not finite, was one of them told to stop?

One reduction of two numbers in an optimizer step, in the stream of the device's other work. It is asked for after the
last forward pass and read just before the optimizer step: by then the host has queued the backward pass, so that the
device does not idle while the host waits for the answer.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Agreement:
    """The maximum over processes of `[some loss is not finite, number of the signal to stop]`."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._answer: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None
        self._flags: Tensor | None = None

    @property
    def losses(self) -> list[Tensor]:
        """Of the micro-steps since the last answer, on the device."""
        return self._losses

    def add(self, loss: Tensor) -> None:
        """Note the loss of a micro-step."""
        self._losses.append(loss.detach().float())

    def ask(self, signal: int) -> None:
        """Send the question off; every process at the same micro-step.

        Args:
            signal: That this process has got, 0 for none.
        """
        bad = ~torch.stack(self._losses).isfinite().all()
        # `full` runs on the device, a tensor made from a number would be copied there and waited for.
        self._flags = torch.stack([bad.float(), torch.full_like(self._losses[0], float(signal))])
        work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, async_op=True) if _several() else None
        if self._flags.device.type != "cuda":
            if work is not None:
                work.wait()
            self._answer = self._flags
            return
        if self._stream is None:
            self._stream, self._arrived = torch.cuda.Stream(), torch.cuda.Event()
            self._answer = torch.empty(2, pin_memory=True)
        assert self._arrived is not None and self._answer is not None
        # In a stream of its own, or the backward pass would wait for the slowest process here.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            if work is not None:
                work.wait()
            self._answer.copy_(self._flags, non_blocking=True)
            self._arrived.record()

    def read(self) -> tuple[bool, int]:
        """Whether some process had a loss that is not finite, and the signal that some process has got (0: none)."""
        assert self._answer is not None, "nobody has asked"
        if self._arrived is not None:
            self._arrived.synchronize()
        bad, signal = self._answer.tolist()
        return bool(bad), int(signal)

    def clear(self) -> None:
        """Begin another optimizer step."""
        self._losses = []


def any_process(flag: Tensor) -> bool:
    """Whether a flag is set on some process. Waits for the device: not for the hot path."""
    value = flag.float()
    if _several():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
