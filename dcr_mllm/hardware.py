"""How an accelerator is used: settings that change speed, memory and rounding, and nothing else."""

from __future__ import annotations

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
        if "tf32" in chosen and not tf32_argument(hardware, device):
            logger.warning("hardware.tf32 needs an Ampere or newer GPU and is ignored")
        return
    for name in chosen:
        logger.warning("hardware.%s does nothing on a CPU and is ignored", name)


def tf32_argument(hardware: HardwareConfig, device: Literal["cuda", "cpu"]) -> bool | None:
    """The setting as `transformers.TrainingArguments` wants it, which refuses True on older GPUs; None on a CPU."""
    if device != "cuda":
        return None
    from transformers.utils.import_utils import is_torch_tf32_available

    return hardware.tf32 and is_torch_tf32_available()
