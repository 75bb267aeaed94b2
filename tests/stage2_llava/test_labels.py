"""What is learned decodes to exactly the answers and their end tokens; mismatches raise and name the sample."""

from __future__ import annotations

from typing import Any

import pytest

from dcr_mllm.conversation import TEMPLATES, Turn
from dcr_mllm.errors import UserError
from stage2_llava.assemble import add_tokens
from stage2_llava.labels import IGNORED, encode, special_prefix
from tests.tiny_llms import qwen_tokenizer, vicuna_tokenizer

ANSWERS = ["A café, 漢字 🙂 {x}.", "two", "  leading space", "line one\nline two", "</p> ends oddly ", "Yes"]
IMAGE_TOKENS = 16


@pytest.fixture(scope="module", params=["vicuna_v1", "chatml"])
def pair(request: pytest.FixtureRequest) -> tuple[str, Any]:
    tokenizer = vicuna_tokenizer() if request.param == "vicuna_v1" else qwen_tokenizer()
    add_tokens(tokenizer)
    return request.param, tokenizer


def runs(labels: list[int]) -> list[list[int]]:
    """Stretches of learned tokens."""
    found: list[list[int]] = []
    for previous, label in zip([IGNORED, *labels], labels, strict=False):
        if label != IGNORED:
            if previous == IGNORED:
                found.append([])
            found[-1].append(label)
    return found


def conversation(answers: list[str], image: bool) -> list[Turn]:
    turns = []
    for index, answer in enumerate(answers):
        mark = "\n<image>" if image and index == 0 else ""
        turns += [Turn("user", f"What is in the image?{mark}"), Turn("assistant", answer)]
    return turns


@pytest.mark.parametrize("image", [True, False])
def test_masks_decode_to_the_answers(pair: tuple[str, Any], image: bool):
    name, tokenizer = pair
    template = TEMPLATES[name]
    encoded = encode(conversation(ANSWERS, image), template, tokenizer, image_tokens=IMAGE_TOKENS)
    learned = [tokenizer.decode(stretch, clean_up_tokenization_spaces=False) for stretch in runs(encoded.labels)]
    assert [text.strip() for text in learned] == [(answer + template.end).strip() for answer in ANSWERS]
    end = tokenizer.convert_tokens_to_ids(template.end)
    assert all(stretch[-1] == end and stretch.count(end) == 1 for stretch in runs(encoded.labels))
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    assert encoded.input_ids.count(image_id) == IMAGE_TOKENS * image
    assert image_id not in encoded.labels


def test_plain_learns_caption_and_newline_without_end(pair: tuple[str, Any]):
    _, tokenizer = pair
    encoded = encode(conversation(["Two of them."], True), TEMPLATES["plain"], tokenizer, image_tokens=IMAGE_TOKENS)
    (stretch,) = runs(encoded.labels)
    assert tokenizer.decode(stretch).lstrip() == "Two of them.\n"
    assert tokenizer.eos_token_id not in encoded.input_ids
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    assert encoded.input_ids[: len(special_prefix(tokenizer)) + IMAGE_TOKENS].count(image_id) == IMAGE_TOKENS


def test_ids_are_those_of_the_whole_text(pair: tuple[str, Any]):
    """Training tokenizes as inference does: the text at once, so no token boundary is forced anywhere."""
    name, tokenizer = pair
    encoded = encode(conversation(ANSWERS, True), TEMPLATES[name], tokenizer, image_tokens=1)
    from dcr_mllm.conversation import pieces

    text = "".join(piece.text for piece in pieces(TEMPLATES[name], conversation(ANSWERS, True)))
    assert encoded.input_ids == tokenizer(text).input_ids


def test_truncation_is_counted_and_never_cuts_an_image(pair: tuple[str, Any]):
    name, tokenizer = pair
    turns = conversation(["two"] * 30, True)
    whole = encode(turns, TEMPLATES[name], tokenizer, image_tokens=IMAGE_TOKENS)
    cut = encode(turns, TEMPLATES[name], tokenizer, image_tokens=IMAGE_TOKENS, max_length=200)
    assert cut.input_ids == whole.input_ids[:200] and cut.labels == whole.labels[:200]
    assert cut.num_truncated == len(whole.input_ids) - 200
    with pytest.raises(UserError, match=r"data.json\[3\] needs \d+ tokens .* max_length is 150"):
        encode(turns, TEMPLATES[name], tokenizer, image_tokens=300, max_length=150, where="data.json[3]")


class MergingTokenizer:
    """Glues the end of a prompt to the answer, as a template without a separator can make a tokenizer do."""

    bos_token_id = eos_token_id = None

    def __call__(self, text: str, **options: Any) -> Any:
        from transformers import BatchEncoding

        if not text:
            return BatchEncoding({"input_ids": []})
        cut = text.index("ASSISTANT:") + 3
        offsets = [(0, cut), (cut, len(text))]
        return BatchEncoding({"input_ids": [1, 2], "offset_mapping": offsets})

    def convert_tokens_to_ids(self, token: str) -> int:
        return 99


def test_a_token_across_the_border_raises_and_names_the_sample():
    with pytest.raises(UserError, match=r"a.jsonl:7: the tokens of answer 'two</s>' cover"):
        encode(
            [Turn("user", "Q"), Turn("assistant", "two")],
            TEMPLATES["vicuna_v1"],
            MergingTokenizer(),
            image_tokens=1,
            where="a.jsonl:7",
        )


def test_tokenizer_that_ends_every_text_is_refused():
    from tokenizers import processors

    tokenizer = vicuna_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    with pytest.raises(UserError, match="add_eos_token"):
        special_prefix(tokenizer)
