"""Gradient conflict against explicit backward passes, and over processes against the joint batch."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stage1_dcr.conflict import PARTS, Conflict
from tests.processes import clean_environment, run_to_end


class TwoParts(nn.Module):
    """A module in the manner of the training step: one trunk with dropout, two losses, `on_parts`."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.GELU(), nn.Linear(8, 4))
        self.trunk[0].bias.requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.on_parts: Callable[[dict[str, Callable[[], Tensor]]], None] | None = None

    def parts(self, x: Tensor) -> dict[str, Tensor]:
        y = self.trunk(x)
        return {"contrastive": 3 * y.softmax(dim=0)[0].sum(), "reconstruction": (y - x[:, :4]).square().mean()}

    def forward(self, x: Tensor) -> Tensor:
        parts = self.parts(x)
        if self.on_parts is not None:
            self.on_parts({name: lambda value=value: value for name, value in parts.items()})  # type: ignore[misc]
        return torch.stack(list(parts.values())).sum()


@pytest.fixture
def module() -> TwoParts:
    torch.manual_seed(0)
    return TwoParts()


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def batches(num: int) -> list[Tensor]:
    return list(torch.randn(num, 5, 6, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_equals_two_backward_passes(module: TwoParts, micro_steps: int):
    """The judge accumulates each part's gradients in `.grad` of a copy, with the same dropout."""
    gradients = []
    for name in PARTS:
        judge = copy.deepcopy(module)
        torch.manual_seed(2)
        for x in batches(micro_steps):
            (judge.parts(x)[name] / micro_steps).backward()
        flat = [np.zeros(p.numel()) if p.grad is None else p.grad.flatten().numpy() for p in trainable(judge)]
        gradients.append(np.concatenate(flat).astype(np.float64))
    first, second = gradients
    norms = [float(np.linalg.norm(gradient)) for gradient in gradients]

    conflict = Conflict(trainable(module))
    module.on_parts = conflict.add
    torch.manual_seed(2)
    for x in batches(micro_steps):
        module(x)
    found = conflict.take()
    assert found == pytest.approx(
        {
            "cosine": first @ second / (norms[0] * norms[1]),
            "dot": first @ second,
            "norm_contrastive": norms[0],
            "norm_reconstruction": norms[1],
        },
        rel=1e-5,
    )
    assert conflict.take() is None, "a look begins anew"


def test_training_does_not_notice(module: TwoParts):
    """Losses, gradients and random numbers are the same bits with and without."""

    def train(measured: bool) -> tuple[list[Tensor], Tensor]:
        copied = copy.deepcopy(module)
        conflict = Conflict(trainable(copied))
        copied.on_parts = conflict.add if measured else None
        torch.manual_seed(3)
        seen = []
        for x in batches(3):
            loss = copied(x)
            assert all(p.grad is None for p in copied.parameters()) or seen
            loss.backward()
            seen += [loss.detach(), *(p.grad.clone() for p in copied.parameters() if p.grad is not None)]
        return seen, torch.get_rng_state()

    (with_it, state_with), (without, state_without) = train(True), train(False)
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
    assert torch.equal(state_with, state_without)


def test_no_direction_no_cosine(module: TwoParts):
    conflict = Conflict(trainable(module))
    y = module.trunk(batches(1)[0])
    conflict.add({"contrastive": lambda: 0 * y.sum(), "reconstruction": lambda: y.square().sum()})
    found = conflict.take()
    assert found is not None and found["cosine"] is None and found["norm_contrastive"] == 0 == found["dot"]
    assert found["norm_reconstruction"]


class Listening(torch.autograd.Function):
    """The identity; its backward pass notes whether autocast is on."""

    seen: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Listening.seen.append(torch.is_autocast_enabled("cpu"))
        return grad


def test_gradients_are_taken_outside_of_autocast(module: TwoParts):
    """As in the backward pass of the loss, although the forward pass, which asks for them, is inside."""
    conflict = Conflict(trainable(module))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = Listening.apply(module.trunk(batches(1)[0]))
        conflict.add({"contrastive": lambda: y.sum(), "reconstruction": lambda: y.square().sum()})
        assert torch.is_autocast_enabled("cpu")
    assert Listening.seen == [False, False]


def test_two_processes_equal_one_with_the_joint_batch(
    tiny_clip: Path, tiny_denoiser: Path, tiny_shards: str, tmp_path: Path
):
    """The whole tower phase of `joint` under DDP, ZeRO 1 and ZeRO 2, with accumulation and negatives of both."""
    from tests.stage1_dcr import joint_diagnostics

    projector = joint_diagnostics.save_projector(tiny_clip, tiny_denoiser, tmp_path)
    arguments = [str(tiny_clip), str(tiny_denoiser), str(projector), tiny_shards, str(tmp_path)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run_to_end([*command, joint_diagnostics.__file__, *arguments], clean_environment())
    judge = joint_diagnostics.lines(*arguments, deepspeed="none", joint=True)
    assert [line["step"] for line in judge] == [0, 1, 2] and judge[0]["conflict"] is None
    assert all(abs(line["conflict"]["cosine"]) < 0.99 for line in judge[1:])
    for deepspeed in joint_diagnostics.ENGINES:
        found = joint_diagnostics.read(tmp_path / deepspeed)
        assert [line["step"] for line in found] == [0, 1, 2]
        for line, expected in zip(found[1:], judge[1:], strict=True):
            assert line["conflict"] == pytest.approx(expected["conflict"], rel=1e-3, abs=1e-5), deepspeed
            assert line["effective_rank"] == pytest.approx(expected["effective_rank"], rel=1e-4)
