"""`eval/run.py` as a user types it, on tiny LLaVAs and MMVP in its public layout; and lmms-eval's own command."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcr_mllm.conversation import TEMPLATES, Turn, prompt
from dcr_mllm.errors import UserError
from dcr_mllm.evaluation import generation
from dcr_mllm.evaluation.mllm_tasks import mmvp_item, mmvp_rows, pope_rows
from dcr_mllm.evaluation.run import main
from dcr_mllm.llava import load_llava, load_processor
from dcr_mllm.mini.groups import write_pope

ROOT = Path(__file__).parents[3]


def write_mmvp(directory: Path, num_pairs: int = 5, index_name: str = "lndex") -> Path:
    """MMVP's public layout, with the header as it is misspelt there."""
    rng = np.random.default_rng(0)
    images = directory / "mmvp" / "MMVP Images"
    images.mkdir(parents=True)
    with (directory / "mmvp" / "Questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([index_name, "Question", "Options", "Correct Answer"])
        for index in range(1, 2 * num_pairs + 1):
            writer.writerow([index, "Is it red?", "(a) left (b) it is right", "(a)" if index % 2 else "(b)"])
            Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(images / f"{index}.jpg")
    return directory


@pytest.fixture(scope="module")
def two_llavas(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> list[Path]:
    folder = tmp_path_factory.mktemp("llavas")
    for name in ("base", "new"):
        shutil.copytree(tiny_llava, folder / name / "llava")
    return [folder / name / "llava" for name in ("base", "new")]


def test_models_are_compared_on_raw_answers(tmp_path: Path, two_llavas: list[Path], capsys: pytest.CaptureFixture[str]):
    data = write_mmvp(tmp_path)
    out = tmp_path / "out"
    arguments = ["--tasks", "mmvp", "--models", *map(str, two_llavas), "--data", str(data), "--out", str(out)]
    assert main([*arguments, "--limit", "7"]) == 0
    printed = capsys.readouterr().out
    assert "mmvp: 6 of 10 questions, whole pairs" in printed
    assert "new against base, mmvp: no difference detected" in printed
    results = json.loads((out / "results.json").read_text())
    assert results["scores"]["base"]["mmvp"]["questions"] == 6
    assert results["comparisons"]["new"]["mmvp"]["test"] == "exact McNemar on 3 pairs"
    answers = [json.loads(line) for line in (out / "answers" / "base" / "mmvp.jsonl").read_text().splitlines()]
    assert [item["answer"] for item in answers] == generated(two_llavas[0], data, 6)
    assert [item["index"] for item in answers] == [1, 2, 3, 4, 5, 6]

    # The same command prints the results again; another one is refused.
    assert main([*arguments, "--limit", "7"]) == 0
    again = capsys.readouterr().out
    assert "is finished" in again and again.splitlines()[-12:] == printed.splitlines()[-12:]
    assert main(arguments) == 2
    assert f"choose another name, e.g. --out {tmp_path}/out-2" in capsys.readouterr().err


def test_cut_images_stay_an_error(tmp_path: Path, two_llavas: list[Path]):
    """lmms-eval makes Pillow take half an image for a whole one; the rest of the process must not notice."""
    data = write_mmvp(tmp_path, num_pairs=1)
    code = f"""
from PIL import Image, ImageFile
from dcr_mllm.evaluation.run import main
arguments = ["--tasks", "mmvp", "--models", {str(two_llavas[0])!r}, "--data", {str(data)!r}, "--out"]
assert main([*arguments, {str(tmp_path / "out")!r}]) == 0
assert not ImageFile.LOAD_TRUNCATED_IMAGES
path = {str(data / "mmvp" / "MMVP Images" / "1.jpg")!r}
content = open(path, "rb").read()
open(path, "wb").write(content[: len(content) // 2])
try:
    main([*arguments, {str(tmp_path / "cut")!r}])
except OSError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert "refused: image file is truncated" in done.stdout, done.stderr[-2000:]


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, two_llavas: list[Path], monkeypatch: pytest.MonkeyPatch):
    """Killed in the second batch, with half a line written: no question is asked twice, the results are the same."""
    data = write_mmvp(tmp_path)
    arguments = ["--tasks", "mmvp", "--models", str(two_llavas[0]), "--data", str(data), "--batch-size", "3"]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    answer_batch, asked = generation._answer_batch, []

    def killed(model: Any, processor: Any, requests: list, split: list) -> list[str]:
        asked.append(len(requests))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer_batch(model, processor, requests, split)

    monkeypatch.setattr(generation, "_answer_batch", killed)
    out = tmp_path / "killed"
    assert main([*arguments, "--out", str(out)]) == 130
    with (out / "raw" / "base.jsonl").open("a") as file:
        file.write('{"key": "half')
    assert main([*arguments, "--out", str(out)]) == 0
    assert asked == [3, 3, 3, 3, 1]
    for name in ("results.json", "answers/base/mmvp.jsonl"):
        whole, resumed = ((tmp_path / run / name).read_text() for run in ("whole", "killed"))
        assert whole.replace("whole", "killed") == resumed


def generated(path: Path, data: Path, count: int) -> list[str]:
    """Answers to the same questions by `generate`, one by one, from prompts written out."""
    model, processor = load_llava(path).float(), load_processor(path)
    text = (
        "<image>\nIs it red?\nA. left\nB. it is right\nAnswer with the option's letter from the given choices directly."
    )
    answers = []
    for index in range(1, count + 1):
        image = Image.open(data / "mmvp" / "MMVP Images" / f"{index}.jpg")
        inputs = processor(images=image, text=prompt(TEMPLATES["vicuna_v1"], [Turn("user", text)]), return_tensors="pt")
        settings: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "temperature": None, "top_p": None}
        ids = model.generate(**inputs, **settings)[0, inputs.input_ids.shape[1] :]
        answers.append(processor.tokenizer.decode(ids, skip_special_tokens=True).split("\n\n")[0].strip())
    return answers


def test_lmms_eval_finds_the_model_by_name(tmp_path: Path, two_llavas: list[Path]):
    """Its own command line, with a task that `eval/run.py` has written."""
    data = write_mmvp(tmp_path, num_pairs=1)
    out = tmp_path / "out"
    arguments = ["--tasks", "mmvp", "--models", str(two_llavas[0]), "--data", str(data), "--out", str(out)]
    assert main(arguments) == 0
    command = [sys.executable, "-m", "lmms_eval", "--model", "dcr_llava", "--model_args"]
    command += [f"pretrained={two_llavas[0]}", "--tasks", "dcr_mmvp", "--include_path", str(out / "tasks")]
    command += ["--batch_size", "2", "--log_samples", "--output_path", str(tmp_path / "lmms")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = (tmp_path / "lmms").rglob("*_samples_dcr_mmvp.jsonl")
    theirs = [json.loads(line) for line in samples.read_text().splitlines()]
    ours = [json.loads(line) for line in (out / "answers" / "base" / "mmvp.jsonl").read_text().splitlines()]
    assert [sample["filtered_resps"] for sample in theirs] == [item["answer"] for item in ours]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "mmpv"], "task 'mmpv' is unknown, did you mean 'mmvp'"),
        (["--tasks", "mmvp", "--models", "NOWHERE"], "NOWHERE"),
        (["--tasks", "mmvp", "--models", "TOWER", "--data", "mini"], "has model_type 'clip', expected llava"),
        (["--tasks", "mmvp", "--models", "LLAVA"], "say where the benchmarks are: --data DIR"),
        (["--tasks", "mmvp", "--models", "LLAVA", "--data", "."], "has no folder mmvp/"),
        (["--tasks", "mmvp", "--models", "LLAVA", "--limit", "0"], "at least 1"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    arguments: list[str], message: str, tiny_clip: Path, tiny_llava: Path, capsys: pytest.CaptureFixture[str]
):
    known = {"TOWER": str(tiny_clip), "LLAVA": str(tiny_llava)}
    assert main([known.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['eval/run.py', '--help']\n"
        "try:\n    exec(open('eval/run.py').read())\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'lmms_eval', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]" and "--tasks" in done.stdout


def test_mmvp_layout(tmp_path: Path):
    rows = mmvp_rows(write_mmvp(tmp_path / "a", index_name="Index") / "mmvp")
    assert mmvp_rows(write_mmvp(tmp_path / "b") / "mmvp") == rows
    assert mmvp_item(rows[1], "B") == {"index": 2, "options": ["left", "it is right"], "target": "(b)", "answer": "B"}
    for index in (3, 5, 6, 9):
        (tmp_path / "a" / "mmvp" / "MMVP Images" / f"{index}.jpg").unlink()
    with pytest.raises(UserError, match=r"4 images are missing, the first: \S.*3\.jpg, .*5\.jpg, .*6\.jpg$"):
        mmvp_rows(tmp_path / "a" / "mmvp")
    table = tmp_path / "b" / "mmvp" / "Questions.csv"
    table.write_text(table.read_text().replace("Options", "Choices"))
    with pytest.raises(UserError, match="Questions.csv line 2 has no column Options"):
        mmvp_rows(tmp_path / "b" / "mmvp")
    table.unlink()
    with pytest.raises(UserError, match="Questions.csv is missing"):
        mmvp_rows(tmp_path / "b" / "mmvp")


def test_pope_layout(tmp_path: Path):
    folder = tmp_path / "pope"
    write_pope(folder, num_images=2)
    rows = pope_rows(folder)
    assert len(rows) == 36 and [row["id"] for row in rows] == [str(k) for k in range(36)]
    assert [row["category"] for row in rows[::12]] == ["random", "popular", "adversarial"]
    assert {row["image_source"] for row in rows} == {"mini_000000", "mini_000001"}
    first = json.loads((folder / "coco_pope_random.json").read_text().splitlines()[0])
    assert (rows[0]["question"], rows[0]["answer"]) == (first["text"], first["label"])
    (folder / "val2014" / "mini_000001.png").unlink()
    with pytest.raises(UserError, match=r"1 images are missing, the first: \S*mini_000001.png"):
        pope_rows(folder)
    (folder / "coco_pope_popular.json").write_text('{"image": "a.png", "text": "Is it?", "label": "yes"}\n{"image"')
    with pytest.raises(UserError, match="coco_pope_popular.json line 2 is no question"):
        pope_rows(folder)
    (folder / "coco_pope_adversarial.json").unlink()
    (folder / "coco_pope_popular.json").write_text("")
    with pytest.raises(UserError, match="coco_pope_adversarial.json is missing"):
        pope_rows(folder)
