"""Templates against LLaVA's documented texts, and their Jinja form against the pieces."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dcr_mllm.conversation import (
    TEMPLATES,
    Turn,
    choose_template,
    get_template,
    image_first,
    pieces,
    prompt,
)
from dcr_mllm.errors import UserError

TURNS = [
    Turn("user", "What is this?\n<image>"),
    Turn("assistant", "A café, 漢字 {braces}."),
    Turn("user", "How many {}?"),
    Turn("assistant", "two"),
]


def rendered(name: str, turns: list[Turn]) -> str:
    return "".join(piece.text for piece in pieces(TEMPLATES[name], turns))


def jinja(name: str, turns: list[Turn], add_generation_prompt: bool) -> str:
    """The template as transformers renders it, from messages whose images are parts."""
    messages = []
    for turn in turns:
        parts: list[dict[str, Any]] = [{"type": "image"}] * turn.text.count("<image>")
        parts.append({"type": "text", "text": turn.text.replace("<image>", "").strip()})
        messages.append({"role": turn.role, "content": parts})
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATES[name].jinja)
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


def test_vicuna_v1_is_llavas_text():
    """'curious user', one system text, no space after </s>, the image at the front of its turn."""
    assert rendered("vicuna_v1", TURNS) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is this? ASSISTANT: "
        "A café, 漢字 {braces}.</s>USER: How many {}? ASSISTANT: two</s>"
    )
    assert prompt(TEMPLATES["vicuna_v1"], TURNS[:1]).endswith(" USER: <image>\nWhat is this? ASSISTANT:")


def test_plain_drops_the_question_and_ends_with_a_newline():
    assert rendered("plain", TURNS[:2]) == "<image>A café, 漢字 {braces}.\n"
    assert [piece.text for piece in pieces(TEMPLATES["plain"], TURNS[:2]) if piece.learned] == [
        "A café, 漢字 {braces}.\n"
    ]


def test_chatml_text():
    assert rendered("chatml", TURNS) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\nA café, 漢字 {braces}.<|im_end|>\n<|im_start|>user\nHow many {}?<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n"
    )


@pytest.mark.parametrize("name", ["vicuna_v1", "chatml"])
def test_learned_pieces_are_answers_with_their_end(name: str):
    template = TEMPLATES[name]
    learned = [piece.text for piece in pieces(template, TURNS) if piece.learned]
    assert learned == [f"A café, 漢字 {{braces}}.{template.end}", f"two{template.end}"]


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_jinja_form_gives_the_same_text(name: str):
    turns = TURNS[:2] if name == "plain" else TURNS
    assert jinja(name, turns, False) == rendered(name, turns)
    if name != "plain":
        assert jinja(name, turns[:3], True) == prompt(TEMPLATES[name], turns[:3])


def test_system_message_replaces_the_system_text():
    environment = ImmutableSandboxedEnvironment()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = environment.from_string(TEMPLATES["vicuna_v1"].jinja).render(messages=messages, add_generation_prompt=True)
    assert text == "Be brief. USER: Hi ASSISTANT:"


def test_every_image_mark_moves_to_the_front():
    assert image_first("a <image> b <image>") == "<image>\n<image>\na  b"
    assert image_first("no image") == "no image"


def test_unknown_template_names_the_nearest():
    with pytest.raises(UserError, match="'vicuna' is unknown, did you mean 'vicuna_v1'"):
        get_template("vicuna")


class Tokenizer:
    """As much of a tokenizer as the choice of a template reads."""

    def __init__(self, chat_template: str | None, *special: str):
        self.chat_template, self.special = chat_template, special

    def get_vocab(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.special)}

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return type("Encoding", (), {"input_ids": [0] if text in self.special else [0, 1]})


@pytest.mark.parametrize(
    ("name", "tokenizer", "words"),
    [
        ("auto", Tokenizer(None, "</s>"), "no chat template"),
        ("auto", Tokenizer("[INST] {{ x }} [/INST]", "</s>"), "neither Vicuna's nor ChatML"),
        ("chatml", Tokenizer(None, "</s>"), "needs '<|im_start|>'"),
        ("vicuna_v1", Tokenizer(None, "<|im_end|>"), "needs '</s>'"),
        ("plain", Tokenizer(None, "</s>"), "alignment only"),
        ("llama_3", Tokenizer(None, "</s>"), "unknown"),
    ],
)
def test_templates_that_do_not_fit_are_refused(name: str, tokenizer: Tokenizer, words: str):
    with pytest.raises(UserError) as error:
        choose_template(name, tokenizer)
    assert words in str(error.value)


def test_auto_reads_the_chat_template():
    chatml = Tokenizer("<|im_start|>{{ x }}", "<|im_start|>", "<|im_end|>")
    assert choose_template("auto", chatml).name == "chatml"
    assert choose_template("auto", Tokenizer("USER: {{ x }} ASSISTANT:", "</s>")).name == "vicuna_v1"
