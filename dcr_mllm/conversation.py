"""Conversations as text: the templates that training, evaluation and chat share.

A template turns turns into pieces of text, each marked as to be learned or not, so that the label mask and the prompt
come from one source; the Jinja form of the same template is what the saved processor carries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dcr_mllm.config import nearest
from dcr_mllm.errors import UserError

IMAGE_TOKEN = "<image>"


class Turn(NamedTuple):
    """One contribution; an image stands in its text as `<image>`."""

    role: Literal["user", "assistant"]
    text: str


class Piece(NamedTuple):
    """A stretch of the rendered text; `learned` marks answers with the token that ends them."""

    text: str
    learned: bool


@dataclass(frozen=True, kw_only=True)
class Template:
    """How turns become text: `[system] ([user] [assistant] answer end)*`.

    Attributes:
        name: As in configs.
        system: Text before the first turn, complete with its separators.
        user: Format of a user turn, with `{}` for its text.
        assistant: What opens an answer, and all of the prompt's end at inference.
        gap: Between that and the answer in training; never learned.
        end: What ends an answer; learned. A single token of the tokenizer in every template but `plain`.
        after: Behind the end; not learned.
        special_tokens: Tokens that the tokenizer must have whole.
        jinja: The same as a chat template.
    """

    name: str
    system: str
    user: str
    assistant: str
    gap: str
    end: str
    after: str
    special_tokens: tuple[str, ...]
    jinja: str


# A message's content is text, or a list of {"type": "image"} and {"type": "text", "text": ...}; images come first.
_CONTENT = (
    "{%- macro content(message) -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for item in message['content'] if item['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- for item in message['content'] if item['type'] == 'text' -%}{{ item['text'] }}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}"
)

# LLaVA-1.5 (llava/conversation.py, conv_vicuna_v1): "curious user", and no space after </s>.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_VICUNA = Template(
    name="vicuna_v1",
    system=f"{VICUNA_SYSTEM} ",
    user="USER: {} ",
    assistant="ASSISTANT:",
    gap=" ",
    end="</s>",
    after="",
    special_tokens=("</s>",),
    jinja=_CONTENT + "{%- if messages[0]['role'] != 'system' -%}{{ " + repr(f"{VICUNA_SYSTEM} ") + " }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ content(message) + ' ' }}"
    "{%- elif message['role'] == 'user' -%}{{ 'USER: ' + content(message) + ' ' }}"
    "{%- else -%}{{ 'ASSISTANT: ' + content(message) + '</s>' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}",
)

# LLaVA's alignment stage: the human prompt is dropped, a newline ends the caption, and there is no end token.
_PLAIN = Template(
    name="plain",
    system="",
    user="{}",
    assistant="",
    gap="",
    end="\n",
    after="",
    special_tokens=(),
    jinja="{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
    "{%- for item in message['content'] if item['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}"
    "{%- else -%}{%- if message['content'] is string -%}{{ message['content'] + '\\n' }}{%- else -%}"
    "{%- for item in message['content'] -%}{{ item['text'] + '\\n' }}{%- endfor -%}{%- endif -%}{%- endif -%}"
    "{%- endfor -%}",
)

# ChatML with the system text that Qwen uses, and LLaVA-NeXT with it.
_CHATML_SYSTEM = "You are a helpful assistant."
_CHATML = Template(
    name="chatml",
    system=f"<|im_start|>system\n{_CHATML_SYSTEM}<|im_end|>\n",
    user="<|im_start|>user\n{}<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    gap="",
    end="<|im_end|>",
    after="\n",
    special_tokens=("<|im_start|>", "<|im_end|>"),
    jinja=_CONTENT
    + "{%- if messages[0]['role'] != 'system' -%}{{ "
    + repr(f"<|im_start|>system\n{_CHATML_SYSTEM}<|im_end|>\n")
    + " }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + content(message) + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}",
)

TEMPLATES = {template.name: template for template in (_VICUNA, _PLAIN, _CHATML)}


def get_template(name: str) -> Template:
    """A template by name.

    Raises:
        UserError: Unknown; names the nearest.
    """
    if name not in TEMPLATES:
        raise UserError(f"template {name!r} is unknown{nearest(name, TEMPLATES)}")
    return TEMPLATES[name]


def choose_template(name: str, tokenizer: Any) -> Template:
    """The template for an LLM: the named one, or for `auto` the one that its chat template speaks.

    Args:
        name: `auto`, `vicuna_v1` or `chatml`.
        tokenizer: Of the LLM.

    Raises:
        UserError: The template does not fit the tokenizer, or `auto` has nothing to go by.
    """
    if name == "plain":
        raise UserError(
            "template plain has no questions and answers, it serves alignment only; use vicuna_v1 or chatml"
        )
    if name == "auto":
        chat = tokenizer.chat_template
        if chat is None:
            raise UserError("this LLM has no chat template; choose one with template=vicuna_v1 or template=chatml")
        text = chat if isinstance(chat, str) else str(chat)
        if "<|im_start|>" in text:
            name = "chatml"
        elif "USER:" in text and "ASSISTANT:" in text:
            name = "vicuna_v1"
        else:
            raise UserError(
                "the LLM's chat template is neither Vicuna's nor ChatML; choose template=vicuna_v1 or template=chatml"
            )
    template = get_template(name)
    known = tokenizer.get_vocab()
    for token in template.special_tokens:
        if token not in known or len(tokenizer(token, add_special_tokens=False).input_ids) != 1:
            other = "chatml" if name == "vicuna_v1" else "vicuna_v1"
            raise UserError(
                f"template {name} needs {token!r}, which is not one token of this tokenizer; try template={other}"
            )
    return template


def image_first(text: str) -> str:
    """Move the `<image>` marks of a turn to its front, each with a newline, as LLaVA does."""
    count = text.count(IMAGE_TOKEN)
    return f"{IMAGE_TOKEN}\n" * count + text.replace(IMAGE_TOKEN, "").strip() if count else text


def pieces(template: Template, turns: Sequence[Turn]) -> list[Piece]:
    """Render turns for training.

    Args:
        template: Of `TEMPLATES`.
        turns: Alternating, the user first.

    Returns:
        Pieces whose texts, joined, are what is tokenized. With `plain`, user turns keep their `<image>` marks only.
    """
    result: list[Piece] = [Piece(template.system, False)] if template.system else []
    for turn in turns:
        if turn.role == "user":
            result.append(Piece(_user_text(template, turn.text), False))
        else:
            result.append(Piece(template.assistant + template.gap, False))
            result.append(Piece(turn.text + template.end, True))
            if template.after:
                result.append(Piece(template.after, False))
    return [piece for piece in result if piece.text]


def prompt(template: Template, turns: Sequence[Turn]) -> str:
    """The text to generate from: all turns, the last of them the user's, and the opened answer."""
    return "".join(piece.text for piece in pieces(template, turns)) + template.assistant


def _user_text(template: Template, text: str) -> str:
    if template.name == "plain":
        return IMAGE_TOKEN * text.count(IMAGE_TOKEN)
    return template.user.format(image_first(text))
