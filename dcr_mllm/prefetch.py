"""Batches that are on the device before they are asked for: the copy runs beside the computation of the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

# Read by the host at every step (where the stream stands): on the device it would have to be waited for.
ON_HOST = "cursor"

Item = TypeVar("Item")
Started = TypeVar("Started")


class Prefetcher:
    """A DataLoader, but for its batches, which are on the device.

    The copies run on a stream of their own, one batch ahead, from the pinned memory that the loader must provide
    (`pin_memory=True`). What has been taken ahead is not consumed: positions are saved by whoever consumes.

    Args:
        loader: Gives mappings; tensors in them are moved, but for the one called `cursor`.
        device: On any other than CUDA the loader's batches are passed on as they are.
    """

    def __init__(self, loader: DataLoader, device: torch.device):
        self.loader = loader
        self.device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.device.type != "cuda":
            return iter(self.loader)
        return self._on_device()

    def _on_device(self) -> Iterator[dict[str, Any]]:
        stream = torch.cuda.Stream(self.device)

        def send(batch: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event]:
            with torch.cuda.stream(stream):
                sent = {
                    name: value.to(self.device, non_blocking=True)
                    if isinstance(value, Tensor) and name != ON_HOST
                    else value
                    for name, value in batch.items()
                }
                return sent, stream.record_event()

        for batch, copied in one_ahead(self.loader, send):
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for value in batch.values():
                if isinstance(value, Tensor) and value.is_cuda:
                    # It was allocated on the other stream, which must not use the memory again before this one is done.
                    value.record_stream(current)
            yield batch


def one_ahead(items: Iterable[Item], start: Callable[[Item], Started]) -> Iterator[Started]:
    """What `start` makes of each item, in order; the next item is started before one is handed out."""
    ready: list[Started] = []
    for item in items:
        ready.append(start(item))
        if len(ready) == 2:
            yield ready.pop(0)
    yield from ready
