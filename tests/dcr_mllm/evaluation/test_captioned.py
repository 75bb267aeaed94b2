"""Captioned images from both layouts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.captioned import read_captioned_set
from tests.dcr_mllm.evaluation.layouts import write_tar

CAPTIONS = [["a red wall", "red"], ["a blue wall"], ["a green wall", "green", "grass"]]


def write_json(directory: Path, rows: object) -> Path:
    directory.mkdir(exist_ok=True)
    for number in range(3):
        (directory / f"{number}.jpg").write_bytes(bytes([number]))
    (directory / "captions.json").write_text(json.dumps(rows))
    return directory


def rows() -> list[dict]:
    return [{"image": f"{number}.jpg", "captions": lines} for number, lines in enumerate(CAPTIONS)]


def test_both_layouts_read_alike(tmp_path: Path):
    samples = [{"jpg": bytes([n]), "txt": "\n".join([*lines, ""]).encode()} for n, lines in enumerate(CAPTIONS)]
    for number, name in ((0, "test"), (1, ".")):
        write_tar(tmp_path / f"tars{number}" / name / "0.tar", samples[:2])
        write_tar(tmp_path / f"tars{number}" / name / "1.tar", samples[2:])
    for directory in (write_json(tmp_path / "json", rows()), tmp_path / "tars0", tmp_path / "tars1"):
        found = read_captioned_set(directory)
        assert found.captions == CAPTIONS
        assert [picture.read_bytes() for picture in found.pictures] == [b"\0", b"\1", b"\2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([*rows(), {"image": "3.jpg", "captions": ["x"]}], "1 images are missing, the first: .*3.jpg"),
        ([{"image": "0.jpg", "captions": "a wall"}], "is no list of .*captions are 'a wall'"),
        ([{"image": "0.jpg"}], "is no list of .*KeyError"),
        ([*rows(), {"image": "0.jpg", "captions": [" "]}], "1 images have no caption, the first: .*0.jpg"),
        (rows()[:1], "has 1 images with captions"),
    ],
)
def test_what_is_wrong_is_named(content: object, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        read_captioned_set(write_json(tmp_path, content))


def test_a_folder_without_captions_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="neither captions.json nor tars"):
        read_captioned_set(tmp_path)
