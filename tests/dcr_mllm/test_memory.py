"""Memory of a step without taking any: what the tracker counts, by hand and against tensors that exist."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dcr_mllm.memory import (
    BACKWARD,
    MemoryTracker,
    fake_tensors,
    held_by,
    kernels_of,
    make_fake,
    num_bytes,
    step_memory,
)

MB = 2**20 // 4  # floats


def test_storages_count_from_birth_to_death_and_views_do_not():
    tracker = MemoryTracker("rest")
    with fake_tensors(), tracker:
        a = torch.empty(3 * MB)
        b = a.view(3, MB)[0]
        c = torch.empty(5 * MB)
        del c
        d = torch.empty(1 * MB)
    assert tracker.current == {"rest": 4 * 2**20}
    assert tracker.peak == {"rest": 8 * 2**20}
    del a
    assert tracker.current == {"rest": 4 * 2**20}, "the view keeps its storage"
    del b, d
    assert tracker.current == {"rest": 0}
    with fake_tensors(), tracker:
        gaps = torch.empty_strided((2,), (MB - 1,))
    assert tracker.current == {"rest": 2**20}, "a storage counts, not the numbers that a tensor sees of it"
    del gaps


class Squares(nn.Module):
    """Saves its input for backward."""

    def forward(self, x):
        return x * x


def test_what_autograd_saves_is_the_modules_and_gradients_come_on_top():
    first, second = Squares(), Squares()
    with fake_tensors():
        x = torch.empty(MB, requires_grad=True)
        peak = step_memory(lambda: second(first(x)).sum().backward(), [("net", first), ("net", second)], [x], rest="r")
    # The two squares and their gradients: x itself lived before, and `sum` gives its operand's gradient as a view.
    assert peak["net"] in (1 * 2**20, 2 * 2**20)
    assert 2 * 2**20 <= peak["net"] + peak[BACKWARD] <= 4 * 2**20
    assert "r" not in peak or peak["r"] <= 16


def test_what_a_step_leaves_behind_was_held_before():
    cache: list[torch.Tensor] = []

    class Caches(nn.Module):
        def forward(self):
            cache.append(torch.empty(2 * MB))

    net = Caches()

    def step() -> None:
        net()
        torch.empty(MB)

    with fake_tensors():
        assert step_memory(step, [("net", net)], [], rest="r") == {"r": 2**20}


def test_fake_tensors_have_the_storages_of_real_ones():
    """The same steps on tensors that exist: an independent count, taken from their storages at each operation."""

    def net() -> nn.Module:
        layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.LayerNorm(16))
        return layers.requires_grad_(False)

    def run(model: nn.Module, x: torch.Tensor) -> None:
        model(x).square().mean().backward()

    torch.manual_seed(0)
    real, x = net(), torch.randn(4, 3, 8, 8, requires_grad=True)
    counted = step_memory(lambda: run(real, x), [("net", real)], [*held_by(real), x], rest="r")
    with torch.device("meta"):
        empty = net()
    with fake_tensors():
        make_fake(empty)
        fake = torch.randn(4, 3, 8, 8, requires_grad=True)
        assert step_memory(lambda: run(empty, fake), [("net", empty)], [*held_by(empty), fake], rest="r") == counted
    assert counted["net"] >= 4 * 8 * 36 * 4, "what GELU saves"


def test_tied_weights_stay_tied():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[1].weight = model[0].weight
        model[0].weight.grad = torch.zeros(4, 4)
    with fake_tensors():
        make_fake(model)
        assert model[1].weight is model[0].weight
        assert num_bytes(held_by(model)) == 2 * 64


def test_a_module_that_fails_is_left_all_the_same():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError

    tracker, module = MemoryTracker("rest"), Fails()
    with fake_tensors(), tracker.watch([("failing", module)]), tracker:
        with pytest.raises(RuntimeError):
            module(torch.empty(1))
        kept = torch.empty(MB)
    assert tracker.current["rest"] >= 2**20 and not tracker.current["failing"]
    del kept


@pytest.mark.parametrize(("device", "mask"), [("cpu", 4), ("cuda", 1)])
def test_dropout_keeps_the_mask_of_the_device(device: str, mask: int):
    kept: list[torch.Tensor] = []
    layer = nn.Dropout(0.1)
    with fake_tensors(), kernels_of(device):
        x = torch.empty(MB, requires_grad=True)
        tracker = MemoryTracker("rest")
        tracker.ignore([x])
        with tracker:
            kept.append(layer(x))
    assert tracker.current["rest"] == 2**20 + mask * MB
