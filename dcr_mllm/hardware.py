"""How an accelerator is used: settings that change speed, memory and rounding, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from dcr_mllm.log import get_logger

logger = get_logger(__name__)

# Settings that do nothing but on CUDA. Others work everywhere, or say themselves where they do not.
_CUDA_ONLY = ("tf32", "prefetch", "cuda_graphs")


@dataclass(kw_only=True)
class HardwareConfig:
    """What both stages can be told about the accelerator."""

    tf32: bool = False
    """Matrix products and convolutions of fp32 tensors with 10 bits of mantissa instead of 23 (CUDA, Ampere and newer).
    Losses and the noise schedule hold neither, so they stay fp32. false: fp32 is fp32, convolutions included."""
    prefetch: bool = False
    """Copy the next batch to the device, on a stream of its own, while this one is computed (CUDA). Changes no number;
    holds one more batch on the device."""


def warn_ignored(hardware: HardwareConfig, device: Literal["cuda", "cpu"]) -> None:
    """Warn of every setting that does nothing on this device, unless it is on by default."""
    defaults = type(hardware)()
    chosen = [name for name in _CUDA_ONLY if getattr(hardware, name, False) and not getattr(defaults, name)]
    if device == "cuda":
        if "tf32" in chosen and not _has_tf32():
            logger.warning("hardware.tf32 needs an Ampere or newer GPU and is ignored")
        return
    for name in chosen:
        logger.warning("hardware.%s does nothing on a CPU and is ignored", name)


def set_tf32(on: bool) -> None:
    """TF32 in products and convolutions of fp32 tensors, in this process.

    Not by the Trainer's `enable_tf32`: that one is cached, so that a value it has seen before does nothing, and sets
    `torch.backends.fp32_precision`, which does not reach what was set more closely and makes PyTorch's own readers of
    `allow_tf32` raise.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Inside, fp32 is fp32 whatever the process has chosen; PyTorch's own default lets convolutions run in TF32."""
    import torch

    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    set_tf32(False)
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def choose_tf32(hardware: HardwareConfig, device: Literal["cuda", "cpu"]) -> None:
    """Apply the setting to this process; GPUs older than Ampere have no TF32, a CPU has nothing to set."""
    if device == "cuda":
        set_tf32(hardware.tf32 and _has_tf32())


def _has_tf32() -> bool:
    from transformers.utils.import_utils import is_torch_tf32_available

    return is_torch_tf32_available()
