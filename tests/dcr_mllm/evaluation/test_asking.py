"""What has to be equal before answers may be compared."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.asking import (
    Conditions,
    _numbers,
    changes_on_the_way,
    check_fair,
    conditions_of,
    same_as_before,
)

BASE = Conditions(
    precision="float32",
    device="cpu",
    batch_size=4,
    scoring="generation",
    template="abc",
    image_padding="pad",
    data={"mmvp": "1"},
    packages={"torch": "2", "transformers": "5"},
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "bfloat16"}, r"new: precision bfloat16 \(base: float32\)"),
        ({"batch_size": 8}, r"batch_size 8 \(base: 4\)"),
        ({"template": "xyz"}, r"template xyz \(base: abc\)"),
        ({"image_padding": "square"}, r"image_padding square \(base: pad\)"),
        ({"data": {"mmvp": "2"}}, r"data.mmvp 2 \(base: 1\)"),
        ({"packages": {"torch": "3", "transformers": "5"}}, r"packages.torch 3 \(base: 2\)"),
        ({"packages": {"torch": "2"}}, r"packages.transformers None \(base: 5\)"),
        ({"scoring": "likelihood"}, r"scoring likelihood \(base: generation\)"),
        ({"device": "cuda"}, r"device cuda \(base: cpu\)"),
    ],
)
def test_other_conditions_are_refused_unless_allowed(change: dict, message: str):
    other = dataclasses.replace(BASE, **change)
    with pytest.raises(UserError, match=f"not asked under the same conditions .*{message}.*--allow-differences"):
        check_fair({"base": BASE, "same": BASE, "new": other})
    (line,) = check_fair({"base": BASE, "same": BASE, "new": other}, allow=True)
    assert line.startswith("new: ")
    assert check_fair({"base": BASE, "same": BASE}) == []


def test_every_condition_is_compared():
    assert {field.name for field in dataclasses.fields(Conditions)} == {
        *("precision", "device", "batch_size", "scoring", "template", "image_padding", "data", "packages")
    }


def test_a_killed_run_does_not_go_on_under_other_conditions(tmp_path: Path):
    record = tmp_path / "out" / "raw" / "base.json"
    record.parent.mkdir(parents=True)
    same_as_before(BASE, record, allow=False)
    same_as_before(BASE, record, allow=False)
    newer = dataclasses.replace(BASE, packages={"torch": "3", "transformers": "5"})
    with pytest.raises(UserError, match=r"out was started under other conditions \(packages.torch 3 \(before: 2\)\)"):
        same_as_before(newer, record, allow=False)
    assert json.loads(record.read_text())["conditions"]["packages"]["torch"] == "2"
    assert changes_on_the_way(record) == []
    same_as_before(newer, record, allow=True)
    same_as_before(newer, record, allow=False)  # what changed stays on record
    assert changes_on_the_way(record) == ["packages.torch 3 (before: 2)"]


def test_conditions_of_a_directory(tiny_llava: Path, tmp_path: Path):
    found = conditions_of(str(tiny_llava), {"mmvp": "1"}, 4, "cpu", "generation")
    assert (found.precision, found.image_padding, found.batch_size) == ("float32", "pad", 4)
    assert found.packages["torch"] and found.data == {"mmvp": "1"}
    other = tmp_path / "other"
    shutil.copytree(tiny_llava, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("ASSISTANT", "BOT"))
    assert conditions_of(str(other), {"mmvp": "1"}, 4, "cpu", "generation").template != found.template
    stored = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**stored, "dtype": "bfloat16"}))
    assert conditions_of(str(other), {}, 4, "cuda", "generation").precision == "bfloat16"


def test_lmms_evals_own_scores_without_errors_and_names():
    scores = {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "task", "f1,flexible": 1, "x,none": "N/A"}
    assert _numbers(scores) == {"acc": 0.5, "f1": 1.0}
