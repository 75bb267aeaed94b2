"""Instruction data are read as LLaVA reads them, and whatever LLaVA would pass over silently is refused by name."""

from __future__ import annotations

import functools
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcr_mllm.conversation import Turn
from dcr_mllm.errors import UserError
from stage2_llava import image_roots, instructions, record_files
from stage2_llava.instructions import Instructions, Sample, load_instructions

TURNS = (("human", "<image>\nWhat is it?"), ("gpt", "A red square."))
TEXT_TURNS = (("human", "Why?"), ("gpt", "Because."))


def record(image: Any = "x.png", turns: Any = TURNS, **more: Any) -> dict[str, Any]:
    conversations = [{"from": role, "value": text} for role, text in turns]
    return {"id": "a", **({} if image is None else {"image": image}), "conversations": conversations, **more}


def text_record(id: Any = "t", turns: Any = TEXT_TURNS) -> dict[str, Any]:
    return record(None, turns, id=id)


def encoded(format: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (24, 16), **options: Any) -> bytes:
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    buffer = io.BytesIO()
    pixels.convert(mode).save(buffer, format=format, **options)
    return buffer.getvalue()


def write_json(path: Path, records: Any, **options: Any) -> str:
    path.write_text(json.dumps(records, **options), encoding="utf-8")
    return str(path)


def write_lines(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in records))
    return str(path)


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def as_json(item: Any) -> bytes:
    return json.dumps(item).encode()


@pytest.fixture
def images(tmp_path: Path) -> str:
    (tmp_path / "images" / "coco").mkdir(parents=True)
    for name in ("x.png", "y.png", "coco/x.png"):
        (tmp_path / "images" / name).write_bytes(encoded())
    return str(tmp_path / "images")


@pytest.fixture
def refused(tmp_path: Path, images: str) -> Callable[..., str]:
    """Loads one bad record after a good one and returns the message, which is the same for JSON and for JSONL."""

    def load(bad: Any, message: str) -> str:
        good = text_record()
        texts = []
        for path, place in (
            (write_json(tmp_path / "bad.json", [good, bad]), "bad.json[1]"),
            (write_lines(tmp_path / "bad.jsonl", [good, bad]), "bad.jsonl:2"),
        ):
            with pytest.raises(UserError, match=message) as caught:
                load_instructions(path, images)
            text = str(caught.value)
            assert place in text and "1 of 2 samples" in text and "validate" in text and "\n" not in text
            kept = load_instructions(path, images, drop_missing=True)
            assert [sample.id for sample in kept] == ["t"] and kept.num_dropped == 1
            assert (
                len(kept.report) == 1
                and re.search("^samples left out for .*: 1, the first is ", kept.report[0])
                and place in kept.report[0]
            )
            texts.append(text)
        return texts[0]

    return load


# What is read


def test_a_sample_is_what_the_file_says(tmp_path: Path, images: str) -> None:
    turns = (*TURNS, ("human", "And  its colour?"), ("gpt", "Red.\n"))
    path = write_json(tmp_path / "a.json", [record(turns=turns, model="any", id=7), text_record()])
    loaded = load_instructions(path, images)
    assert len(loaded) == 2 and loaded.num_dropped == 0 and loaded.report == []
    assert loaded[0] == Sample(
        id="7",
        turns=(
            Turn("user", "<image>\nWhat is it?"),
            Turn("assistant", "A red square."),
            Turn("user", "And  its colour?"),
            Turn("assistant", "Red.\n"),
        ),
        images=("x.png",),
        where=f"{path}[0]",
    )
    assert loaded[-1] == loaded[np.int64(1)] and loaded[1].images == ()
    assert list(loaded) == [loaded[0], loaded[1]]
    with pytest.raises(IndexError):
        loaded[2]


def test_words_are_counted_as_llava_counts_them(tmp_path: Path, images: str) -> None:
    records = [record(), text_record(), record(["x.png", "y.png"], (("user", "<image><image>"), ("assistant", "x\ty")))]
    loaded = load_instructions(write_json(tmp_path / "a.json", records), images)
    words = [sum(len(turn["value"].split()) for turn in item["conversations"]) for item in records]
    assert loaded.num_words.tolist() == words == [7, 2, 3]
    assert loaded.has_image.tolist() == [True, False, True]
    assert loaded.num_words.dtype.kind == "i" and loaded.has_image.dtype == bool


def test_json_and_json_lines_hold_the_same(tmp_path: Path, images: str) -> None:
    records = [record(), text_record()]
    paths = [
        write_json(tmp_path / "compact.json", records),
        write_json(tmp_path / "indented.json", records, indent=4),
        write_lines(tmp_path / "lines.jsonl", records),
        write_lines(tmp_path / "lines.json", records),
    ]
    (tmp_path / "gaps.jsonl").write_text("\n" + "\n\n".join(map(json.dumps, records)))
    (tmp_path / "array.jsonl").write_text(f"\r\n {json.dumps(records)} \r\n")
    paths += [str(tmp_path / "gaps.jsonl"), str(tmp_path / "array.jsonl")]
    loaded = [load_instructions(path, images) for path in paths]
    assert len({item.fingerprint() for item in loaded}) == 1
    assert loaded[4][1].where.endswith("gaps.jsonl:4")
    both = load_instructions([paths[0], paths[2]], images)
    assert [sample.where for sample in both] == [f"{paths[0]}[0]", f"{paths[0]}[1]", f"{paths[2]}:1", f"{paths[2]}:2"]


def test_unicode_with_and_without_byte_order_mark(tmp_path: Path) -> None:
    turns = (("human", "Größe? 大きさ 🙂"), ("gpt", "\u2028 größer \x1f 🦙"))
    marked = tmp_path / "marked.json"
    marked.write_bytes(b"\xef\xbb\xbf" + json.dumps([text_record("é", turns)], ensure_ascii=False).encode())
    lines = tmp_path / "marked.jsonl"
    lines.write_bytes(b"\xef\xbb\xbf" + json.dumps(text_record("é", turns)).encode() + b"\r\n")
    for path in (marked, lines, Path(write_json(tmp_path / "escaped.json", [text_record("é", turns)]))):
        [sample] = load_instructions(str(path), None)
        assert sample.id == "é" and [turn.text for turn in sample.turns] == [text for _, text in turns]


def test_elements_may_be_cut_anywhere_while_reading(
    tmp_path: Path, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = (("human", 'a "\\ \\n 🙂 é] },{'), ("gpt", "b" * 50))
    records = [text_record(i, turns) for i in range(5)] + [record(score=-1.5e10, flags=[True, None])]
    wanted = list(load_instructions(write_lines(tmp_path / "a.jsonl", records), images))
    for chunk in (17, 64, 301):
        monkeypatch.setattr(record_files, "_CHUNK", chunk)
        for options in ({}, {"indent": 1}, {"ensure_ascii": False}):
            loaded = load_instructions(write_json(tmp_path / "a.json", records, **options), images)
            assert [sample.turns for sample in loaded] == [sample.turns for sample in wanted]


def test_globs_braces_and_user_paths(tmp_path: Path, images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("p-08.json", "p-09.json", "p-10.json", "odd[1]@2"):
        write_json(tmp_path / name, [text_record(name)])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for pattern in ("p-*.json", f"{tmp_path}/p-{{08..10}}.json", "~/p-{08,09,10}.json", "p-{0*,10}.json"):
        assert [sample.id for sample in load_instructions(pattern, None)] == ["p-08.json", "p-09.json", "p-10.json"]
    # Literal names, though they look like a pattern and a weight; a weight of such a file goes behind it.
    assert [sample.id for sample in load_instructions("odd[1]@2", None)] == ["odd[1]@2"]
    assert [sample.id for sample in load_instructions("odd[1]@2@3", None)] == ["odd[1]@2"] * 3
    with pytest.raises(UserError, match=r"names p-11.json, which does not exist"):
        load_instructions("p-{09..11}.json", None)
    with pytest.raises(UserError, match="the range 10..08 runs backwards"):
        load_instructions("p-{10..08}.json", None)


def test_weights(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [text_record(i) for i in range(10)])
    other = write_json(tmp_path / "b.json", [text_record("other")])

    def ids(spec: str) -> list[str]:
        return [sample.id for sample in load_instructions([spec, other], None)][:-1]

    everything = [str(i) for i in range(10)]
    assert ids(path) == ids(f"{path}@1") == everything
    assert ids(f"{path}@2") == everything * 2
    half = ids(f"{path}@0.5")
    assert len(half) == 5 and half == sorted(set(half), key=int) and half == ids(f"{path}@.5") != everything[:5]
    assert ids(f"{path}@2.5") == everything * 2 + half
    assert len(ids(f"{path}@0.26")) == 3
    loaded = load_instructions(f"{path}@2.5", None)
    assert len(loaded) == len(loaded.num_words) == len(loaded.has_image) == 25 and loaded.num_records == 10
    with pytest.raises(UserError, match="no sample to train on"):
        load_instructions(f"{path}@0.01", None)
    for weight in ("0", "-1", "nan", "inf"):
        with pytest.raises(UserError, match=f"has the weight {weight}, expected a positive number"):
            load_instructions(f"{path}@{weight}", None)
    with pytest.raises(UserError, match="@twice' does not exist"):
        load_instructions(f"{path}@twice", None)


def test_system_turn_is_ignored_and_counted(tmp_path: Path, images: str, capsys: pytest.CaptureFixture[str]) -> None:
    records = [record(turns=(("system", "You are a pirate."), *TURNS)), record(), text_record()]
    loaded = load_instructions(write_json(tmp_path / "a.json", records), images)
    assert loaded[0].turns == loaded[1].turns and loaded.num_words[0] == loaded.num_words[1]
    assert loaded.report == ["samples whose system turn is ignored, as LLaVA-1.5 does: 1"]
    assert loaded.report[0] in capsys.readouterr().err


def test_fingerprint_follows_content_not_place(tmp_path: Path, images: str) -> None:
    path = write_json(tmp_path / "a.json", [text_record(1), text_record(2)])
    first = load_instructions(path, None).fingerprint()
    (tmp_path / "moved").mkdir()
    moved = write_json(tmp_path / "moved" / "b.json", [text_record(1), text_record(2)], indent=1)
    assert load_instructions(moved, None).fingerprint() == first
    changed = [
        load_instructions(f"{path}@2", None),
        load_instructions(write_json(tmp_path / "order.json", [text_record(2), text_record(1)]), None),
        load_instructions(write_json(tmp_path / "id.json", [text_record(1), text_record(3)]), None),
        load_instructions(
            write_json(tmp_path / "t.json", [text_record(1), text_record(2, (("human", "Why?"), ("gpt", "So.")))]), None
        ),
    ]
    assert len({first, *(item.fingerprint() for item in changed)}) == 5


def test_a_sample_without_id_is_called_by_its_place(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [text_record(None), text_record(0)])
    assert [sample.id for sample in load_instructions(path, None)] == [f"{path}[0]", "0"]


# What is refused


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1], "is list, expected an object"),
        ("x", "is str, expected an object"),
        ({"id": "a", "image": "x.png"}, "has no conversations"),
        (record(turns=()), "has no conversations"),
        (record() | {"conversations": "hello"}, "has no conversations"),
        (record() | {"conversations": [{"role": "user", "content": "x"}]}, "turn 0 is not .*from.*value"),
        (record() | {"conversations": ["x"]}, "turn 0 is not .*from.*value"),
        (record() | {"conversations": [{"from": "human", "value": None}]}, "turn 0 is not .*from.*value"),
        (record(turns=(("Human", "<image>"), ("gpt", "x"))), "turn 0 is from 'Human', expected human or gpt"),
        (record(turns=(*TURNS, ("system", "x"), ("gpt", "x"))), "turn 2 is from 'system'"),
        (record(turns=(("gpt", "Hello."), *TURNS)), "begins with gpt, expected human; LLaVA would skip"),
        (record(turns=(("system", "x"), ("gpt", "Hello."), *TURNS)), "begins with gpt"),
        (record(turns=(*TURNS, ("assistant", "x"))), "turn 2 is from assistant as the one before"),
        (record(turns=(TURNS[0], ("user", "Well?"), TURNS[1])), "turn 1 is from user as the one before"),
        (record(turns=(*TURNS, ("human", "And?"))), "ends with human, expected an answer"),
        (record(turns=TURNS[:1]), "ends with human, expected an answer"),
        (record(None, (("system", "x"),)), "ends with system, expected an answer"),
        (record(turns=(TURNS[0], ("gpt", ""))), "turn 1 is empty"),
        (record(turns=(*TURNS, ("human", " \n"), ("gpt", "x"))), "turn 2 is empty"),
        (record(None), r"names 0 image\(s\), but its turns have 1 <image> marks"),
        (record(turns=TEXT_TURNS), r"names 1 image\(s\), but its turns have 0 <image> marks"),
        (record(["x.png", "y.png"]), r"names 2 image\(s\), but its turns have 1 <image> marks"),
        (record(turns=(("human", "What?"), ("gpt", "<image> it is"))), "has <image> in an answer"),
        (record(""), "has image '', expected a file name"),
        (record(3), "has image 3, expected a file name"),
        (record(["x.png", None], (("human", "<image><image>"), TURNS[1])), "expected a file name or a list"),
        (record(turns=(TURNS[0], ("gpt", "half \ud83d"))), "half a character"),
        (record(turns=(TURNS[0], ("gpt", "nu\0l"))), "NUL character"),
        (record("z.png"), "image 'z.png' is not in .*images"),
        (record("coco"), "image 'coco' is not in"),
        (record("nowhere/x.png"), "image 'nowhere/x.png' is not in"),
        (record("x.png/x.png"), "image 'x.png/x.png' is not in"),
        (record("../secret.png"), "image '../secret.png' leads out of its folder"),
        (record("coco/../../secret.png"), "leads out of its folder"),
        (record("/etc/x.png"), "leads out of its folder"),
        (record(".."), "leads out of its folder"),
    ],
    ids=repr,
)
def test_a_bad_sample_is_refused_or_dropped(
    refused: Callable[..., str], tmp_path: Path, bad: Any, message: str
) -> None:
    (tmp_path / "secret.png").write_bytes(encoded())
    refused(bad, message)


def test_the_first_problem_is_told_with_its_id_and_the_number_of_all(tmp_path: Path, images: str) -> None:
    records = [text_record(), record("1.png", id="one"), record(), record("2.png"), record(turns=TURNS[:1])]
    path = write_json(tmp_path / "a.json", records)
    with pytest.raises(UserError, match=r"a.json\[1\] \(id 'one'\): image '1.png'.*; 3 of 5 samples have problems"):
        load_instructions(path, images)
    loaded = load_instructions(path, images, drop_missing=True)
    assert loaded.num_dropped == 3 and len(loaded) == 2 == loaded.num_records
    assert [line.split(",")[0] for line in loaded.report] == [
        "samples left out for missing image: 2",
        "samples left out for order: 1",
    ]


def test_dropping_everything_is_refused(tmp_path: Path, images: str) -> None:
    path = write_json(tmp_path / "a.json", [record("1.png"), record("2.png")])
    with pytest.raises(UserError, match=r"no sample to train on: .*image '1.png'.*2 of 2 samples"):
        load_instructions(path, images, drop_missing=True)
    with pytest.raises(UserError, match="no sample to train on"):
        load_instructions(write_json(tmp_path / "empty.json", []), images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty, expected a JSON array or JSON Lines"),
        (b"hello", "begins with b'h', expected a JSON array"),
        ('[{"id": 1}]'.encode("utf-16"), "begins with .* expected a JSON array or JSON Lines in UTF-8"),
        (b'[{"id": 1},\n {"id": 2', r"line 2, column 10 .*make sure that the file is whole"),
        (b'[{"id": 1},\n {"id": "2', r"line 2, column 9 .*Unterminated"),
        (b'[{"id": 1}', r"line 1, column 11 .*cut off"),
        (b"[", "line 1, column 2"),
        (b'[{"id": 1},\n]', "line 2, column 1 .*Expecting value"),
        (b'[\n{"id": 1}\n{"id": 2}]', "line 3, column 1 .*Expecting ',' delimiter"),
        (b'[{"id": 1}] x', "goes on behind the array of 1 samples"),
        (b'[{"id": "\xff"}]', "is not UTF-8 behind line 1"),
        (b'[{"id": 1},' + b"[" * 100_000, "nested too deeply"),
        (b'{\n"data": []\n}', "neither an array nor one object per line .line 1: .*at column 2"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_unreadable_json(tmp_path: Path, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    for chunk in (1 << 22, 5):
        monkeypatch.setattr(record_files, "_CHUNK", chunk)
        with pytest.raises(UserError, match=message) as caught:
            load_instructions(str(path), None, drop_missing=True)
        assert str(path) in str(caught.value)


def test_line_and_column_are_right_far_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps([text_record(i) for i in range(50)], indent=2)
    lines = text.splitlines()
    lines[200] = "   oops" + lines[200]
    (tmp_path / "a.json").write_text("\n".join(lines))
    try:
        json.loads("\n".join(lines))
    except json.JSONDecodeError as error:
        expected = f"line {error.lineno}, column {error.colno} "
    for chunk in (1 << 22, 1000, 33):
        monkeypatch.setattr(record_files, "_CHUNK", chunk)
        with pytest.raises(UserError, match=expected):
            load_instructions(str(tmp_path / "a.json"), None)


def test_an_error_early_in_a_file_does_not_make_it_read_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_files, "_CHUNK", 1000)
    # Not UTF-8 at its end: who reads that far says so.
    (tmp_path / "a.json").write_bytes(b'[{"a": 1} oops' + b" " * 200_000 + b"\xff]")
    with pytest.raises(UserError, match="line 1, column 11 "):
        load_instructions(str(tmp_path / "a.json"), None)


def test_a_broken_line_is_one_bad_sample(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(text_record()) + '\n{"id": \n' + json.dumps(text_record("u")) + "\n")
    with pytest.raises(UserError, match=r"a.jsonl:2: is not valid JSON: Expecting value at column \d+; 1 of 3"):
        load_instructions(str(path), None)
    assert [sample.id for sample in load_instructions(str(path), None, drop_missing=True)] == ["t", "u"]


def test_settings_that_do_not_fit(tmp_path: Path, images: str) -> None:
    path = write_json(tmp_path / "a.json", [text_record(), record()])
    for data, roots, message in (
        ([], None, "data is not set"),
        ("", None, "data is not set"),
        (str(tmp_path), None, "is not supported, expected LLaVA JSON"),
        (f"{tmp_path}/*.xyz", None, "does not exist"),
        (path, None, r"a.json\[1\] names image 'x.png', but images is not set"),
        (path, "/nowhere", "images '/nowhere' does not exist"),
        (path, path, "neither a folder nor an uncompressed tar"),
    ):
        with pytest.raises(UserError, match=message):
            load_instructions(data, roots, drop_missing=True)
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match="expected LLaVA JSON or JSONL files or uncompressed tars"):
        load_instructions(str(tmp_path / "a.tar.gz"), None)


# Images


def test_folders_are_searched_in_order_and_listed_once(
    tmp_path: Path, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = tmp_path / "second"
    second.mkdir()
    for name in ("x.png", "z.png"):
        (second / name).write_bytes(encoded(size=(5, 5)))
    records = [record(name) for name in ("x.png", "z.png", "coco/x.png", "./coco//x.png") * 5]
    path = write_json(tmp_path / "a.json", records)
    calls: Counter[str] = Counter()
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: calls.update([str(folder)]) or scandir(folder))
    loaded = load_instructions(path, [images, str(second)])
    assert max(calls.values()) == 1 and len(calls) == 3
    sizes = [loaded.open_image(loaded[i], loaded[i].images[0]).size for i in range(4)]
    assert sizes == [(24, 16), (5, 5), (24, 16), (24, 16)]
    turned = load_instructions(path, [f"{second}/", images])
    assert turned.open_image(turned[0], "x.png").size == (5, 5)
    both = load_instructions(path, f"{tmp_path}/{{images,second}}")
    assert both.open_image(both[1], "z.png").size == (5, 5)


@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "L", {}),
        ("PNG", "LA", {}),
        ("PNG", "1", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "L", {}),
        ("WEBP", "RGB", {}),
        ("GIF", "P", {}),
    ],
)
def test_all_kinds_of_images_become_rgb(tmp_path: Path, format: str, mode: str, options: dict[str, Any]) -> None:
    (tmp_path / "x.png").write_bytes(encoded(format, mode, **options))
    loaded = load_instructions(write_json(tmp_path / "a.json", [record()]), str(tmp_path))
    image = loaded.open_image(loaded[0], "x.png")
    assert image.mode == "RGB" and image.size == (24, 16)
    with Image.open(tmp_path / "x.png") as plain:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(plain.convert("RGB")))


def test_the_first_frame_and_no_rotation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 4), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    frames[0].save(tmp_path / "x.jpg", exif=exif)
    loaded = load_instructions(write_json(tmp_path / "a.json", [record("x.gif"), record("x.jpg")]), str(tmp_path))
    first = loaded.open_image(loaded[0], "x.gif")
    assert first.mode == "RGB" and first.getpixel((0, 0)) == (255, 0, 0)
    assert loaded.open_image(loaded[1], "x.jpg").size == (8, 4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded("JPEG", size=(64, 64))[:-400], "truncated"),
        (encoded("PNG")[:-60], "truncated|Truncated"),
        (b"", "no format that Pillow knows"),
        (b"<html>not found</html>", "no format that Pillow knows"),
        (encoded("PNG")[:16] + b"\xff" * 200, ""),
    ],
    ids=["jpeg", "png", "empty", "html", "header"],
)
def test_a_damaged_image_is_told_with_its_sample(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.png").write_bytes(content)
    tar = write_tar(tmp_path / "x.tar", {"x.png": content})
    path = write_json(tmp_path / "a.json", [record(id="seven")])
    for root, file in ((str(tmp_path), f"{tmp_path}/x.png"), (tar, f"{tar}, member x.png")):
        loaded = load_instructions(path, root)  # nothing is decoded here
        with pytest.raises(UserError, match=f"{re.escape(file)} cannot be read: .*({reason})") as caught:
            loaded.open_image(loaded[0], "x.png")
        text = str(caught.value)
        assert "a.json[0] (id 'seven')" in text and "\n" not in text
        assert "python -m stage2_llava.instructions validate" in text and "--drop-missing" in text


def test_an_image_that_goes_away_is_told(tmp_path: Path, images: str) -> None:
    loaded = load_instructions(write_json(tmp_path / "a.json", [record()]), images)
    os.remove(f"{images}/x.png")
    with pytest.raises(UserError, match=r"a.json\[0\].*image 'x.png' is not in .*images"):
        loaded.open_image(loaded[0], "x.png")
    with pytest.raises(UserError, match="leads out of its folder"):
        loaded.open_image(loaded[0], "../a.json")


def test_images_in_tars_by_member_path(tmp_path: Path, images: str) -> None:
    sizes = {"train/x.png": (5, 5), "val/x.png": (6, 6), "./y.png": (7, 7), "deep/er/only.png": (8, 8)}
    write_tar(tmp_path / "0.tar", {name: encoded(size=size) for name, size in sizes.items()})
    write_tar(tmp_path / "1.tar", {"z.png": encoded(size=(9, 9)), "notes.txt": b"x"})
    names = ["train/x.png", "val/x.png", "y.png", "deep/er/only.png", "only.png", "1.tar/z.png", "z.png"]
    path = write_json(tmp_path / "a.json", [record(name) for name in names])
    for pattern in (f"{tmp_path}/*.tar", [f"{tmp_path}/0.tar", f"{tmp_path}/{{0,1}}.tar"]):
        loaded = load_instructions(path, pattern)
        found = [loaded.open_image(sample, sample.images[0]).width for sample in loaded]
        assert found == [5, 6, 7, 8, 8, 9, 9]
    for name, message in (
        ("x.png", r"image 'x.png' could be 2 members, of .*0.tar and .*0.tar"),
        ("er/only.png", "is not in"),
        ("../z.png", "leads out of its folder"),
    ):
        with pytest.raises(UserError, match=message):
            load_instructions(write_json(tmp_path / "b.json", [record(name)]), f"{tmp_path}/*.tar")
    # Folders and tars, the first that has it.
    mixed = load_instructions(write_json(tmp_path / "c.json", [record("y.png")]), [images, f"{tmp_path}/0.tar"])
    assert mixed.open_image(mixed[0], "y.png").width == 24


def test_the_same_member_in_two_tars_is_ambiguous(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", {"000.jpg": encoded("JPEG", size=(8 + number, 8))})
    with pytest.raises(UserError, match="image '000.jpg' could be 2 members, of .*0.tar and .*1.tar"):
        load_instructions(write_json(tmp_path / "a.json", [record("000.jpg")]), f"{tmp_path}/*.tar")
    loaded = load_instructions(write_json(tmp_path / "a.json", [record("1.tar/000.jpg")]), f"{tmp_path}/*.tar")
    assert loaded.open_image(loaded[0], "1.tar/000.jpg").width == 9


# WebDataset


def shard(tmp_path: Path, number: int, **more: bytes) -> str:
    members = {
        "a/000.jpg": encoded("JPEG", size=(8 + number, 8)),
        "a/000.json": as_json(record("ignored.jpg", id=f"json{number}")),
        "001.PNG": encoded(size=(9 + number, 8)),
        "001.txt": " A captión.\n".encode(),
        "002.json": as_json(text_record(None)),
        "003.gif": encoded("GIF", "P", size=(10 + number, 8)),
        "003.txt": b"With metadata.",
        "003.json": as_json({"url": "x", "caption": "y"}),  # as img2dataset writes it
        **{name.replace("__", "."): content for name, content in more.items()},
    }
    return write_tar(tmp_path / f"{number:03d}.tar", members)


def test_tars_hold_their_own_images(tmp_path: Path) -> None:
    first, second = shard(tmp_path, 0), shard(tmp_path, 1)
    loaded = load_instructions(f"{tmp_path}/{{000..001}}.tar", None)
    assert [sample.where for sample in loaded][:5] == [
        f"{first}:a/000",
        f"{first}:001",
        f"{first}:003",
        f"{first}:002",
        f"{second}:a/000",
    ]
    assert [sample.id for sample in loaded][:4] == ["json0", "001", "003", f"{first}:002"]
    assert loaded[1].turns == (Turn("user", "<image>"), Turn("assistant", "A captión."))
    assert loaded[2].turns[1].text == "With metadata."
    assert loaded.has_image.tolist() == [True, True, True, False] * 2
    # The same keys in both tars, each with its own image.
    widths = [loaded.open_image(sample, name).width for sample in loaded for name in sample.images]
    assert widths == [8, 9, 10, 9, 10, 11]
    assert loaded[0].images == (f"{first}/a/000.jpg",)
    (tmp_path / "moved").mkdir()
    shard(tmp_path / "moved", 0)
    moved = load_instructions(f"{tmp_path}/moved/000.tar", None)
    assert moved.fingerprint() == load_instructions(first, None).fingerprint()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"x__jpg": encoded("JPEG")}, "000.tar:x: has neither x.json with conversations nor x.txt"),
        ({"x__txt": b"caption"}, r"000.tar:x \(id 'x'\): names 0 image\(s\), but its turns have 1"),
        ({"x__jpg": encoded("JPEG"), "x__txt": b" "}, "turn 1 is empty"),
        ({"x__jpg": encoded("JPEG"), "x__txt": b"\xff"}, "json or txt that cannot be read"),
        ({"x__jpg": encoded("JPEG"), "x__json": b"{"}, "json or txt that cannot be read"),
        ({"x__jpg": encoded("JPEG"), "x__png": encoded(), "x__txt": b"x"}, r"names 2 image\(s\)"),
        ({"x__json": as_json(record(turns=TURNS[:1]))}, "ends with human"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_bad_samples_in_tars(tmp_path: Path, more: dict[str, bytes], message: str) -> None:
    path = shard(tmp_path, 0, **more)
    with pytest.raises(UserError, match=f"{message}.*1 of 5 samples"):
        load_instructions(path, None)
    assert len(load_instructions(path, None, drop_missing=True)) == 4


def test_damaged_tars_are_refused_as_a_whole(tmp_path: Path) -> None:
    path = Path(shard(tmp_path, 0))
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        third = archive.getmembers()[2]
    damaged = bytearray(content)
    damaged[third.offset : third.offset + 20] = b"\xff" * 20
    compressed = io.BytesIO()
    with tarfile.open(fileobj=compressed, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    json_path = write_json(tmp_path / "a.json", [record()])
    for broken in (
        content[: third.offset_data + 10],
        content[: third.offset + 100],
        bytes(damaged),
        b"",
        b"x" * 3000,
        compressed.getvalue(),
    ):
        path.write_bytes(broken)
        for data, roots in ((str(path), None), (json_path, str(path))):
            with pytest.raises(UserError, match=f"{path} cannot be read as an uncompressed tar"):
                load_instructions(data, roots, drop_missing=True)


# Memory and processes


def test_pickling_takes_little_more_than_the_text(tmp_path: Path, images: str) -> None:
    turns = (("human", "<image>\n" + "q" * 200), ("gpt", "a" * 300))
    path = write_json(tmp_path / "a.json", [record(turns=turns, id=i, junk="j" * 1000) for i in range(1000)])
    loaded = load_instructions(path, images)
    content = pickle.dumps(loaded)
    assert len(content) < 1000 * 600
    copy: Instructions = pickle.loads(content)
    assert copy[999] == loaded[999] and copy.fingerprint() == loaded.fingerprint()
    assert copy.open_image(copy[0], "x.png").size == (24, 16)
    # Nothing per sample is a Python object.
    assert sum(1 for value in vars(loaded._records).values() if isinstance(value, (list, dict)) and len(value) > 1) == 0


def _widths(loaded: Instructions) -> list[int]:
    return [loaded.open_image(sample, name).width for sample in loaded for name in sample.images]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_images_of_tars_are_read_by_several_processes(tmp_path: Path, method: str) -> None:
    members = {f"{i:03d}.png": encoded(size=(i + 1, 4)) for i in range(40)}
    members |= {f"{i:03d}.txt": b"x" for i in range(40)}
    loaded = load_instructions(write_tar(tmp_path / "a.tar", members), None)
    assert _widths(loaded) == list(range(1, 41))  # opens the handle that forked processes share
    # They share its position as well, which is why nobody may move or use it.
    assert os.lseek(image_roots._open_handle(str(tmp_path / "a.tar")).descriptor, 0, os.SEEK_CUR) == 0
    with multiprocessing.get_context(method).Pool(3) as pool:
        assert pool.map(_widths, [loaded] * 9) == [list(range(1, 41))] * 9


def test_more_tars_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        write_tar(tmp_path / f"{number:02d}.tar", {"a.png": encoded(size=(number + 1, 4)), "a.txt": b"x"})
    handles = functools.lru_cache(maxsize=3)(image_roots._Handle)
    monkeypatch.setattr(image_roots, "_open_handle", handles)
    loaded = load_instructions(f"{tmp_path}/*.tar", None)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert _widths(loaded) == _widths(loaded) == list(range(1, 13))
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_nothing_heavy_is_imported(tmp_path: Path, images: str) -> None:
    path = write_json(tmp_path / "a.json", [record()])
    code = (
        "import sys\n"
        "from stage2_llava.instructions import load_instructions\n"
        "load_instructions(*sys.argv[1:])\n"
        "print([name for name in ('torch', 'transformers', 'PIL', 'datasets', 'stage1_dcr') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, path, images], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_fractions_of_weights_round_to_the_nearest() -> None:
    assert [len(instructions._weighted(np.arange(7), weight)) for weight in (0.5, 1.5, 2.07, math.pi)] == [
        4,
        11,
        14,
        22,
    ]
