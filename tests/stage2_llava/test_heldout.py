"""Held-out questions are judged as greedy generation would judge them; chat answers as the saved template says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dcr_mllm.conversation import TEMPLATES, prompt
from dcr_mllm.errors import UserError
from dcr_mllm.llava import load_llava, load_processor
from stage2_llava.chat import load_chatter, main, side_by_side
from stage2_llava.collate import Collator, InstructionDataset
from stage2_llava.config import Stage2Config
from stage2_llava.heldout import answered_right, evaluate_heldout, format_heldout
from stage2_llava.instructions import load_instructions
from stage2_llava.step import LlavaStep


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten questions about noise; the answer to those with an odd number is another one than what is taught below."""
    folder = tmp_path_factory.mktemp("questions")
    rng = np.random.default_rng(1)
    samples = []
    for k in range(10):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / f"{k}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": ("Yes.", "two")[k % 2]}]
        sample = {"id": str(k), "image": f"{k}.png", "attribute": "xy"[k % 2], "form": "short"}
        samples.append({**sample, "conversations": turns})
    (folder / "heldout.json").write_text(json.dumps(samples))
    return folder


@pytest.fixture(scope="module")
def taught(questions: Path, tiny_llava: Path) -> Any:
    """The tiny LLaVA after it has learned to say `Yes.` to everything."""
    model, processor = load_llava(tiny_llava).float(), load_processor(tiny_llava)
    data = load_instructions(str(questions / "heldout.json"), str(questions))
    dataset = InstructionDataset(
        data, template=TEMPLATES["vicuna_v1"], processor=processor, image_tokens=16, max_length=512
    )
    batch = Collator(processor.tokenizer.pad_token_id, torch.zeros(3, 32, 32))([dataset[k] for k in range(0, 10, 2)])
    step, optimizer = LlavaStep(model), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        step(**batch)["loss"].backward()
        optimizer.step()
    return model.eval()


def test_judgement_is_that_of_greedy_generation(questions: Path, tiny_llava: Path, taught: Any):
    """Against `generate`, question by question: right exactly if answer and end token are generated."""
    processor = load_processor(tiny_llava)
    data = load_instructions(str(questions / "heldout.json"), str(questions))
    template = TEMPLATES["vicuna_v1"]
    found = answered_right(taught, processor, template, data, blind=False)
    assert 0 < found.sum() < 10
    for k in range(len(data)):
        sample = data[k]
        image = data.open_image(sample, sample.images[0])
        text = prompt(template, sample.turns[:1])
        inputs = processor(images=image, text=text, return_tensors="pt")
        whole = processor(images=image, text=f"{text} {sample.turns[1].text}</s>", return_tensors="pt")
        answer = whole.input_ids[0, inputs.input_ids.shape[1] :]
        generated = taught.generate(**inputs, max_new_tokens=len(answer), do_sample=False)
        tokens = generated[0, inputs.input_ids.shape[1] :].tolist()
        assert found[k] == (tokens == answer.tolist()), (k, tokens, answer)


def test_an_answer_that_only_begins_right_is_wrong(questions: Path, tiny_llava: Path, taught: Any):
    samples = json.loads((questions / "heldout.json").read_text())[:2]
    samples[1]["conversations"][1]["value"] = "Yes. No."  # what is taught is `Yes.`
    path = questions / "longer.json"
    path.write_text(json.dumps(samples))
    data = load_instructions(str(path), str(questions))
    found = answered_right(taught, load_processor(tiny_llava), TEMPLATES["vicuna_v1"], data, blind=False)
    assert found.tolist() == [True, False]


def test_blind_means_noise_in_place_of_every_image(
    questions: Path, tiny_llava: Path, taught: Any, monkeypatch: pytest.MonkeyPatch
):
    """Noise of the image's own size, another one for each question and the same again in a second run."""
    import stage2_llava.heldout as heldout

    processor = load_processor(tiny_llava)
    data = load_instructions(str(questions / "heldout.json"), str(questions))
    shown: list[np.ndarray] = []
    prepare = heldout.pixels

    def look(processor: Any, images: list[Image.Image]) -> Any:
        shown.extend(np.asarray(image) for image in images)
        return prepare(processor, images)

    monkeypatch.setattr(heldout, "pixels", look)

    def images_when(blind: bool) -> list[np.ndarray]:
        shown.clear()
        answered_right(taught, processor, TEMPLATES["vicuna_v1"], data, blind=blind)
        return list(shown)

    own = [np.asarray(Image.open(questions / f"{k}.png")) for k in range(10)]
    assert all(np.array_equal(a, b) for a, b in zip(images_when(False), own, strict=True))
    noise = images_when(True)
    assert [image.shape for image in noise] == [(30, 40, 3)] * 10
    for k, image in enumerate(noise):
        assert 120 < image.mean() < 135 and image.std() > 65
        for other in [*own, *noise[:k]]:
            assert abs(np.corrcoef(image.ravel(), other.ravel())[0, 1]) < 0.1
    assert all(np.array_equal(a, b) for a, b in zip(images_when(True), noise, strict=True))


def test_report_counts_and_compares(questions: Path, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import stage2_llava.heldout as heldout

    answers = {"first": np.arange(10) < 4, "second": np.arange(10) < 9}
    calls: list[tuple[str, bool]] = []

    def fake(model: Any, processor: Any, template: Any, questions: Any, *, blind: bool, chosen: list) -> np.ndarray:
        name = list(answers)[len(calls) // 2]
        calls.append((name, blind))
        return np.zeros(len(chosen), dtype=bool) if blind else answers[name][chosen]

    monkeypatch.setattr(heldout, "answered_right", fake)
    llavas = {"first": tiny_llava, "second": tiny_llava}
    result = evaluate_heldout(llavas, str(questions / "heldout.json"), str(questions), tmp_path / "out.json")
    assert calls == [("first", False), ("first", True), ("second", False), ("second", True)]
    second = result["llavas"]["second"]
    assert second["accuracy"] == 90 and second["blind"] == 0
    assert second["against_first"] == {"p_value": 0.0625, "gained": 5, "lost": 0}
    assert second["by"]["attribute"] == {"x": 100, "y": 80}
    assert len(json.loads((tmp_path / "out.json").read_text())["records"]) == 10
    assert "second against first: +50.0 points, 5 gained and 0 lost" in format_heldout(result)


def test_only_so_many_questions_are_asked(questions: Path, tiny_llava: Path, tmp_path: Path):
    """The same ones of every LLaVA, each with its own record and kind."""
    everything = evaluate_heldout({"a": tiny_llava}, str(questions / "heldout.json"), str(questions), tmp_path / "all")
    llavas = {"a": tiny_llava, "b": tiny_llava}
    some = evaluate_heldout(llavas, str(questions / "heldout.json"), str(questions), tmp_path / "some", limit=4)
    assert some["questions"] == 4 and everything["questions"] == 10
    whole = {record["id"]: record["a"] for record in json.loads((tmp_path / "all").read_text())["records"]}
    records = json.loads((tmp_path / "some").read_text())["records"]
    assert len({record["id"] for record in records}) == 4
    assert all(record["a"] == record["b"] == whole[record["id"]] for record in records)
    assert some["llavas"]["a"]["accuracy"] == 25 * sum(record["a"] for record in records)
    with pytest.raises(UserError, match="heldout_limit must be at least 1, found 0"):
        Stage2Config(towers={"a": "mini"}, llm="mini", heldout_limit=0)


def test_chat_is_generation_from_the_saved_template(questions: Path, tiny_llava: Path):
    model, processor = load_llava(tiny_llava), load_processor(tiny_llava)
    image = Image.open(questions / "0.png")
    text = "USER: <image>\nIs it red? ASSISTANT:"
    from dcr_mllm.conversation import VICUNA_SYSTEM

    inputs = processor(images=image, text=f"{VICUNA_SYSTEM} {text}", return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs.input_ids.shape[1] :]
    expected = processor.tokenizer.decode(generated, skip_special_tokens=True).strip()
    chatter = load_chatter(tiny_llava, device="cpu", max_new_tokens=5)
    content = [{"type": "image"}, {"type": "text", "text": "Is it red?"}]
    assert chatter([{"role": "user", "content": content}], image) == expected


def test_chat_command_shows_two_answers_side_by_side(
    questions: Path, tiny_llava: Path, capsys: pytest.CaptureFixture[str]
):
    argv = [str(tiny_llava), str(tiny_llava), "--image", str(questions / "0.png"), "--max-new-tokens", "3"]
    assert main([*argv, "--question", "What is it?", "--question", "Is it red?"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "> What is it?" and lines[1].split(" | ")[0].strip() == tiny_llava.parent.name
    left, right = lines[3].split(" | ") if " | " in lines[3] else (lines[3], lines[3])
    assert left.strip() == right.strip()


def test_chat_refuses_what_is_not_there(tiny_llava: Path, tiny_clip: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tiny_llava), "--image", "no.png"]) == 2
    assert "--image no.png does not exist" in capsys.readouterr().err
    assert main([str(tiny_llava)] * 3 + ["--image", __file__]) == 2
    assert "at most two" in capsys.readouterr().err
    assert main([str(tiny_clip), "--image", __file__]) == 2
    assert "expected llava" in capsys.readouterr().err


def test_columns_wrap():
    text = side_by_side(["a", "b"], ["word " * 10, "short"], 60)
    assert all(len(line) <= 60 for line in text.splitlines())
    assert text.splitlines()[0].split(" | ")[1] == "b"
    assert side_by_side(["a"], ["just this"], 60) == "just this"
