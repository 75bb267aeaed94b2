"""From samples to tensors: tokenized and padded on the right, images processed, learned positions listed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dcr_mllm.conversation import Template
from stage2_llava.labels import IGNORED, Encoded, encode

if TYPE_CHECKING:
    from stage2_llava.features import FeatureCache
    from stage2_llava.instructions import Instructions, Sample


class InstructionDataset(Dataset):
    """Samples by index: `Encoded` and the pixels, or the cached features, of their images.

    Args:
        instructions: The data.
        template: How turns become text.
        processor: A LLaVA processor; its image processor says how images are prepared.
        image_tokens: Tokens per image.
        max_length: Limit of a sample.
        features: Where the tower's outputs lie, in place of pixels.
    """

    def __init__(
        self,
        instructions: Instructions,
        *,
        template: Template,
        processor: Any,
        image_tokens: int,
        max_length: int,
        features: FeatureCache | None = None,
    ):
        self.instructions = instructions
        self.template = template
        self.processor = processor
        self.image_tokens = image_tokens
        self.max_length = max_length
        self.features = features

    def __len__(self) -> int:
        return len(self.instructions)

    def __getitem__(self, index: int) -> tuple[Encoded, list[Tensor]]:
        sample = self.instructions[index]
        encoded = encode(
            sample.turns,
            self.template,
            self.processor.tokenizer,
            image_tokens=self.image_tokens,
            max_length=self.max_length,
            where=sample.where,
        )
        return encoded, [self._image(sample, name) for name in sample.images]

    def _image(self, sample: Sample, name: str) -> Tensor:
        if self.features is not None:
            return self.features[name]
        return pixels(self.processor, [self.instructions.open_image(sample, name)])[0]


def pixels(processor: Any, images: Sequence[Any]) -> Tensor:
    """Pillow images -> pixel values [I, 3, S, S]."""
    return processor.image_processor(list(images), return_tensors="pt").pixel_values


class Collator:
    """Samples -> a batch for `stage2_llava.step.LlavaStep`.

    Args:
        pad_token_id: Fills `input_ids` on the right.
        empty_image: Zeros of an image's shape, pixels [3, S, S] or features [P, D]: a batch without images runs one
            through tower and projector all the same, since under ZeRO 3 and DDP all processes must do the same steps.
        key: `pixel_values` or `image_features`.
    """

    def __init__(self, pad_token_id: int, empty_image: Tensor, key: str = "pixel_values"):
        self.pad_token_id = pad_token_id
        self.empty_image = empty_image
        self.key = key

    def __call__(self, samples: Sequence[tuple[Encoded, list[Tensor]]]) -> dict[str, Tensor]:
        """
        Returns:
            `input_ids`, `attention_mask` [B, L]; `target_positions` [T], indices into the flattened [B * L] positions
            whose next token is learned, and `labels` [T], those tokens; `pixel_values` [I, 3, S, S] or
            `image_features` [I, P, D], or the same with the prefix `unused_` and one empty image; counts.
        """
        length = max(len(encoded.input_ids) for encoded, _ in samples)
        input_ids = torch.full((len(samples), length), self.pad_token_id)
        attention_mask = torch.zeros(len(samples), length, dtype=torch.long)
        labels = torch.full((len(samples), length), IGNORED)
        for row, (encoded, _) in enumerate(samples):
            count = len(encoded.input_ids)
            input_ids[row, :count] = torch.tensor(encoded.input_ids)
            attention_mask[row, :count] = 1
            labels[row, :count] = torch.tensor(encoded.labels)
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        target_positions = (following != IGNORED).nonzero()[:, 0]
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "target_positions": target_positions,
            "labels": following[target_positions],
            "num_truncated": torch.tensor(sum(encoded.num_truncated > 0 for encoded, _ in samples)),
            "num_tokens": attention_mask.sum(),
        }
        images = [image for _, own in samples for image in own]
        if images:
            batch[self.key] = torch.stack(images)
        else:
            batch[f"unused_{self.key}"] = self.empty_image[None]
        return batch
