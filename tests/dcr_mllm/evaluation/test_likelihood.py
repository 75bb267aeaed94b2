"""Scores of options with one prefill per image are those of whole forward passes, one by one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dcr_mllm.conversation import Turn, prompt
from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.generation import Request
from dcr_mllm.evaluation.likelihood import answer_gap, option_log_probabilities
from stage2_llava.assemble import assemble

QUESTIONS = ("Is it red?", "What is in the image? It is blue, and there are two of them.", "left")
# Of one token and of several, of unequal lengths. Behind `red?` the Llama's tokenizer has one token for
# `ASSISTANT: What is`.
OPTIONS = (["A", "No"], ["Yes", "No", "two of them", "it is blue"], ["What is", "right", "What is in"])


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30 + seed, 44, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=["clip and llama", "siglip and qwen"])
def llava(request: pytest.FixtureRequest, tiny_clip: Path, tiny_siglip: Path, tiny_llama: Path, tiny_qwen: Path) -> Any:
    """Random weights large enough that scores depend on all that is asked and shown."""
    if request.param == "clip and llama":
        model, processor, template = assemble(tiny_clip, tiny_llama, template="vicuna_v1")
    else:
        model, processor, template = assemble(tiny_siglip, tiny_qwen, template="chatml")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.25)
    return model.float().eval(), processor, template


def ask(template: Any, question: str, *seeds: int) -> Request:
    text = "<image>\n" * len(seeds) + question
    return Request(
        prompt=prompt(template, [Turn("user", text)]),
        images=tuple(image(seed) for seed in seeds),
        image_key=str(seeds),
    )


def asked(template: Any) -> tuple[list[Request], list[list[str]]]:
    """Questions on images, on two at once and on none, in a mixed order; and their options."""
    requests = [ask(template, question, seed) for seed in (1, 2, 3) for question in QUESTIONS]
    requests += [ask(template, QUESTIONS[0], 1, 2), ask(template, QUESTIONS[1])]
    requests = [requests[k] for k in np.random.default_rng(0).permutation(len(requests))]
    options = [OPTIONS[k % 3] for k in range(len(requests))]
    return [*requests, ask(template, QUESTIONS[0], 4)], [*options, OPTIONS[2]]


@torch.inference_mode()
def whole_pass(model: Any, processor: Any, request: Request, gap: str, options: list[str]) -> list[float]:
    """The same from the processor's own tokens, without a cache: the log-probability of a text less that of its stem.

    The stem is found by hand: all of the prompt, but for its last token where an option takes that into its first.
    """
    images = list(request.images) or None
    prompt_length = processor(images=images, text=request.prompt, return_tensors="pt").input_ids.shape[1]
    merges = request.prompt.endswith("red? ASSISTANT:") and any(option.startswith("What is") for option in options)
    scores = []
    for option in options:
        inputs = processor(images=images, text=request.prompt + gap + option, return_tensors="pt")
        predicted = torch.log_softmax(model(**inputs).logits[0].double(), dim=-1)
        start, ids = prompt_length - merges, inputs.input_ids[0]
        scores.append(sum(float(predicted[k - 1, ids[k]]) for k in range(start, len(ids))))
    return scores


def test_scores_are_those_of_whole_passes(llava: Any):
    model, processor, template = llava
    requests, options = asked(template)
    gap = " " if template.name == "vicuna_v1" else ""
    expected = [
        whole_pass(model, processor, request, gap, given) for request, given in zip(requests, options, strict=True)
    ]
    assert len({tuple(np.round(row, 3)) for row in expected}) == len(expected)  # they depend on image and question
    for batch_size in (1, 5, 64):
        kept: dict[int, list[float]] = {}
        scores = option_log_probabilities(
            model, processor, requests, options, batch_size=batch_size, on_scores=kept.update
        )
        for position, row in enumerate(expected):
            assert scores[position] == pytest.approx(row, abs=1e-3)
            assert kept[position] == scores[position]


def test_a_border_inside_a_token_is_seen(llava: Any):
    """The options above do test it: the last question with the last options has a token across the border."""
    _, processor, template = llava
    text = ask(template, QUESTIONS[0]).prompt
    ids = processor.tokenizer(text).input_ids
    together = processor.tokenizer(text + answer_gap(processor) + "What is").input_ids
    assert (together[: len(ids)] != ids) == (template.name == "vicuna_v1")


def test_each_image_is_prefilled_once(llava: Any, monkeypatch: pytest.MonkeyPatch):
    """For all questions and all options on it."""
    model, processor, template = llava
    requests = [ask(template, question, seed) for question in QUESTIONS for seed in (1, 2)]
    seen: list[int] = []
    forward = type(model.model.vision_tower).forward

    def counting(self: Any, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(pixel_values))
        return forward(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(type(model.model.vision_tower), "forward", counting)
    option_log_probabilities(model, processor, requests, [OPTIONS[1]] * 6, batch_size=24)
    assert seen == [2]


def test_options_of_one_token_take_one_row(llava: Any, monkeypatch: pytest.MonkeyPatch):
    model, processor, template = llava
    rows: list[int] = []
    forward = type(model).forward

    def counting(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        rows.append(len(input_ids))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", counting)
    requests = [ask(template, question) for question in QUESTIONS]
    single = ["A", "No"]  # one token each for both tokenizers
    option_log_probabilities(model, processor, requests, [single] * 3, batch_size=3)
    option_log_probabilities(model, processor, requests, [[*single, "two of them"]] * 3, batch_size=3)
    assert rows == [3, 2, 2, 2]


@pytest.mark.parametrize("options", [[], ["A", " "]])
def test_questions_without_options_are_refused(llava: Any, options: list[str]):
    model, processor, template = llava
    with pytest.raises(UserError, match="every question needs options"):
        option_log_probabilities(model, processor, [ask(template, "left")], [options], batch_size=1)


def test_no_questions_have_no_scores(llava: Any):
    model, processor, _ = llava
    assert option_log_probabilities(model, processor, [], [], batch_size=1) == []


def test_the_gap_is_that_of_the_template(llava: Any):
    _, processor, template = llava
    assert answer_gap(processor) == template.gap


@pytest.mark.parametrize("rendered", [("Q:? A:", "Q:? B: ANSWER"), ("Q:? A:", "Q:? A: answer")])
def test_a_template_that_does_not_go_on_is_refused(rendered: tuple[str, str]):
    processor = SimpleNamespace(apply_chat_template=lambda messages, **_: rendered[len(messages) - 1])
    with pytest.raises(UserError, match="does not put an answer behind the opened one"):
        answer_gap(processor)
