"""From turns to token ids and labels: what is learned are the answers with the tokens that end them, nothing else.

The whole text is tokenized once, as at inference, and the learned spans are found by the tokenizer's offsets. A token
that reaches out of a span over anything but white space means that template and tokenizer do not go together, and
raises: LLaVA's own code masks such a sample whole and trains on nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dcr_mllm.conversation import IMAGE_TOKEN, Template, Turn, pieces
from dcr_mllm.errors import UserError

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A tokenized sample.

    Attributes:
        input_ids: With every image's tokens in place.
        labels: The ids where they are learned, `IGNORED` elsewhere; not shifted.
        num_truncated: Tokens that were cut off at the end.
    """

    input_ids: list[int]
    labels: list[int]
    num_truncated: int


def special_prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text, usually its start token.

    Raises:
        UserError: It also appends an end token, so that no prompt could be continued.
    """
    ids = list(tokenizer("").input_ids)
    if tokenizer.eos_token_id in ids and tokenizer.eos_token_id != tokenizer.bos_token_id:
        raise UserError(
            "the tokenizer ends every text with its end token, so no answer can follow a prompt; "
            "set add_eos_token to false in its tokenizer_config.json"
        )
    return ids


def encode(
    turns: Sequence[Turn],
    template: Template,
    tokenizer: Any,
    *,
    image_tokens: int,
    max_length: int | None = None,
    where: str = "sample",
) -> Encoded:
    """Tokenize a conversation and mark what is learned.

    Args:
        turns: Alternating, the user first.
        template: Of `dcr_mllm.conversation`.
        tokenizer: A fast one that knows `<image>` as one token.
        image_tokens: Tokens that stand for one image.
        max_length: Longer samples are cut at the end; None for no limit.
        where: The sample's name for messages.

    Raises:
        UserError: Labels do not fall on token boundaries, or an image would be cut.
    """
    spans: list[tuple[int, int]] = []
    text = ""
    for piece in pieces(template, turns):
        if piece.learned:
            spans.append((len(text), len(text) + len(piece.text)))
        text += piece.text
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    prefix = special_prefix(tokenizer)
    mask = _learned(encoding["offset_mapping"], spans, text, where)

    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    input_ids: list[int] = list(prefix)
    labels: list[int] = [IGNORED] * len(prefix)
    last_image_end = 0
    for token, learned in zip(encoding["input_ids"], mask, strict=True):
        if token == image_id:
            input_ids += [image_id] * image_tokens
            labels += [IGNORED] * image_tokens
            last_image_end = len(input_ids)
        else:
            input_ids.append(token)
            labels.append(token if learned else IGNORED)
    num_truncated = 0
    if max_length is not None and len(input_ids) > max_length:
        if last_image_end > max_length:
            raise UserError(
                f"{where} needs {last_image_end} tokens up to the end of its last image, max_length is {max_length}; "
                "raise max_length, or leave the sample out"
            )
        num_truncated = len(input_ids) - max_length
        del input_ids[max_length:], labels[max_length:]
    return Encoded(input_ids=input_ids, labels=labels, num_truncated=num_truncated)


def _learned(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], text: str, where: str) -> list[bool]:
    """Which tokens lie in the learned spans; each span has to be covered whole, by tokens of its own."""
    mask = [False] * len(offsets)
    index = 0
    for begin, end in spans:
        while index < len(offsets) and offsets[index][1] <= begin:
            index += 1
        first = index
        while index < len(offsets) and offsets[index][0] < end:
            mask[index] = True
            index += 1
        start, stop = (offsets[first][0], offsets[index - 1][1]) if index > first else (begin, begin)
        # "ASSISTANT: yes": the space belongs to the token of the answer in most vocabularies.
        if stop != end or (start != begin and text[min(start, begin) : max(start, begin)].strip()):
            found = text[start:stop] if index > first else ""
            raise UserError(
                f"{where}: the tokens of answer {text[begin:end]!r} cover {found!r}: this template does not fit the "
                "tokenizer, choose another one with template=..."
            )
    return mask
