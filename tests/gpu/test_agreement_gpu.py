"""The answer before the weights change arrives without waiting for the work that was queued after the question."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def test_answers_are_right_and_do_not_wait_for_later_work():
    from dcr_mllm.agreement import Agreement

    agreement = Agreement()
    matrix = torch.randn(4096, 4096, device="cuda")
    for losses, signal, expected in (([1.0, 2.0], 0, (False, 0)), ([1.0, float("inf")], 15, (True, 15))):
        for loss in losses:
            agreement.add(torch.tensor(loss, device="cuda"))
        agreement.ask(signal)
        for _ in range(200):  # the backward pass
            matrix = matrix @ matrix / 64
        done = torch.cuda.Event()
        done.record()
        assert agreement.read() == expected
        assert not done.query(), "reading has waited for the backward pass"
        torch.cuda.synchronize()
        agreement.clear()


def test_asking_does_not_synchronise():
    from dcr_mllm.agreement import Agreement

    agreement = Agreement()
    loss = torch.ones((), device="cuda")
    agreement.add(loss)
    agreement.ask(0)  # makes stream and memory
    agreement.read()
    agreement.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        agreement.add(loss)
        agreement.ask(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert agreement.read() == (False, 0)
