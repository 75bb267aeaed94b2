"""Settings for an accelerator in stage 1, nearly all of which concern the frozen denoiser: that is where the time goes.

None of them changes what is computed. `docs/gpu.md` says what each does to the rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dcr_mllm.hardware import HardwareConfig

if TYPE_CHECKING:
    from torch import nn

    from stage1_dcr.denoiser import Denoiser

# Distinct graphs of one kind of block: by channels, by size and by whether the input has a gradient. Stable Diffusion
# has 17 among its residual blocks, and evaluation without gradients as many again.
_COMPILED_VARIANTS = 64


@dataclass(kw_only=True)
class Stage1Hardware(HardwareConfig):
    """What stage 1 can be told about the accelerator."""

    attention: Literal["auto", "fused", "math"] = "auto"
    """Kernels of tower, UNet and VAE. auto: PyTorch chooses layer by layer. fused: flash or memory-efficient ones only;
    a layer that neither can run stops the run. math: written-out products, which take most memory."""
    channels_last: bool = False
    """Weights of the UNet and the VAE in NHWC order, which convolutions on tensor cores want."""
    compile: bool = False
    """torch.compile of the UNet's residual and transformer blocks, in fixed shapes; the first step does the work."""
    cuda_graphs: bool = False
    """Record the UNet's forward and backward pass once and replay them, without the host's work per kernel (CUDA).
    Keeps the memory of one chunk for good."""

    @property
    def wants_fixed_shapes(self) -> bool:
        """Whether a chunk of another size than the others would be compiled or recorded anew."""
        return self.compile or self.cuda_graphs


def choose_attention(attention: Literal["auto", "fused", "math"]) -> None:
    """Choose the kernels of `scaled_dot_product_attention` in this process."""
    from torch.backends import cuda  # they rule the CPU's kernels too

    cuda.enable_math_sdp(attention != "fused")
    for enable in (cuda.enable_flash_sdp, cuda.enable_mem_efficient_sdp, cuda.enable_cudnn_sdp):
        enable(attention != "math")


def prepare_denoiser(denoiser: Denoiser, hardware: Stage1Hardware) -> None:
    """Apply the settings to a denoiser, once, on any device; it may be moved afterwards, before its first use."""
    import torch

    if hardware.channels_last:
        for module in denoiser.modules().values():
            module.to(memory_format=torch.channels_last)
    if hardware.compile:
        compile_blocks(denoiser.modules()["unet"])
    if hardware.cuda_graphs:
        denoiser.record_graphs()


def compile_blocks(unet: nn.Module, *, backend: str = "inductor") -> int:
    """Compile the blocks that a UNet repeats, in place, at their first use; returns how many there are.

    Compiling block by block instead of the whole shares the result between equal blocks. Every block must come out as
    one graph: PyTorch raises where one would fall apart, instead of running slowly.
    """
    import torch
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, _COMPILED_VARIANTS)
    blocks = [module for module in unet.modules() if isinstance(module, (BasicTransformerBlock, ResnetBlock2D))]
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)
    return len(blocks)
