"""What lmms-eval asks of our model, and what it refuses instead of answering wrongly."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dcr_mllm.conversation import TEMPLATES, Turn, prompt
from dcr_mllm.errors import UserError
from dcr_mllm.evaluation import lmms_model
from dcr_mllm.evaluation.lmms_model import (
    DcrLlava,
    cut_half_line,
    image_key,
    rank_path,
    read_answers,
    request_key,
)
from dcr_mllm.evaluation.lmms_tasks import write_task
from dcr_mllm.evaluation.mllm_data import load_task
from dcr_mllm.llava import load_processor
from dcr_mllm.mini.groups import write_pope
from tests.processes import clean_environment, run_to_end

PICTURE = Image.new("RGBA", (20, 10), (200, 10, 10, 255))


@pytest.fixture(scope="module")
def model(tiny_llava: Path) -> DcrLlava:
    model = DcrLlava.__new__(DcrLlava)  # without weights: requests need the processor only
    model.processor = load_processor(tiny_llava)
    model.task_dict = {"task": {"test": [PICTURE]}}
    model.model, model.batch_size, model.answers, model.options = None, 4, None, None
    return model


def ask(model: DcrLlava, parts: list[dict[str, Any]], **settings: Any) -> Any:
    def doc_to_messages(doc: Any) -> list[dict[str, Any]]:
        assert doc is PICTURE
        return [{"role": "user", "content": parts}]

    return model._request("ignored", doc_to_messages, settings, 0, "task", "test")


def instance(text: str, doc_id: int = 0, **settings: Any) -> Any:
    messages = [{"role": "user", "content": [IMAGE, {"type": "text", "text": text}]}]
    return SimpleNamespace(args=("", lambda doc: messages, settings, doc_id, "task", "test"))


IMAGE, TEXT = {"type": "image", "url": PICTURE}, {"type": "text", "text": "Is it red?"}


def test_prompt_is_that_of_training(model: DcrLlava):
    request = ask(model, [IMAGE, TEXT], max_new_tokens=7, temperature=0, do_sample=False, until=["\n\n"])
    assert request.prompt == prompt(TEMPLATES["vicuna_v1"], [Turn("user", "<image>\nIs it red?")])
    assert [image.mode for image in request.open_images()] == ["RGB"] and request.max_new_tokens == 7
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
    monkeypatch.setattr(model, "_answer", lambda questions: [" yes \n\nIs it so? no", "no"], raising=False)
    request = ask(model, [TEXT])
    monkeypatch.setattr(model, "_request", lambda *args: request, raising=False)
    asked = [SimpleNamespace(args=("", None, {"until": until}, 0, "task", "test")) for until in (["\n\n", ""], None)]
    assert model.generate_until(asked) == ["yes", "no"]


def test_a_repeated_question_is_asked_once(model: DcrLlava, monkeypatch: pytest.MonkeyPatch):
    """And no picture is kept: all of a benchmark's requests are in memory at once."""
    asked: list[Any] = []

    def answer(model: Any, processor: Any, requests: list, *, batch_size: int, on_answers: Any) -> None:
        asked.extend(requests)
        on_answers({k: f"answer {k}" for k in range(len(requests))})

    monkeypatch.setattr(lmms_model, "generate_answers", answer)
    assert model.generate_until([instance(text) for text in "aba"]) == ["answer 0", "answer 1", "answer 0"]
    assert len(asked) == 2 and all(callable(request.images) for request in asked)
    assert asked[0].open_images()[0].tobytes() == PICTURE.convert("RGB").tobytes()


def test_the_likeliest_option_is_the_answer(model: DcrLlava, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Where there are options; equal ones are settled by their order, and both kinds of answers are kept apart."""
    scored: list[tuple[str, ...]] = []
    scores = {("A", "B"): [-2.0, -1.5], ("yes\n\n", "no", "maybe"): [-1.0, -1.0, -3.0]}

    def score(model: Any, processor: Any, requests: list, options: list, *, batch_size: int, on_scores: Any) -> None:
        scored.extend(options)
        on_scores({k: scores[given] for k, given in enumerate(options)})

    def answer(model: Any, processor: Any, requests: list, *, batch_size: int, on_answers: Any) -> None:
        on_answers({k: "generated" for k in range(len(requests))})

    monkeypatch.setattr(lmms_model, "option_log_probabilities", score)
    monkeypatch.setattr(lmms_model, "generate_answers", answer)
    monkeypatch.setattr(model, "task_dict", {"task": {"test": [PICTURE] * 4}})
    monkeypatch.setattr(model, "answers", tmp_path / "answers.jsonl")
    given: dict[int, list[str]] = {1: ["A", "B"], 2: ["yes\n\n", "no", "maybe"]}
    monkeypatch.setattr(model, "options", lambda task, doc_id: given.get(doc_id) if task == "task" else ["wrong"])
    asked = [instance("Is it?", doc_id, until=["\n\n"]) for doc_id in (0, 1, 2, 3)]
    expected = ["generated", "B", "yes\n\n", "generated"]
    assert model.generate_until(asked) == expected and scored == [("A", "B"), ("yes\n\n", "no", "maybe")]
    assert model.generate_until(asked) == expected and len(scored) == 2
    assert sorted(read_answers(tmp_path / "answers.jsonl").values()) == ["B", "generated", "yes\n\n"]


def test_requests_are_told_apart_by_all_that_answers_depend_on(model: DcrLlava):
    request = ask(model, [IMAGE, TEXT], max_new_tokens=7)
    other_image = image_key([Image.new("RGB", (20, 10))])
    changes: list[dict[str, Any]] = [{"prompt": "x"}, {"image_key": other_image}, {"max_new_tokens": 8}]
    keys = {request_key(dataclasses.replace(request, **change)) for change in [{}, *changes]}
    keys |= {request_key(request, options) for options in (["A", "B"], ["B", "A"], ["A B"])}
    assert len(keys) == 7
    # The same bytes in another shape are another image.
    assert image_key([Image.new("RGB", (20, 10))]) != image_key([Image.new("RGB", (10, 20))])


def test_a_half_written_line_is_cut_off(tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    assert read_answers(path) == {} and read_answers(tmp_path / "nowhere" / "answers.jsonl") == {}
    cut_half_line(path)
    assert not path.exists()
    whole = json.dumps({"key": "a", "answer": "größer"}) + "\n"
    path.write_text(whole + '{"key": "b", "ans', encoding="utf-8")
    assert read_answers(path) == {"a": "größer"}
    assert path.read_text(encoding="utf-8") != whole  # reading does not touch what another process may be writing
    cut_half_line(path)
    assert path.read_text(encoding="utf-8") == whole


def test_a_process_reads_all_answers_and_writes_its_own_file(
    model: DcrLlava, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """So that a run goes on with another number of processes, and no two write to one file."""
    path = tmp_path / "a[1].b.jsonl"
    texts = ["first", "second", "third", "fourth"]
    keys = [request_key(ask(model, [IMAGE, {"type": "text", "text": text}])) for text in texts]
    for number, key in zip((0, 1, 11), keys, strict=False):
        rank_path(path, number).write_text(json.dumps({"key": key, "answer": str(number)}) + "\n")
    assert rank_path(path, 11).name == "a[1].b.rank11.jsonl" and rank_path(path, 0) == path
    (tmp_path / "a[1].b.rank.jsonl").write_text("another model's")
    (tmp_path / "a[1].bc.jsonl").write_text("another model's")
    before = {file.name: file.read_text() for file in tmp_path.iterdir()}
    half = rank_path(path, 11).open("a")
    half.write('{"key')
    half.close()

    asked: list[Any] = []

    def answer(model: Any, processor: Any, requests: list, *, batch_size: int, on_answers: Any) -> None:
        asked.extend(requests)
        on_answers({k: "new" for k in range(len(requests))})

    monkeypatch.setattr(lmms_model, "generate_answers", answer)
    monkeypatch.setattr(model, "answers", path)
    monkeypatch.setenv("RANK", "3")
    assert model.generate_until([instance(text) for text in texts]) == ["0", "1", "11", "new"]
    assert len(asked) == 1
    after = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert json.loads(after.pop("a[1].b.rank3.jsonl")) == {"key": keys[3], "answer": "new"}
    assert after.pop("a[1].b.rank11.jsonl") == before.pop("a[1].b.rank11.jsonl") + '{"key'
    assert after == before


@pytest.fixture(scope="module")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of an odd number of questions, and of fewer questions than processes."""
    folder = tmp_path_factory.mktemp("tasks")
    write_pope(folder / "pope", num_images=2)
    (folder / "tasks").mkdir(exist_ok=True)
    for name, count in (("seven", 7), ("one", 1)):
        data = dataclasses.replace(load_task("pope", str(folder), folder, count), name=name)
        write_task(data, folder / "tasks", folder / "tasks")
    return folder / "tasks"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_answer_as_one(tiny_llava: Path, definitions: Path, tmp_path: Path):
    """Over gloo, through lmms-eval; and one process that goes on where two have been asks nothing again."""
    script, tasks = "tests.dcr_mllm.evaluation.ask_tasks", ("dcr_seven", "dcr_one")

    def ask_tasks(answers: Path, *launcher: str) -> dict[str, list[dict[str, Any]]]:
        command = [sys.executable, *launcher, "-m", script, str(answers), str(tiny_llava), str(definitions), *tasks]
        run_to_end(command, clean_environment(), timeout=180)
        return json.loads(answers.with_suffix(".samples").read_text())

    two, one = tmp_path / "two.jsonl", tmp_path / "one.jsonl"
    found = ask_tasks(two, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert [len(found[task]) for task in tasks] == [7, 1]
    assert found == ask_tasks(one)
    assert read_answers(two) == read_answers(one)
    # The first process has documents 0, 2, 4, 6; the second 1, 3, 5, and of the other task document 0 again, with which
    # lmms-eval keeps a process busy that has none: whichever of them is late may find it answered.
    kept = [rank_path(two, rank).read_text() for rank in (0, 1)]
    assert all(len(text.splitlines()) in (3, 4) for text in kept)
    assert ask_tasks(two) == found
    assert [rank_path(two, rank).read_text() for rank in (0, 1)] == kept
