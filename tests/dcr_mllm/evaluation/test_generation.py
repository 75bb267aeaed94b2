"""Answers with one prefill per image are those of `generate`, asked one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dcr_mllm.conversation import TEMPLATES, Turn, prompt
from dcr_mllm.evaluation import generation
from dcr_mllm.evaluation.generation import Request, generate_answers
from dcr_mllm.llava import load_llava, load_processor
from stage2_llava.assemble import assemble


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30 + seed, 44, 3), dtype=np.uint8))


def lively(model: Any) -> Any:
    """Random weights large enough that answers depend on what is asked and shown."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.25)
    return model.float().eval()


@pytest.fixture(scope="module", params=["clip and llama", "siglip and qwen"])
def llava(request: pytest.FixtureRequest, tiny_clip: Path, tiny_siglip: Path, tiny_llama: Path, tiny_qwen: Path) -> Any:
    if request.param == "clip and llama":
        model, processor, template = assemble(tiny_clip, tiny_llama, template="vicuna_v1")
    else:
        model, processor, template = assemble(tiny_siglip, tiny_qwen, template="chatml")
    return lively(model), processor, template


def ask(template: Any, question: str, seed: int | None, most: int = 8) -> Request:
    text = question if seed is None else f"<image>\n{question}"
    rendered = prompt(template, [Turn("user", text)])
    images = () if seed is None else (image(seed),)
    return Request(prompt=rendered, images=images, image_key=str(seed), max_new_tokens=most)


QUESTIONS = ("Is it red?", "What is in the image? It is blue, and there are two of them.", "left", "two or three?")


def requests_for(template: Any) -> list[Request]:
    on_images = [ask(template, question, seed) for seed in (1, 2, 3) for question in QUESTIONS]
    without = [ask(template, question, None) for question in QUESTIONS[:2]]
    several = Request(
        prompt=prompt(template, [Turn("user", "<image>\n<image>\nIs it red?")]),
        images=(image(1), image(2)),
        image_key="1 and 2",
        max_new_tokens=5,
    )
    mixed = [*on_images, *without, several, ask(template, "Is it red?", 1, most=2)]
    return [mixed[k] for k in np.random.default_rng(0).permutation(len(mixed))]


def one_by_one(model: Any, processor: Any, requests: list[Request]) -> list[str]:
    answers = []
    for request in requests:
        images = list(request.images) or None
        inputs = processor(images=images, text=request.prompt, return_tensors="pt")
        settings = {"max_new_tokens": request.max_new_tokens, "do_sample": False, "temperature": None, "top_p": None}
        generated = model.generate(**inputs, **settings)
        answers.append(processor.tokenizer.decode(generated[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    return [answer.strip() for answer in answers]


def test_answers_are_those_of_generate(llava: Any):
    model, processor, template = llava
    requests = requests_for(template)
    expected = one_by_one(model, processor, requests)
    assert len(set(expected)) > 8  # they depend on image and question
    for batch_size in (1, 5, 64):
        assert generate_answers(model, processor, requests, batch_size=batch_size) == expected


def test_an_answer_ends_at_the_end_token(llava: Any):
    """The end token is one that the model does say in the middle of some answers, and not of others."""
    model, processor, template = llava
    requests = requests_for(template)
    before = model.generation_config.eos_token_id
    said = [
        processor.tokenizer(answer, add_special_tokens=False).input_ids
        for answer in one_by_one(model, processor, requests)
    ]
    tokens = [token for ids in said for token in ids[2:5]]
    ends = before if isinstance(before, list) else [before]
    model.generation_config.eos_token_id = [*ends, max(set(tokens), key=tokens.count)]
    try:
        expected = one_by_one(model, processor, requests)
        assert generate_answers(model, processor, requests, batch_size=7) == expected
    finally:
        model.generation_config.eos_token_id = before


def test_each_image_is_prefilled_once(llava: Any, monkeypatch: pytest.MonkeyPatch):
    model, processor, template = llava
    requests = [ask(template, question, seed) for question in QUESTIONS for seed in (1, 2)]
    seen: list[int] = []
    forward = type(model.model.vision_tower).forward

    def counting(self: Any, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(pixel_values))
        return forward(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(type(model.model.vision_tower), "forward", counting)
    kept: dict[int, str] = {}
    answers = generate_answers(model, processor, requests, batch_size=8, on_answers=kept.update)
    assert seen == [2]
    assert [kept[k] for k in range(8)] == answers


def test_a_batch_never_mixes_images(llava: Any):
    """Equal prompts on different images are different prefixes."""
    model, processor, template = llava
    requests = [ask(template, "Is it red?", seed) for seed in (1, 2, 3, 4)]
    assert generate_answers(model, processor, requests, batch_size=4) == one_by_one(model, processor, requests)


def test_saved_llava_answers_as_before(tiny_llava: Path):
    model, processor = load_llava(tiny_llava).float(), load_processor(tiny_llava)
    requests = [ask(TEMPLATES["vicuna_v1"], question, 2) for question in QUESTIONS]
    assert generation.generate_answers(model, processor, requests, batch_size=3) == one_by_one(
        model, processor, requests
    )
