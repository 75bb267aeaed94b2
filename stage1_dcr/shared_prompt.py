"""Exact savings in a UNet whose text condition is a constant prompt plus one vector.

The denoiser sees ``encoder_hidden_states = P + 1 c^T``: the empty prompt ``P [77, D]`` with the *same* vector ``c [D]``
added at every token. Two things follow, both exact in real arithmetic.

**Cross-attention needs no projection of 77 tokens per sample.** For one query ``q`` the keys are ``k_j = W_k (p_j +
c)``, so every logit of that query shifts by the same number ``q . W_k c``, and a softmax does not see a common shift.
The attention weights are therefore those of the prompt alone. The values are ``v_j = W_v p_j + W_v c`` and the
weights sum to one, so

    attention(q) = softmax(q K_0^T) V_0 + W_v c,    K_0 = P W_k^T, V_0 = P W_v^T (+ biases)

and, as the output projection is linear, ``W_o`` of it is ``W_o softmax(q K_0^T) V_0 + b_o + W_o W_v c``. ``K_0`` and
``V_0`` are computed once per layer for the life of the denoiser; the condition enters as one vector per sample, added
to every position, and no gradient goes through keys or values.

**Whatever precedes the first cross-attention does not depend on c.** In a DCR row the same noisy latent is denoised
under ``n`` conditions. The time embedding, ``conv_in``, the first residual block, the first transformer's
normalisation, input projection and self-attention, and even the attention weights of the first cross-attention, are
the same for all ``n``: they run once per row and are expanded (for one row at a time the expansion is a view, not a
copy).

Both are installed on *our own instance* of the UNet, by attention processors (the public hook of diffusers) and by
wrapping sub-modules in :class:`OncePerRow`. Nothing of the library is patched, and with an inactive :class:`Grid` the
UNet behaves as before, so that the plain call stays available as a judge.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from dcr_mllm.log import get_logger

logger = get_logger(__name__)

_KNOWN_BLOCKS = {
    "CrossAttnDownBlock2D",
    "DownBlock2D",
    "UNetMidBlock2DCrossAttn",
    "UNetMidBlock2D",
    "CrossAttnUpBlock2D",
    "UpBlock2D",
}


class Grid:
    """How the UNet's batch is laid out at the moment: ``conditions_per_row`` consecutive samples share a latent.

    Attributes:
        device_type: Attend as on this kind of device; None: as suits the tensors' own.
    """

    def __init__(self) -> None:
        self.active = False
        self.conditions_per_row = 1
        self.device_type: str | None = None

    @contextmanager
    def of(self, conditions_per_row: int) -> Iterator[None]:
        """Inside the context the UNet takes vectors ``[R * n, 1, D]`` in place of tokens ``[R * n, 77, D]``."""
        self.active, self.conditions_per_row = True, conditions_per_row
        try:
            yield
        finally:
            self.active, self.conditions_per_row = False, 1


def first_of_each_row(x: Tensor, n: int) -> Tensor:
    """``[R * n, ...] -> [R, ...]``, a view."""
    return x[::n] if n > 1 else x


def repeat_each_row(x: Tensor, n: int) -> Tensor:
    """``[R, ...] -> [R * n, ...]``, a view when R is 1."""
    if n == 1:
        return x
    return x.unsqueeze(1).expand(-1, n, *x.shape[1:]).flatten(0, 1)


class OncePerRow(nn.Module):
    """Runs a module that cannot see the condition once per row and expands its result to the row's samples."""

    def __init__(self, module: nn.Module, grid: Grid) -> None:
        super().__init__()
        self.module = module
        self.grid = grid

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        n = self.grid.conditions_per_row
        if not self.grid.active or n == 1:
            return self.module(*args, **kwargs)
        rows = [first_of_each_row(a, n) if isinstance(a, Tensor) else a for a in args]
        return repeat_each_row(self.module(*rows, **kwargs), n)


class SharedPromptAttention:
    """Attention processor for cross-attention over ``prompt + c`` (see the module's docstring).

    Args:
        prompt: The constant prompt, ``[tokens, D]``.
        grid: Layout of the batch; while it is inactive the original processor is used.
        original: The processor that the layer had.
        first: Whether this is the UNet's first cross-attention, whose queries do not depend on the condition.
    """

    def __init__(self, prompt: Tensor, grid: Grid, original: Any, *, first: bool) -> None:
        self.prompt = prompt
        self.grid = grid
        self.original = original
        self.first = first
        self._constants: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if not self.grid.active:
            return self.original(attn, hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs)
        assert encoder_hidden_states is not None and encoder_hidden_states.shape[1] == 1
        n = self.grid.conditions_per_row
        queries = first_of_each_row(hidden_states, n) if self.first else hidden_states
        attended = self._attend(attn, queries)
        if self.first:
            attended = repeat_each_row(attended, n)
        # The condition arrives in its own precision (fp32) and is cast here, layer by layer, so that the gradients of
        # all layers add up in fp32. It enters after the output projection, as one vector per sample.
        condition = encoder_hidden_states.to(attn.to_v.weight.dtype)
        shift = F.linear(F.linear(condition, attn.to_v.weight), attn.to_out[0].weight)
        return attended + shift

    def _attend(self, attn: Attention, queries: Tensor) -> Tensor:
        """``[S, L, C] -> [S, L, C]``: attention over the bare prompt, output projection included."""
        samples, length, _ = queries.shape
        key, value = self._keys_and_values(attn)
        query = attn.to_q(queries).view(samples, length, attn.heads, -1).transpose(1, 2)
        if (self.grid.device_type or query.device.type) == "cpu":
            # With constant keys and values the written-out form has half the products to differentiate, and 77 tokens
            # make small matrices: faster than the fused kernel on a CPU (a third of its backward with narrow heads).
            attended = (query * attn.scale @ key.transpose(-1, -2)).softmax(dim=-1) @ value
        else:
            attended = F.scaled_dot_product_attention(
                query, key.expand(samples, -1, -1, -1), value.expand(samples, -1, -1, -1), scale=attn.scale
            )
        return attn.to_out[0](attended.transpose(1, 2).reshape(samples, length, -1))

    def compute_constants(self, attn: Attention) -> None:
        """Computes what is constant on the device of the layer now, before its first use."""
        self._keys_and_values(attn)

    def _keys_and_values(self, attn: Attention) -> tuple[Tensor, Tensor]:
        """The prompt's keys and values, ``[1, heads, tokens, head_width]`` each; computed at first use."""
        weight = attn.to_k.weight
        if self._constants is None or self._constants[0].device != weight.device:
            with torch.no_grad():
                prompt = self.prompt.to(weight.device, weight.dtype)[None]
                key, value = (
                    project(prompt).view(1, prompt.shape[1], attn.heads, -1).transpose(1, 2).contiguous()
                    for project in (attn.to_k, attn.to_v)
                )
            self._constants = key, value
        return self._constants


def install(unet: UNet2DConditionModel, prompt: Tensor) -> Grid | None:
    """Installs the exact savings on this instance of the UNet.

    Args:
        unet: A frozen UNet that nobody else uses.
        prompt: The constant prompt, ``[tokens, D]``.

    Returns:
        The grid through which they are switched on, or None (with a logged warning) when the UNet has something that
        they do not cover; it is left untouched then.
    """
    reason = _not_covered(unet)
    if reason is not None:
        logger.warning("The UNet has %s: the condition goes through the plain path, exact but slower.", reason)
        return None
    grid = Grid()
    first_layer = _wrap_what_precedes_the_condition(unet, grid)
    for module in unet.modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            original = module.processor
            module.set_processor(SharedPromptAttention(prompt, grid, original, first=module is first_layer))
    return grid


def compute_constants(unet: UNet2DConditionModel) -> None:
    """Computes the constants of all layers; a compiled layer would be compiled once to compute its own, then again."""
    for module in unet.modules():
        if isinstance(module, Attention) and isinstance(module.processor, SharedPromptAttention):
            module.processor.compute_constants(module)


def _not_covered(unet: UNet2DConditionModel) -> str | None:
    """What in this UNet the derivation does not hold for, or None."""
    config = unet.config
    if unet.training:
        return "training mode (dropout)"
    for key in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "encoder_hid_dim"):
        if getattr(config, key, None) is not None:
            return f"`{key}: {getattr(config, key)}`"
    if getattr(config, "attention_type", "default") != "default" or getattr(config, "dual_cross_attention", False):
        return "gated or dual cross-attention"
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        if block is not None and type(block).__name__ not in _KNOWN_BLOCKS:
            return f"a block of type {type(block).__name__}"
    for name, module in unet.named_modules():
        if isinstance(module, BasicTransformerBlock) and module.norm_type != "layer_norm":
            return f"`norm_type: {module.norm_type}` in {name}"
        if isinstance(module, Attention) and module.is_cross_attention:
            if type(module.processor) not in (AttnProcessor, AttnProcessor2_0):
                return f"the attention processor {type(module.processor).__name__} in {name}"
            specials = ("norm_cross", "norm_q", "norm_k", "group_norm", "spatial_norm", "added_kv_proj_dim")
            used = [key for key in specials if getattr(module, key, None) is not None]
            plain = module.rescale_output_factor == 1.0 and not module.residual_connection
            if used or not plain or module.fused_projections:
                return f"{', '.join(used) or 'a rescaled, residual or fused projection'} in {name}"
    return None


def _wrap_what_precedes_the_condition(unet: UNet2DConditionModel, grid: Grid) -> Attention | None:
    """Wraps the modules before the first cross-attention and returns that layer (None: the first block has none)."""
    unet.time_embedding = OncePerRow(unet.time_embedding, grid)
    unet.conv_in = OncePerRow(unet.conv_in, grid)
    block = unet.down_blocks[0]
    block.resnets[0] = OncePerRow(block.resnets[0], grid)
    if not getattr(block, "has_cross_attention", False):
        return None  # deeper blocks could be wrapped too; Stable Diffusion has no such UNet
    transformer: Transformer2DModel = block.attentions[0]
    layer: BasicTransformerBlock = transformer.transformer_blocks[0]
    transformer.norm = OncePerRow(transformer.norm, grid)
    transformer.proj_in = OncePerRow(transformer.proj_in, grid)
    layer.norm1 = OncePerRow(layer.norm1, grid)
    if layer.only_cross_attention:
        return layer.attn1
    layer.attn1 = OncePerRow(layer.attn1, grid)
    layer.norm2 = OncePerRow(layer.norm2, grid)
    return layer.attn2
