"""Peak memory of a training step, counted without taking any.

The real step runs on fake tensors, which have shapes, types and autograd but no data; each storage is noted when it is
born and when it dies. What autograd saves, which chunk is alive and what a backward pass holds is then counted as it
happens, not modelled.

Only tensors are counted: not the library's workspaces inside an operation, the allocator's rounding and
fragmentation, nor the device's context.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

BACKWARD = "gradients on their way"
"""Component of what a backward pass makes outside of all watched modules."""


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside, tensors are made without memory, and run through without time.

    They say that they are on the CPU, whichever machine this is: autograd cannot run on fake CUDA tensors where there
    is no CUDA.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Small real tensors, such as a noise schedule, may take part.
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, new floating-point tensors have this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def fake_like(tensor: Tensor) -> Tensor:
    """A tensor of this shape and type, on the CPU as far as it knows; for use inside `fake_tensors`."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def make_fake(module: nn.Module) -> None:
    """Give a module of the meta device fake parameters, gradients and buffers, so that it runs inside `fake_tensors`.

    Models are made on the meta device first: fake parameters can neither be copied nor be moved to another type.
    """
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:  # tied weights stay tied
                made[id(parameter)] = fake = nn.Parameter(fake_like(parameter), parameter.requires_grad)
                fake.grad = None if parameter.grad is None else fake_like(parameter.grad)
            part._parameters[name] = made[id(parameter)]
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else fake_like(buffer)


def kernels_of(device_type: str) -> AbstractContextManager[Any]:
    """Inside, operations keep for their backward pass what they keep on this kind of device.

    Dropout is the one that differs: a mask of one byte on CUDA, of the input's type on the CPU.
    """
    # A TorchFunctionMode would be neater, but is off while a checkpointed layer is run again.
    return mock.patch.object(F, "dropout", _cuda_dropout) if device_type == "cuda" else nullcontext()


_dropout = F.dropout


def _cuda_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not 0 < p < 1:
        return _dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, training)[0]


class MemoryTracker(TorchDispatchMode):
    """Bytes of living tensor storages by component, now and at their highest sum.

    A storage belongs to the watched module that ran when it was made; otherwise to `BACKWARD` in a backward pass, and
    to `rest` elsewhere. What lived before is not counted.

    Attributes:
        current: Bytes by component.
        peak: The same when their sum was highest.
    """

    def __init__(self, rest: str) -> None:
        super().__init__()
        self.current: dict[str, int] = defaultdict(int)
        self.peak: dict[str, int] = {}
        self._rest = rest
        self._total = self._highest = 0
        self._running: list[str] = []
        self._known: dict[int, weakref.ref] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """These lived before."""
        for tensor in tensors:
            self._add(tensor, None)

    @contextmanager
    def watch(self, modules: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
        """Inside, what these modules make while they run is theirs, by name."""
        handles = []
        for component, module in modules:
            handles.append(module.register_forward_pre_hook(self._enter(component)))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, component: str) -> Callable[..., None]:
        return lambda _module, _inputs: self._running.append(component)

    def _leave(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, result)
        return result

    def _note(self, tensor: Tensor) -> None:
        # As torch.utils.module_tracker tells that a backward pass is running.
        backward = torch._C._current_graph_task_id() != -1
        self._add(tensor, self._running[-1] if self._running else BACKWARD if backward else self._rest)

    def _add(self, tensor: Tensor, component: str | None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if component is not None else 0

        def died(_reference: weakref.ref) -> None:
            del self._known[key]
            if component is not None:
                self.current[component] -= size
                self._total -= size

        self._known[key] = weakref.ref(storage, died)
        if component is not None:
            self.current[component] += size
            self._total += size
            if self._total > self._highest:
                self._highest, self.peak = self._total, dict(self.current)


def step_memory(
    step: Callable[[], object], modules: Iterable[tuple[str, nn.Module]], before: Iterable[Tensor], *, rest: str
) -> dict[str, int]:
    """What a step adds at its peak to the memory that is held before it, in bytes by component.

    Call it inside `fake_tensors`, on modules that `make_fake` has prepared. What the step leaves behind (constants
    computed at first use) counts as held before.

    Args:
        step: Forward and backward pass.
        modules: Component and module, for those that get a line of their own.
        before: Everything that is held before: parameters, buffers, gradients, the batch.
        rest: Component of everything else.
    """
    tracker = MemoryTracker(rest)
    tracker.ignore(before)
    with tracker.watch(modules), tracker:
        step()
    return {name: size - tracker.current[name] for name, size in tracker.peak.items() if size > tracker.current[name]}


def held_by(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, their gradients, and buffers."""
    for parameter in module.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from module.buffers()


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of different storages."""
    return sum({storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}.values())
