"""What settings for an accelerator must not change, as functions of the device: here on the CPU, in tests/gpu on one.

Every comparison is with the same denoiser, loaded afresh, without the setting.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stage1_dcr.denoiser import Denoiser
from stage1_dcr.hardware import compile_blocks
from stage1_dcr.objective import dcr_loss

WIDTH = 32
BATCH = 4


def loss_and_gradients(
    denoiser: Denoiser, predict: Any = None, *, rows_per_chunk: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The DCR loss of a batch and its gradients [2, B, D], on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    shape = denoiser.latent_shape(32)
    conditions, positives = (torch.randn(BATCH, WIDTH, generator=generator) for _ in range(2))
    latents, noise = (torch.randn(BATCH, *shape, generator=generator).to(denoiser.device) for _ in range(2))
    timesteps = torch.randint(0, 1000, (BATCH,), generator=generator).to(denoiser.device)
    leaves = [x.to(denoiser.device).requires_grad_() for x in (conditions, positives)]
    loss, _ = dcr_loss(
        *leaves,
        denoiser.add_noise(latents, noise, timesteps),
        timesteps,
        denoiser.target(latents, noise, timesteps),
        predict or denoiser.predict,
        rows_per_chunk=rows_per_chunk,
    )
    loss.backward()
    return loss.detach().cpu(), torch.stack([leaf.grad for leaf in leaves]).cpu()


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], device: str = "cpu") -> None:
    """Loss and gradients agree, in the norm, up to fp32 rounding; cuDNN's fast convolutions round more."""
    tolerance = 1e-5 if device == "cpu" else 3e-4
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm(), (ours, theirs)


def channels_last_changes_nothing(directory: Path, device: str) -> None:
    from stage1_dcr.hardware import Stage1Hardware, prepare_denoiser

    expected = loss_and_gradients(Denoiser.load(directory, device=device))
    denoiser = Denoiser.load(directory)
    prepare_denoiser(denoiser, Stage1Hardware(channels_last=True))
    denoiser.to(device)  # as in training: prepared on the CPU, moved afterwards
    parameters = [p for module in denoiser.modules().values() for p in module.parameters()]
    kernels = [p for p in parameters if p.ndim == 4 and p.shape[-1] > 1]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert_same(loss_and_gradients(denoiser), expected, device)


def compiled_blocks_change_nothing(directory: Path, device: str, backend: str) -> None:
    """Same numbers, every block as one graph, nothing compiled again by later steps."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain, denoiser = (Denoiser.load(directory, device=device) for _ in range(2))
    assert compile_blocks(denoiser.modules()["unet"], backend=backend) > 4
    graphs = []
    for seed in range(3):
        found = loss_and_gradients(denoiser, seed=seed, rows_per_chunk=BATCH)
        graphs.append(counters["stats"]["unique_graphs"])
        assert_same(found, loss_and_gradients(plain, seed=seed, rows_per_chunk=BATCH), device)
    assert graphs[0] > 1 and graphs == graphs[:1] * 3 and not counters["graph_break"]


def recorded_changes_nothing(
    directory: Path, device: str, record: Callable[..., Any], rows_per_chunk: int, num_recordings: int
) -> None:
    """Several steps through recordings, of which there are as many as shapes."""
    from stage1_dcr.graphs import RecordedPredict

    denoiser = Denoiser.load(directory, device=device)
    made = []

    def counting(*arguments: Any) -> Any:
        made.append(arguments)
        return record(*arguments)

    recorded = RecordedPredict(denoiser.predict, counting)
    for seed in range(3):
        expected = loss_and_gradients(denoiser, rows_per_chunk=rows_per_chunk, seed=seed)
        found = loss_and_gradients(denoiser, recorded, rows_per_chunk=rows_per_chunk, seed=seed)
        assert_same(found, expected, device)
    assert len(made) == num_recordings


def recorded_gradients_are_kept(directory: Path, device: str, record: Callable[..., Any]) -> None:
    """A gradient that lies in a leaf is not overwritten by the next replay."""
    from stage1_dcr.graphs import RecordedPredict

    denoiser = Denoiser.load(directory, device=device)
    recorded = RecordedPredict(denoiser.predict, record)
    latents, timesteps = torch.randn(1, *denoiser.latent_shape(32)).to(device), torch.tensor([500]).to(device)
    leaves = [torch.randn(1, 3, WIDTH).to(device).requires_grad_() for _ in range(2)]
    for leaf in leaves:
        recorded(latents, timesteps, leaf).square().sum().backward()
    for leaf in leaves:
        (expected,) = torch.autograd.grad(denoiser.predict(latents, timesteps, leaf).square().sum(), leaf)
        assert (leaf.grad - expected).norm() <= (1e-5 if device == "cpu" else 3e-4) * expected.norm()


def record_on_the_cpu(predict: Any, inputs: tuple[Tensor, ...]) -> Any:
    """Stands for `torch.cuda.make_graphed_callables`: one buffer each for inputs, prediction and gradient, which every
    replay overwrites."""
    buffers = [copy.deepcopy(x.detach()).requires_grad_(x.requires_grad) for x in inputs]
    with torch.enable_grad():
        output = predict(*buffers).detach().clone()
    gradient = torch.empty_like(buffers[2])

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *values: Tensor) -> Tensor:
            for buffer, value in zip(buffers, values, strict=True):
                buffer.data.copy_(value)
            with torch.enable_grad():
                ctx.prediction = predict(*buffers)
            return output.copy_(ctx.prediction.detach()).detach()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            gradient.copy_(torch.autograd.grad(ctx.prediction, buffers[2], gradients)[0])
            return None, None, gradient.detach()

    return Replay.apply


class NoHostSync(TorchDispatchMode):
    """Fails on operations for which the host would wait for an accelerator: reading a value, shapes that depend on
    values, and tensors made on the host."""

    FORBIDDEN = frozenset(
        "_local_scalar_dense item is_nonzero nonzero masked_select equal _unique2 unique_dim unique_consecutive "
        "bincount histc lift_fresh".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_operations += 1
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"the host would wait for {func}"
        if name in ("index", "index_put", "index_put_"):
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            assert not masks, f"the host would wait for the shape of {func}"
        return func(*args, **(kwargs or {}))
