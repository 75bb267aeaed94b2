"""One forward pass of LLaVA with its loss, as `transformers.Trainer` wants it.

Same maths as `LlavaForConditionalGeneration`, with two savings: the language-model head runs only where a token is
learned (a fifth of the positions or less), and the frozen tower can be replaced by its cached output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcr_mllm.trainer import Metrics

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


def tower_features(llava: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """What the projector reads: hidden states of the chosen tower layer, without the class token where there is one.

    Args:
        llava: Its tower is run frozen and in its own dtype.
        pixel_values: [I, 3, S, S].

    Returns:
        [I, P, D].
    """
    tower, config = llava.model.vision_tower, llava.config
    with torch.no_grad():
        # An index instead of True: only that layer's states are kept in memory.
        outputs = tower(pixel_values.to(tower.dtype), output_hidden_states=config.vision_feature_layer)
    states = outputs.hidden_states[config.vision_feature_layer]
    return states[:, 1:] if config.vision_feature_select_strategy == "default" else states


def learned_logits(
    llava: LlavaForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor,
    target_positions: Tensor,
    images: dict[str, Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Logits where a token is learned.

    Args:
        llava: The model.
        input_ids: [B, L].
        attention_mask: [B, L].
        target_positions: [T], of the flattened [B * L].
        images: One entry: `pixel_values` [I, 3, S, S] or `image_features` [I, P, D], with the prefix `unused_` in a
            batch that has no image.

    Returns:
        Logits [T, V], and the projected features [I, P, H] if they are unused.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    ((name, values),) = images.items()
    features = values if name.endswith("image_features") else tower_features(llava, values)
    projector: Any = llava.model.multi_modal_projector
    projected = projector(features.to(llava.lm_head.weight.dtype))
    used = not name.startswith("unused_")
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=list(projected))} if used else None
    outputs = llava.model(
        input_ids=input_ids, attention_mask=attention_mask, mm_encoder_outputs=encoded, use_cache=False
    )
    hidden = outputs.last_hidden_state.flatten(0, 1)[target_positions]  # [T, H]
    return llava.lm_head(hidden), None if used else projected


class LlavaStep(nn.Module):
    """LLaVA, or a PEFT model around it, that returns the loss over all learned tokens.

    Args:
        model: With `requires_grad` set where it trains.
    """

    accepts_loss_kwargs = True

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.metrics = Metrics()

    @property
    def llava(self) -> LlavaForConditionalGeneration:
        """The LLaVA itself, without a PEFT wrapper."""
        model: Any = self.model
        return model.base_model.model if hasattr(model, "peft_config") else model

    @property
    def image_tokens(self) -> int:
        """Tokens that an image becomes in the language model."""
        vision = self.llava.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def train(self, mode: bool = True) -> LlavaStep:
        """Training mode for all but the frozen tower."""
        super().train(mode)
        self.llava.model.vision_tower.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        target_positions: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | None = None,
        num_truncated: Tensor | None = None,
        num_tokens: Tensor | None = None,
        **images: Tensor,
    ) -> dict[str, Tensor]:
        """Loss of a micro-batch.

        Args:
            input_ids: [B, L].
            attention_mask: [B, L].
            target_positions: [T], of the flattened [B * L], before the learned tokens.
            labels: The learned tokens [T].
            num_items_in_batch: Learned tokens of the whole global batch, which the sum is divided by; None: T.
            num_truncated: Samples cut at the end, for the log.
            num_tokens: Tokens that are no padding, for the log.
            images: See `learned_logits`.
        """
        logits, unused = learned_logits(self.llava, input_ids, attention_mask, target_positions, images)
        total = F.cross_entropy(logits.float(), labels, reduction="sum")
        count = labels.numel() if num_items_in_batch is None else num_items_in_batch
        loss = total / count
        if unused is not None:
            # In the graph, so that every process reduces the projector's gradient at the same point.
            loss = loss + 0.0 * unused.float().sum()
        if num_truncated is not None and num_tokens is not None:
            zero = loss.detach().new_zeros(())
            self.metrics.add(
                {
                    "truncated_samples": zero + num_truncated,
                    "padding_share": 1 - num_tokens / input_ids.numel(),
                    "learned_tokens": zero + labels.numel(),
                }
            )
        return {"loss": loss}
