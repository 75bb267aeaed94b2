"""Batches ahead of time: their order, and what counts as consumed."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from dcr_mllm.prefetch import Prefetcher, one_ahead


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_next_item_is_started_before_one_is_handed_out(count: int):
    log = []

    def start(item: int) -> int:
        log.append(f"start {item}")
        return 10 * item

    for value in one_ahead(range(count), start):
        log.append(f"use {value // 10}")
    assert [line for line in log if line.startswith("use")] == [f"use {i}" for i in range(count)]
    for item in range(count - 1):
        assert log.index(f"start {item + 1}") < log.index(f"use {item}")
    if count > 2:  # one ahead, not more: it lies in the device's memory
        assert log.index("use 0") < log.index("start 2")


def test_on_a_cpu_the_loader_is_as_before():
    loader = DataLoader([{"x": torch.tensor(float(i)), "cursor": torch.tensor(i)} for i in range(3)], batch_size=1)
    prefetcher = Prefetcher(loader, torch.device("cpu"))
    assert len(prefetcher) == 3 and prefetcher.dataset is loader.dataset and not hasattr(prefetcher, "set_epoch")
    for _ in range(2):
        assert [batch["x"].item() for batch in prefetcher] == [0.0, 1.0, 2.0]
