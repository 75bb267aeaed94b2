"""Greedy answers to many questions, with one prefill per image.

Questions on one image share everything up to the end of its tokens: the system text and, for LLaVA-1.5, 576 of about
620 tokens. That prefix is run once, and its keys and values serve all questions on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question.

    Attributes:
        prompt: Rendered text, with `<image>` marks and the opened answer.
        images: Pillow images, one per mark, or what opens them: a benchmark's pictures need not fit into memory.
        image_key: Tells images apart: requests with the same key show the same images.
        max_new_tokens: Limit of the answer.
    """

    prompt: str
    images: tuple[Any, ...] | Callable[[], tuple[Any, ...]]
    image_key: str
    max_new_tokens: int = 16

    def open_images(self) -> tuple[Any, ...]:
        """The images, decoded if they are not."""
        return self.images() if callable(self.images) else self.images


@dataclass(frozen=True)
class Split:
    """A prompt as tokens: up to the end of its last image, and from there on."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


@torch.inference_mode()
def generate_answers(
    model: Any,
    processor: Any,
    requests: Sequence[Request],
    *,
    batch_size: int,
    on_answers: Callable[[dict[int, str]], None] = lambda answers: None,
) -> list[str]:
    """Greedy answers in the order of the requests, stripped of special tokens and white space.

    Args:
        model: LLaVA in eval mode.
        processor: Its own.
        requests: Any number, on any images, in any order.
        batch_size: Questions that are decoded together; greedy answers do not depend on it but for rounding.
        on_answers: Called after every batch with its answers by position, so that they can be kept.

    Returns:
        One answer per request.
    """
    split = [split_at_image(model, tokenize(model, processor, request.prompt)) for request in requests]
    answers = [""] * len(requests)
    for chosen in batches(requests, split, batch_size):
        texts = _answer_batch(model, processor, [requests[k] for k in chosen], [split[k] for k in chosen])
        found = dict(zip(chosen, texts, strict=True))
        for position, text in found.items():
            answers[position] = text
        on_answers(found)
    return answers


def tokenize(model: Any, processor: Any, text: str) -> list[int]:
    """Tokens of a prompt, with as many for each image as the model sees; its pixels are prepared once per batch."""
    vision = model.config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2
    image_id = model.config.image_token_id
    ids = processor.tokenizer(text).input_ids
    return [token for found in ids for token in [found] * (count if found == image_id else 1)]


def split_at_image(model: Any, ids: Sequence[int]) -> Split:
    """Cut behind the last image; the first part is empty without one."""
    end = max((k for k, token in enumerate(ids) if token == model.config.image_token_id), default=-1) + 1
    return Split(tuple(ids[:end]), tuple(ids[end:]))


def batches(requests: Sequence[Request], split: Sequence[Split], batch_size: int) -> Iterator[list[int]]:
    """Positions of requests that go together: prefixes of one length, same images beside each other."""

    def order(position: int) -> tuple:
        return len(split[position].prefix), requests[position].image_key, len(split[position].suffix)

    batch: list[int] = []
    for position in sorted(range(len(requests)), key=order):
        if batch and (len(batch) == batch_size or len(split[position].prefix) != len(split[batch[0]].prefix)):
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


def _answer_batch(model: Any, processor: Any, requests: Sequence[Request], split: Sequence[Split]) -> list[str]:
    cache, prefix_length = prefill(model, processor, requests, split)
    ids, mask = left_padded([part.suffix for part in split], model.device)
    mask = torch.cat([mask.new_ones(len(split), prefix_length), mask], dim=1)
    ends = _end_tokens(model, model.device)
    most = torch.tensor([request.max_new_tokens for request in requests], device=model.device)
    finished = most <= 0
    generated: list[Tensor] = []
    while not bool(finished.all()):
        outputs = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask, ids.shape[1]),
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = outputs.cache
        token = outputs.logits[:, -1].argmax(dim=-1)
        generated.append(torch.where(finished, ends[0], token))
        finished = finished | torch.isin(token, ends) | (len(generated) >= most)
        ids, mask = token[:, None], torch.cat([mask, mask.new_ones(len(split), 1)], dim=1)
    columns = torch.stack(generated, dim=1).tolist() if generated else [[] for _ in split]
    return [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in columns]


def prefill(model: Any, processor: Any, requests: Sequence[Request], split: Sequence[Split]) -> tuple[Any, int]:
    """Keys and values of each request's prefix [B, ...], run once per distinct prefix and image; and its length."""
    from transformers import DynamicCache

    cache, length = DynamicCache(config=model.config.text_config), len(split[0].prefix)
    if not length:
        return cache, 0
    keys = [(request.image_key, part.prefix) for request, part in zip(requests, split, strict=True)]
    distinct = dict(zip(keys, requests, strict=True))
    images = [image for request in distinct.values() for image in request.open_images()]
    pixel_values = processor.image_processor(images, return_tensors="pt").pixel_values
    model.model(
        input_ids=torch.tensor([prefix for _, prefix in distinct], device=model.device),
        pixel_values=pixel_values.to(model.device, model.dtype),
        cache=cache,
        use_cache=True,
    )
    row = {key: index for index, key in enumerate(distinct)}
    cache.batch_select_indices(torch.tensor([row[key] for key in keys], device=model.device))
    return cache, length


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, L] with zeros on the left, and the mask of what is no padding."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


def positions(mask: Tensor, count: int) -> Tensor:
    """Position ids [B, count] of the last tokens under a left-padded mask [B, L]."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -count:]


def _end_tokens(model: Any, device: torch.device) -> Tensor:
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends)
    return torch.tensor(ends, device=device)
