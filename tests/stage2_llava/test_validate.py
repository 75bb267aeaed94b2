"""Validation finds what loading alone cannot see, says all of it, and writes a copy that loads without a problem."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dcr_mllm.conversation import TEMPLATES
from dcr_mllm.errors import UserError
from stage2_llava import image_roots, validate
from stage2_llava.instructions import load_instructions
from tests.stage2_llava.test_instructions import (
    TURNS,
    as_json,
    encoded,
    record,
    shard,
    text_record,
    write_json,
    write_lines,
    write_tar,
)


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[str, str]:
    """Data with one of each problem, and the folder of its images."""
    root = tmp_path / "images"
    root.mkdir()
    for name, content in {
        "x.png": encoded(),
        "cut.jpg": encoded("JPEG", size=(64, 64))[:-400],
        "page.png": b"<html>",
    }.items():
        (root / name).write_bytes(content)
    records = [
        record(id="good", model="m", turns=(("system", "Be brief."), *TURNS)),
        record("cut.jpg", id="cut"),
        record("cut.jpg", id="cut again"),
        record("page.png", id="page"),
        record("nowhere.png", id="gone"),
        record(id="good"),
        record(id="open", turns=TURNS[:1]),
        text_record("größe"),
        record("../x.png", id="outside"),
        ["x.png", "cut.jpg"],
        record(["x.png", "page.png"], (("human", "<image><image>?"), TURNS[1]), id="two"),
    ]
    return write_json(tmp_path / "mixed.json", records), str(root)


def places(problems: list[dict[str, Any]], kind: str) -> list[int]:
    found = [problem["where"] for problem in problems if problem["kind"] == kind]
    return [int(re.findall(r"\[(\d+)\]", where)[0]) for where in found]


def test_every_problem_is_found(mixed: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, root = mixed
    code = validate.main(["validate", data, "--images", root, "--report", str(tmp_path / "report.json")])
    assert code == 1
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["counts"] == {
        "unreadable image": 4,
        "missing image": 1,
        "order": 1,
        "image path": 1,
        "record": 1,
        "duplicate id": 1,
    }
    problems = report["problems"]
    assert places(problems, "unreadable image") == [1, 2, 3, 10]
    assert places(problems, "missing image") == [4] and places(problems, "order") == [6]
    assert places(problems, "image path") == [8] and places(problems, "record") == [9]
    assert places(problems, "duplicate id") == [5]
    assert (report["num_samples"], report["num_good"]) == (11, 3)
    assert (report["num_with_images"], report["num_text_only"], report["num_images"]) == (6, 1, 3)
    assert report["num_system_turns"] == 1 and report["tokens"] is None
    assert report["data"] == [data] and report["images"] == [root]
    out = capsys.readouterr().out
    assert "unreadable image: 4\n" in out and f"{data}[1] (id 'cut'): image {root}/cut.jpg cannot be read" in out
    assert "11 samples, 3 good" in out and f"{data}[5] (id 'good'): has the id of {data}[0]" in out
    assert "no problems" not in out


def test_clean_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_json(tmp_path / "a.json", [text_record("a"), text_record("b")])
    for data in ([path], [f"{path}@2", path], [f"{path}@0.5"]):  # weights do not matter
        assert validate.main(["validate", *data]) == 0
        first, last = capsys.readouterr().out.splitlines()
        assert first.startswith("2 samples, 2 good") and "2 are text-only" in first and last == "no problems"


def test_terminal_shows_ten_examples_and_the_report_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_json(tmp_path / "a.json", [text_record(i, (("human", "x"),)) for i in range(13)] + [text_record()])
    report = tmp_path / "report.json"
    report.write_text("old")
    assert validate.main(["validate", path, "--report", str(report)]) == 1
    out = capsys.readouterr().out
    assert out.count("a.json[") == 10 and "order: 13\n" in out and "... and 3 more" in out
    assert len(json.loads(report.read_text())["problems"]) == 13


def test_cleaned_copy_is_faithful_and_loads(mixed: tuple[str, str], tmp_path: Path) -> None:
    data, root = mixed
    more = write_lines(tmp_path / "more.jsonl", [record(id="line", extra={"k": [1]}), record("no.png"), {}])
    out = tmp_path / "clean.json"
    # Weights do not multiply samples; a broken line is left out as well.
    Path(more).write_text(Path(more).read_text() + "oops\n")
    command = ["validate", f"{data}@2", more, "--images", root, "--drop-missing", str(out)]
    assert validate.main(command) == 1
    wanted = [json.loads(Path(data).read_text())[i] for i in (0, 5, 7)]
    wanted.append(record(id="line", extra={"k": [1]}))
    assert json.loads(out.read_text(encoding="utf-8")) == wanted
    assert "größe" in out.read_text(encoding="utf-8")
    loaded = load_instructions(str(out), root)
    assert [sample.id for sample in loaded] == ["good", "good", "größe", "line"]
    for sample in loaded:
        for name in sample.images:
            loaded.open_image(sample, name)
    assert validate.main(["validate", str(out), "--images", root]) == 1  # the id that occurs twice is still there
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_existing_files_are_never_overwritten(
    mixed: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, root = mixed
    before = Path(data).read_bytes()
    assert validate.main(["validate", data, "--images", root, "--drop-missing", data]) == 2
    assert "exists already and is not overwritten" in capsys.readouterr().err
    # Nor one that appears in the meantime.
    out = tmp_path / "clean.json"
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (out.write_text("mine"), fsync(descriptor)))
    assert validate.main(["validate", data, "--images", root, "--drop-missing", str(out)]) == 2
    assert out.read_text() == "mine" and Path(data).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json"], "does not exist"),
        (["{data}", "--images", "/nowhere"], "images '/nowhere' does not exist"),
        (["{data}"], "but images is not set"),
        (["{data}", "--images", "{root}", "--report", "/nowhere/r.json"], "the folder /nowhere does not exist"),
        (["{data}", "--images", "{root}", "--drop-missing", "/nowhere/c.json"], "the folder /nowhere does not exist"),
        (["{data}", "--images", "{root}", "--llm", "/nowhere"], "llm directory '/nowhere' does not exist"),
        (["{data}", "--images", "{root}", "--llm", "{root}"], "has no tokenizer that could be loaded"),
        (["{broken}"], "is not valid JSON at line 1, column 2"),
        (["{bad}", "--drop-missing", "{out}"], "no sample is good, so .* is not written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence_and_exit_status_two(
    mixed: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "broken.json").write_text("[")
    names = {
        "data": mixed[0],
        "root": mixed[1],
        "broken": tmp_path / "broken.json",
        "bad": write_json(tmp_path / "bad.json", [text_record(turns=TURNS[:1])]),
        "out": tmp_path / "out.json",
    }
    assert validate.main(["validate", *(argument.format(**names) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert re.search(f"^error: .*{message}", error, re.MULTILINE) and "Traceback" not in error
    assert not (tmp_path / "out.json").exists()


def test_tars_are_cleaned_into_json_over_the_same_tars(tmp_path: Path) -> None:
    shard(tmp_path, 0, x__jpg=encoded("JPEG", size=(64, 64))[:-400], x__txt=b"cut", y__txt=b"no image")
    shard(tmp_path, 1, z__jpg=encoded("JPEG", size=(7, 7)), z__png=encoded(size=(6, 6)), z__json=as_json(two_images()))
    data, out, report = f"{tmp_path}/{{000,001}}.tar", tmp_path / "clean.json", tmp_path / "report.json"
    assert validate.main(["validate", data, "--drop-missing", str(out), "--report", str(report)]) == 1
    counts = json.loads(report.read_text())["counts"]
    assert counts == {"unreadable image": 1, "image marks": 1, "duplicate id": 2}
    clean = load_instructions(str(out), data)
    kept = load_instructions(data, None, drop_missing=True)
    kept_samples = [sample for sample in kept if not sample.where.endswith("000.tar:x")]
    assert len(kept_samples) == len(clean) == 9
    for copy, sample in zip(clean, kept_samples, strict=True):
        assert copy.turns == sample.turns
        for name, original in zip(copy.images, sample.images, strict=True):
            assert clean.open_image(copy, name).tobytes() == kept.open_image(sample, original).tobytes()


def two_images() -> dict[str, Any]:
    return record(None, (("human", "<image><image>Which?"), ("gpt", "Both.")), id="z")


@pytest.mark.parametrize("tars", [False, True])
def test_several_processes_find_the_same(tmp_path: Path, tars: bool) -> None:
    good, bad = encoded("JPEG", size=(40, 40)), encoded("JPEG", size=(40, 40))[:-300]
    contents = {f"{i:03d}.jpg": bad if i % 37 == 5 else good for i in range(150)}
    root = tmp_path / "images"
    if tars:
        images = write_tar(tmp_path / "images.tar", contents)
    else:
        root.mkdir()
        images = str(root)
        for name, content in contents.items():
            (root / name).write_bytes(content)
    data = write_json(tmp_path / "a.json", [record(name, id=name) for name in contents])
    alone, together = (validate.validate([data], [images], num_workers=number) for number in (1, 3))
    assert alone.problems == together.problems
    assert [problem.id for problem in alone.problems] == ["005.jpg", "042.jpg", "079.jpg", "116.jpg"]


def test_a_worker_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="a worker process died.*--workers 1"):
        list(validate._map(os._exit, [3, 3, 3], 2, int, (), "images"))


def test_an_image_is_decoded_once(mixed: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    monkeypatch.setattr(image_roots.Images, "open", lambda self, name: decoded.append(name))
    validate.validate([mixed[0]], [mixed[1]], num_workers=1)
    assert sorted(decoded) == ["cut.jpg", "page.png", "x.png"]


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_tokens_are_counted_as_training_counts_them(
    tmp_path: Path, tiny_llama: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stage2_llava.assemble import add_tokens, llm_tokenizer
    from stage2_llava.labels import encode

    monkeypatch.setattr(validate, "_SAMPLES_PER_TASK", 2)
    (tmp_path / "x.png").write_bytes(encoded())
    records = [
        record(id="short"),
        record(id="long", turns=(*TURNS, ("human", "Is it red?"), ("gpt", "Yes. " * 300))),
        text_record("text"),
        record(["x.png"] * 12, (("human", "<image>" * 12), ("gpt", "Yes.")), id="many images"),
    ]
    data = write_json(tmp_path / "a.json", records)
    lengths = validate.Lengths(str(tiny_llama), "vicuna_v1", max_length=300, image_tokens=50)
    found = validate.validate([data], [str(tmp_path)], lengths=lengths, num_workers=num_workers)
    assert [(problem.kind, problem.id) for problem in found.problems] == [
        ("too long", "long"),
        ("tokens", "many images"),
    ]
    assert "max_length is 300" in found.problems[1].text
    assert found.broken == {f"{data}[3]"}

    tokenizer = llm_tokenizer(tiny_llama)
    add_tokens(tokenizer)
    expected = [
        len(encode(sample.turns, TEMPLATES["vicuna_v1"], tokenizer, image_tokens=50).input_ids)
        for sample in found.instructions
    ]
    assert found.num_tokens is not None and found.num_tokens.tolist() == expected[:3]
    report = found.report()
    assert report["tokens"]["max"] == max(expected[:3]) > 300 and report["tokens"]["p50"] == sorted(expected[:3])[1]
    assert f"has {expected[1]:,} tokens" in found.problems[0].text


def test_template_has_to_fit(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_json(tmp_path / "a.json", [text_record()])
    assert validate.main(["validate", data, "--llm", str(tiny_llama), "--template", "chatml"]) == 2
    assert "which is not one token of this tokenizer" in capsys.readouterr().err
    assert validate.main(["validate", data, "--llm", str(tiny_llama), "--template", "vicuna_v1"]) == 0
    assert "tokens: p50 " in capsys.readouterr().out


def test_the_command_as_typed(mixed: tuple[str, str], tmp_path: Path) -> None:
    data, root = mixed
    command = [sys.executable, "-m", "stage2_llava.instructions"]
    out = tmp_path / "clean.json"
    done = subprocess.run(
        [*command, "validate", data, "--images", root, "--workers", "2", "--drop-missing", str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr == ""
    assert f"wrote 3 good samples: {out}" in done.stdout and len(json.loads(out.read_text())) == 3
    for arguments in (["--help"], ["validate", "--help"]):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 0 and "usage: python -m stage2_llava.instructions" in done.stdout
    for arguments in ([], ["validate"], ["validate", data, "--workers", "0"]):
        assert subprocess.run([*command, *arguments], capture_output=True).returncode == 2


def test_nothing_heavy_is_imported_without_an_llm(mixed: tuple[str, str]) -> None:
    code = (
        "import sys\n"
        "from stage2_llava.validate import main\n"
        "main(['validate', sys.argv[1], '--images', sys.argv[2]])\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'stage1_dcr') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *mixed], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
