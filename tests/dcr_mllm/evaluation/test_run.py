"""`eval/run.py` as a user types it, on tiny LLaVAs and MMVP in its public layout; and lmms-eval's own command."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dcr_mllm.conversation import TEMPLATES, Turn, prompt
from dcr_mllm.evaluation import generation, lmms_tasks, run
from dcr_mllm.evaluation.lmms_model import image_key
from dcr_mllm.evaluation.mllm_data import load_task
from dcr_mllm.evaluation.mllm_tasks import TASKS
from dcr_mllm.evaluation.run import main
from dcr_mllm.llava import load_llava, load_processor
from dcr_mllm.mini.data import write_mmvp_vlm
from dcr_mllm.mini.groups import write_pope
from tests.benchmarks import ROWS, prompt_of, write_copy_of

ROOT = Path(__file__).parents[3]
MMVP_QUESTION = "Is it red?\nA. left\nB. it is right\nAnswer with the option's letter from the given choices directly."


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
    assert "is finished" in again and again.splitlines()[1:] == printed.splitlines()[2:]
    assert main(arguments) == 2
    assert f"choose another name, e.g. --out {tmp_path}/out-2" in capsys.readouterr().err


def test_dry_run_checks_everything_and_asks_nothing(
    tmp_path: Path, two_llavas: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dcr_mllm.evaluation.results.evaluate", None)
    write_mmvp(tmp_path / "data")
    arguments = ["--models", *map(str, two_llavas), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main(["--tasks", "mmvp", "--limit", "7", *arguments, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "models: base, new" in printed and "mmvp: 6 questions" in printed.splitlines()
    assert f"results would go to {tmp_path / 'out'} (new)" in printed
    assert not (tmp_path / "out").exists()
    assert main(["--tasks", "mmvp,pope", *arguments, "--dry-run"]) == 2
    assert "pope" in capsys.readouterr().err


def test_cut_images_count_as_wrong(tmp_path: Path, two_llavas: list[Path]):
    """lmms-eval makes Pillow take half an image for a whole one; what we read before and after it must not notice."""
    data = write_mmvp(tmp_path, num_pairs=2)
    code = f"""
from PIL import ImageFile
from dcr_mllm.evaluation.run import main
arguments = ["--tasks", "mmvp", "--models", {str(two_llavas[0])!r}, "--data", {str(data)!r}, "--out"]
assert main([*arguments, {str(tmp_path / "out")!r}]) == 0
assert not ImageFile.LOAD_TRUNCATED_IMAGES
path = {str(data / "mmvp" / "MMVP Images" / "1.jpg")!r}
content = open(path, "rb").read()
open(path, "wb").write(content[: len(content) // 2])
assert main([*arguments, {str(tmp_path / "cut")!r}]) == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mmvp: 1 images cannot be decoded and count as wrong, the first: row 0 (image file is trunc" in done.stdout
    whole, cut = (
        [json.loads(line) for line in (tmp_path / name / "answers" / "base" / "mmvp.jsonl").read_text().splitlines()]
        for name in ("out", "cut")
    )
    assert [item["answer"] for item in cut] == ["", *(item["answer"] for item in whole[1:])]
    assert [item.get("undecodable", False) for item in cut] == [True, False, False, False]
    results = json.loads((tmp_path / "cut" / "results.json").read_text())
    assert list(results["undecodable"]["mmvp"]) == ["row 0"] and results["scores"]["base"]["mmvp"]["questions"] == 4


def test_every_benchmark_asks_what_its_authors_ask(tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch):
    """Copies of all hub repositories through lmms-eval: prompts as written out, images and answers at their rows."""
    asked: dict[str, generation.Request] = {}

    def answer(model: Any, processor: Any, requests: list, *, batch_size: int, on_answers: Any) -> list[str]:
        asked.update({request.prompt + request.image_key: request for request in requests})
        said = [f"It is {request.prompt[-60:]}" for request in requests]
        on_answers(dict(enumerate(said)))
        return said

    monkeypatch.setattr("dcr_mllm.evaluation.lmms_model.generate_answers", answer)
    for task in TASKS:
        write_copy_of(task, tmp_path / "data")
    arguments = ["--tasks", ",".join(TASKS), "--models", str(tiny_llava), "--data", str(tmp_path / "data")]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    limits = {"mmvp": 16, "pope": 128, "cv_bench": 1024, "hallusion_bench_image": 128}
    for task, spec in TASKS.items():
        (path,) = (tmp_path / "out" / "answers").glob(f"*/{task}.jsonl")
        answers = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
        for row, given in zip(ROWS[task](), answers, strict=True):
            text = prompt(TEMPLATES["vicuna_v1"], [Turn("user", f"<image>\n{prompt_of(task, row)}")])
            image = Image.open(io.BytesIO(row[spec.image]["bytes"])).convert("RGB")
            request = asked[text + image_key([image])]
            assert request.max_new_tokens == limits.get(task, 16)
            assert given == f"It is {text[-60:]}".split("\n\n")[0].strip()
        own = results["scores"][path.parent.name][task]["lmms_eval"]
        assert (own is None) == (task in ("naturalbench", "hallusion_bench_image"))


def test_options_are_chosen_by_likelihood(tmp_path: Path, two_llavas: list[Path]):
    """The chosen letter is the one that a whole pass finds likeliest after the prompt."""
    data = write_mmvp(tmp_path)
    arguments = ["--tasks", "mmvp", "--models", str(two_llavas[0]), "--data", str(data), "--limit", "6"]
    assert main([*arguments, "--scoring", "likelihood", "--out", str(tmp_path / "out")]) == 0
    said = [
        json.loads(line)["answer"]
        for line in (tmp_path / "out" / "answers" / "base" / "mmvp.jsonl").read_text().splitlines()
    ]
    model, processor = load_llava(two_llavas[0]).float(), load_processor(two_llavas[0])
    text = prompt(TEMPLATES["vicuna_v1"], [Turn("user", f"<image>\n{MMVP_QUESTION}")])
    for index, letter in enumerate(said, start=1):
        image = Image.open(data / "mmvp" / "MMVP Images" / f"{index}.jpg")
        scores = []
        for option in ("A", "B"):
            inputs = processor(images=image, text=f"{text} {option}", return_tensors="pt")
            tail = len(processor.tokenizer(f"{text} {option}").input_ids) - len(processor.tokenizer(text).input_ids)
            with torch.no_grad():
                logits = model(**inputs).logits[0, -tail - 1 : -1].log_softmax(dim=-1)
            scores.append(float(logits.gather(1, inputs.input_ids[0, -tail:, None]).sum()))
        assert letter == "AB"[scores.index(max(scores))]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["decoding"] == "the likeliest option" and results["scores"]["base"]["mmvp"]["unparsable"] == 0


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(tmp_path: Path, two_llavas: list[Path]):
    data = write_mmvp(tmp_path)
    arguments = ["--tasks", "mmvp", "--models", *map(str, two_llavas), "--data", str(data), "--batch-size", "3"]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "eval/run.py"]
    done = subprocess.run(
        [*command, *arguments, "--out", str(tmp_path / "two")], capture_output=True, text=True, timeout=280, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "two" / "raw" / "base.rank1.jsonl").is_file()
    for name in ("results.json", "answers/base/mmvp.jsonl", "answers/new/mmvp.jsonl"):
        one, two = ((tmp_path / run / name).read_text() for run in ("one", "two"))
        assert one.replace("/one", "/two").replace('"one"', '"two"') == two
    assert done.stdout.count("new against base, mmvp") == 1


def test_towers_and_the_towers_inside_llavas(
    tmp_path: Path, tiny_clip: Path, tiny_llava: Path, capsys: pytest.CaptureFixture[str]
):
    """Tower benchmarks in the same command, in the same comparisons and report."""
    tower = tmp_path / "runs" / "a" / "tower"
    shutil.copytree(tiny_clip, tower)
    llava = tmp_path / "runs" / "b" / "llava"
    shutil.copytree(tiny_llava, llava)
    record = {"config": {"towers": {"b": str(tower)}, "llm": "x"}}
    (llava / "provenance.json").write_text(json.dumps(record))
    data = write_mmvp(tmp_path)
    write_mmvp_vlm(data / "mmvp_vlm", "test", 2)
    arguments = ["--data", str(data), "--tasks"]
    assert main([*arguments, "mmvp_vlm", "--models", str(tower), str(llava), "--out", str(tmp_path / "towers")]) == 0
    printed = capsys.readouterr().out
    assert "b against a, mmvp_vlm: no difference detected" in printed and "exact McNemar on 18 pairs" in printed
    out = tmp_path / "both"
    assert main([*arguments, "mmvp,mmvp_vlm", "--models", str(llava), "--limit", "4", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert set(results["scores"]["b"]) == {"mmvp", "mmvp_vlm"}
    assert results["scores"]["b"]["mmvp_vlm"]["questions"] == 2  # pairs
    assert "mmvp_vlm" in (out / "report.md").read_text()
    assert main([*arguments, "mmvp,mmvp_vlm", "--models", str(tower), "--out", str(tmp_path / "no")]) == 2
    assert "has model_type 'clip', expected llava" in capsys.readouterr().err
    (llava / "provenance.json").unlink()
    assert main([*arguments, "mmvp_vlm", "--models", str(llava), "--out", str(tmp_path / "no")]) == 2
    assert "name the whole tower directory" in capsys.readouterr().err


def test_training_runs_are_grouped(tmp_path: Path, two_llavas: list[Path], capsys: pytest.CaptureFixture[str]):
    data, (base, new) = write_mmvp(tmp_path), two_llavas
    arguments = ["--tasks", "mmvp", "--data", str(data), "--out", str(tmp_path / "out"), "--models"]
    assert main([*arguments, f"old={base},{new}", f"new={new},{base}"]) == 0
    printed = capsys.readouterr().out
    assert "new against old, mmvp: no difference detected" in printed
    assert "training variance measured over 2 and 2 runs" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["scores"]) == ["old-1", "old-2", "new-1", "new-2"]
    assert results["comparisons"]["new"]["mmvp"]["test"].startswith("t test over training runs")


def test_unequal_conditions_are_refused_before_anything_is_asked(
    tmp_path: Path, two_llavas: list[Path], capsys: pytest.CaptureFixture[str]
):
    other = tmp_path / "other"
    shutil.copytree(two_llavas[1], other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("ASSISTANT:", "BOT:"))
    arguments = ["--tasks", "mmvp", "--models", str(two_llavas[0]), str(other), "--data", str(write_mmvp(tmp_path))]
    arguments += ["--limit", "2", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "base and the others were not asked under the same conditions (other: template" in error
    assert not (tmp_path / "out" / "raw").exists()
    assert main([*arguments, "--allow-differences"]) == 0
    assert "different conditions, other: template" in capsys.readouterr().out
    assert "Asked under different conditions: other: template" in (tmp_path / "out" / "report.html").read_text()


def test_other_tasks_pass_through(tmp_path: Path, two_llavas: list[Path], monkeypatch: pytest.MonkeyPatch):
    """A task of lmms-eval that is not scored here: asked through the same model, its own scores, marked so."""
    monkeypatch.chdir(tmp_path)
    drawn = Path("runs", "mini-data", "test")
    write_pope(drawn / "pope", num_images=1)
    lmms_tasks.write_drawn_rows(load_task("pope", str(drawn), Path("runs")), Path("runs"))
    known = {"mini_pope": ROOT / "eval" / "tasks" / "mini_pope.yaml"}
    monkeypatch.setattr(lmms_tasks, "_files_by_task", lambda: known)
    arguments = ["--tasks", "pope,mini_pope", "--models", str(two_llavas[0]), "--data", str(drawn), "--limit", "6"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    passed = results["passed_through"]["base"]["mini_pope"]
    assert passed == results["scores"]["base"]["pope"]["lmms_eval"] and "pope_accuracy" in passed
    page = (tmp_path / "out" / "report.md").read_text()
    assert "## Passed through: scored by lmms-eval alone" in page and "mini_pope, base: pope accuracy" in page


def test_models_of_one_name_are_told_apart(tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch):
    paths = [tmp_path / name for name in ("x/foo", "y/foo-2", "z/foo")]
    for path in paths:
        shutil.copytree(tiny_llava, path)
    assert run._models([str(path) for path in paths], towers=False) == {
        "foo": {"foo": paths[0]},
        "foo-2": {"foo-2": paths[1]},
        "foo-3": {"foo-3": paths[2]},
    }
    (tmp_path / "named").mkdir()
    paths[0].rename(tmp_path / "named" / "llava")
    monkeypatch.chdir(tmp_path / "named")
    assert list(run._models(["llava"], towers=False)) == ["named"]
    assert run._short_name("liuhaotian/llava-v1.5-7b") == "llava-v1.5-7b"


def test_two_evaluations_do_not_share_a_folder(
    tmp_path: Path, two_llavas: list[Path], capsys: pytest.CaptureFixture[str]
):
    arguments = ["--tasks", "mmvp", "--models", str(two_llavas[0]), "--data", str(write_mmvp(tmp_path, num_pairs=1))]
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process would hold it
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "another evaluation is at work in" in capsys.readouterr().err


def test_results_of_another_version_are_refused(
    tmp_path: Path, two_llavas: list[Path], capsys: pytest.CaptureFixture[str]
):
    arguments = ["--tasks", "mmvp", "--models", str(two_llavas[0]), "--data", str(write_mmvp(tmp_path, num_pairs=1))]
    arguments += ["--out", str(tmp_path / "out")]
    assert main([*arguments, "--resume"]) == 2
    assert "--resume: there is no evaluation in" in capsys.readouterr().err
    assert main(arguments) == 0 and main([*arguments, "--resume"]) == 0
    path = tmp_path / "out" / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 1}))
    capsys.readouterr()
    assert main(arguments) == 2
    assert "results.json has version 1 of the results, and this program writes version" in capsys.readouterr().err


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, two_llavas: list[Path], monkeypatch: pytest.MonkeyPatch):
    """Killed in the second batch, with half a line written: no question is asked twice, the results are the same."""
    data = write_mmvp(tmp_path)
    arguments = ["--tasks", "mmvp", "--models", str(two_llavas[0]), "--data", str(data), "--batch-size", "3"]
    assert main([*arguments, "--out", str(tmp_path / "unbroken")]) == 0
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
        whole, resumed = ((tmp_path / run / name).read_text() for run in ("unbroken", "killed"))
        assert whole.replace("unbroken", "killed") == resumed


def generated(path: Path, data: Path, count: int) -> list[str]:
    """Answers to the same questions by `generate`, one by one, from prompts written out."""
    model, processor = load_llava(path).float(), load_processor(path)
    text = f"<image>\n{MMVP_QUESTION}"
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
        (["--tasks", "mmvp", "--models", "LLAVA"], "lmms-lab-eval/MMVP is not in the hub cache; get it with `hf downl"),
        (["--tasks", "mmvp", "--models", "a=LLAVA", "a=LLAVA"], "--models: a is named twice"),
        (["--tasks", "mmvp", "--models", "a=LLAVA,LLAVA", "a-1=LLAVA"], "--models: a-1 is named twice"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "mme", "--data", "mini", "--models", "LLAVA"], "there is no drawn mme"),
        (["--tasks", "mmvp", "--models", "LLAVA", "--data", "."], "has no folder mmvp/"),
        (["--tasks", "mmvp", "--models", "LLAVA", "--limit", "0"], "at least 1"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    arguments: list[str], message: str, tiny_clip: Path, tiny_llava: Path, capsys: pytest.CaptureFixture[str]
):
    given = [argument.replace("TOWER", str(tiny_clip)).replace("LLAVA", str(tiny_llava)) for argument in arguments]
    assert main(given) == 2
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
