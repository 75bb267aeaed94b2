"""How likely a model finds each of a question's options, with one prefill per image, as in `generation`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.generation import (
    Request,
    Split,
    batches,
    left_padded,
    positions,
    prefill,
    split_at_image,
    tokenize,
)


@dataclass(frozen=True)
class _Question:
    """A question as tokens: what all its options share, and what each adds."""

    stem: Split
    tails: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """What has to be read behind the stem: a tail's last token is predicted only, so single tokens share a row."""
        return list(dict.fromkeys(tail[:-1] for tail in self.tails))


@torch.inference_mode()
def option_log_probabilities(
    model: Any,
    processor: Any,
    requests: Sequence[Request],
    options: Sequence[Sequence[str]],
    *,
    batch_size: int,
    on_scores: Callable[[dict[int, list[float]]], None] = lambda scores: None,
) -> list[list[float]]:
    """Log-probabilities of given answers: the sum over an option's tokens, without the token that ends an answer.

    Args:
        model: LLaVA in eval mode.
        processor: Its own.
        requests: Any number, on any images, in any order; how long an answer may be does not matter.
        options: Of each request, without the white space that the chat template puts in front of an answer.
        batch_size: Rows that are run together; a question is one row, or one per option where options are longer than
            a token, and is never divided.
        on_scores: Called after every batch with its questions' scores by position, so that they can be kept.

    Returns:
        For each request one number per option.

    Raises:
        UserError: A question has no options or an empty one, or the chat template is not understood.
    """
    if not requests:
        return []
    gap = answer_gap(processor)
    questions = [
        _tokenize(model, processor, request.prompt, [gap + option for option in _checked(given)])
        for request, given in zip(requests, options, strict=True)
    ]
    scores: list[list[float]] = [[] for _ in requests]
    together = max(1, batch_size // max(len(question.rows) for question in questions))
    for chosen in batches(requests, [question.stem for question in questions], together):
        values = _score_batch(model, processor, [requests[k] for k in chosen], [questions[k] for k in chosen])
        found = dict(zip(chosen, values, strict=True))
        for position, value in found.items():
            scores[position] = value
        on_scores(found)
    return scores


def answer_gap(processor: Any) -> str:
    """What the chat template puts between an opened answer and the answer: Vicuna a space, ChatML nothing.

    Tokenizers that mark a word by the space in front of it make the gap part of the answer's first token: Vicuna was
    trained on `▁A` behind `ASSISTANT:` and generates it there, and `A` without the space is another token. The
    template is asked, because it is what rendered the training text.

    Raises:
        UserError: The template renders an answer other than by going on behind the opened one.
    """
    mark = "ANSWER"
    question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": mark}]}
    opened = processor.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    answered = processor.apply_chat_template([question, answer], tokenize=False)
    if not answered.startswith(opened) or mark not in answered[len(opened) :]:
        raise UserError("options cannot be scored: the chat template does not put an answer behind the opened one")
    return answered[len(opened) :].split(mark)[0]


def _checked(options: Sequence[str]) -> Sequence[str]:
    if not options or not all(option.strip() for option in options):
        raise UserError(f"every question needs options, and none of them empty; found {list(options)}")
    return options


def _tokenize(model: Any, processor: Any, prompt: str, continuations: Sequence[str]) -> _Question:
    """Prompt and continuation are tokenized together, as in training.

    A token may then reach across the border. The stem ends before the first token in which the prompt alone and any of
    the whole texts differ, so that all options are scored from the same place.
    """
    whole = [tokenize(model, processor, prompt + continuation) for continuation in continuations]
    texts = [tokenize(model, processor, prompt), *whole]
    length = next((k for k, ids in enumerate(zip(*texts, strict=False)) if len(set(ids)) > 1), min(map(len, texts)))
    return _Question(split_at_image(model, whole[0][:length]), tuple(tuple(ids[length:]) for ids in whole))


def _score_batch(
    model: Any, processor: Any, requests: Sequence[Request], questions: Sequence[_Question]
) -> list[list[float]]:
    rows = [(k, read) for k, question in enumerate(questions) for read in question.rows]
    stems = [questions[k].stem for k, _ in rows]
    cache, prefix_length = prefill(model, processor, [requests[k] for k, _ in rows], stems)
    read_ids = [stem.suffix + read for stem, (_, read) in zip(stems, rows, strict=True)]
    ids, mask = left_padded(read_ids, model.device)
    mask = torch.cat([mask.new_ones(len(rows), prefix_length), mask], dim=1)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions(mask, ids.shape[1]),
        cache=cache,
        use_cache=True,
        logits_to_keep=max(len(read) for _, read in rows) + 1,
    ).logits
    log_probabilities = logits.float().log_softmax(dim=-1)
    row = {key: log_probabilities[index] for index, key in enumerate(rows)}
    return [
        torch.stack([_sum(row[k, tail[:-1]], tail) for tail in question.tails]).tolist()
        for k, question in enumerate(questions)
    ]


def _sum(log_probabilities: Tensor, tail: tuple[int, ...]) -> Tensor:
    """Sum [] over a tail, from predictions [L, vocabulary] that end with the one of its last token."""
    chosen = torch.tensor(tail, device=log_probabilities.device)[:, None]
    return log_probabilities[-len(tail) :].gather(1, chosen).sum()
