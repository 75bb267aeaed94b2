"""What lmms-eval asks of our model, and what it refuses instead of answering wrongly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dcr_mllm.conversation import TEMPLATES, Turn, prompt
from dcr_mllm.errors import UserError
from dcr_mllm.evaluation import lmms_model
from dcr_mllm.evaluation.lmms_model import DcrLlava, image_key, read_answers, request_key
from dcr_mllm.llava import load_processor

PICTURE = Image.new("RGBA", (20, 10), (200, 10, 10, 255))


@pytest.fixture(scope="module")
def model(tiny_llava: Path) -> DcrLlava:
    model = DcrLlava.__new__(DcrLlava)  # without weights: requests need the processor only
    model.processor = load_processor(tiny_llava)
    model.task_dict = {"task": {"test": [PICTURE]}}
    return model


def ask(model: DcrLlava, parts: list[dict[str, Any]], **settings: Any) -> Any:
    def doc_to_messages(doc: Any) -> list[dict[str, Any]]:
        assert doc is PICTURE
        return [{"role": "user", "content": parts}]

    return model._request("ignored", doc_to_messages, settings, 0, "task", "test")


IMAGE, TEXT = {"type": "image", "url": PICTURE}, {"type": "text", "text": "Is it red?"}


def test_prompt_is_that_of_training(model: DcrLlava):
    request = ask(model, [IMAGE, TEXT], max_new_tokens=7, temperature=0, do_sample=False, until=["\n\n"])
    assert request.prompt == prompt(TEMPLATES["vicuna_v1"], [Turn("user", "<image>\nIs it red?")])
    assert [image.mode for image in request.images] == ["RGB"] and request.max_new_tokens == 7
    assert ask(model, [TEXT]).prompt == prompt(TEMPLATES["vicuna_v1"], [Turn("user", "Is it red?")])


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"temperature": 0.2}, {"num_beams": 4}])
def test_what_is_not_greedy_is_refused(model: DcrLlava, settings: dict[str, Any]):
    with pytest.raises(UserError, match="task task asks for sampling or beams"):
        ask(model, [TEXT], **settings)


def test_videos_are_refused(model: DcrLlava):
    with pytest.raises(UserError, match="task task shows a video, and a LLaVA sees images only"):
        ask(model, [{"type": "video", "url": "a.mp4"}, TEXT])
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(UserError, match="not supported"):
            method([])


def test_answers_are_cut_at_stop_strings(model: DcrLlava, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model, "_answer", lambda requests: [" yes \n\nIs it so? no", "no"], raising=False)
    request = ask(model, [TEXT])
    monkeypatch.setattr(model, "_request", lambda *args: request, raising=False)
    asked = [SimpleNamespace(args=("", None, {"until": until}, 0, "task", "test")) for until in (["\n\n", ""], None)]
    assert model.generate_until(asked) == ["yes", "no"]


def test_a_repeated_question_is_asked_once(model: DcrLlava, monkeypatch: pytest.MonkeyPatch):
    """And equal images are one object: all of a benchmark's requests are in memory at once."""
    asked: list[Any] = []

    def answer(model: Any, processor: Any, requests: list, *, batch_size: int, on_answers: Any) -> None:
        asked.extend(requests)
        on_answers({k: f"answer {k}" for k in range(len(requests))})

    monkeypatch.setattr(lmms_model, "generate_answers", answer)
    monkeypatch.setattr(model, "model", None, raising=False)
    monkeypatch.setattr(model, "batch_size", 4, raising=False)
    monkeypatch.setattr(model, "answers", None, raising=False)

    def instance(text: str) -> Any:
        messages = [{"role": "user", "content": [IMAGE, {"type": "text", "text": text}]}]
        return SimpleNamespace(args=("", lambda doc: messages, {}, 0, "task", "test"))

    assert model.generate_until([instance(text) for text in "aba"]) == ["answer 0", "answer 1", "answer 0"]
    assert len(asked) == 2 and asked[0].images[0] is asked[1].images[0]


def test_requests_are_told_apart_by_all_that_answers_depend_on(model: DcrLlava):
    request = ask(model, [IMAGE, TEXT], max_new_tokens=7)
    other_image = image_key([Image.new("RGB", (20, 10))])
    changes: list[dict[str, Any]] = [{"prompt": "x"}, {"image_key": other_image}, {"max_new_tokens": 8}]
    keys = {request_key(dataclasses.replace(request, **change)) for change in [{}, *changes]}
    assert len(keys) == 4
    # The same bytes in another shape are another image.
    assert image_key([Image.new("RGB", (20, 10))]) != image_key([Image.new("RGB", (10, 20))])


def test_a_half_written_line_is_cut_off(tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    assert read_answers(path) == {}
    whole = json.dumps({"key": "a", "answer": "größer"}) + "\n"
    path.write_text(whole + '{"key": "b", "ans', encoding="utf-8")
    assert read_answers(path) == {"a": "größer"}
    assert path.read_text(encoding="utf-8") == whole
