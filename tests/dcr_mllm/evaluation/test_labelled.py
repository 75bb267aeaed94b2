"""Reading a labelled set and refusing broken ones."""

from __future__ import annotations

import pytest

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.labelled import read_labelled_set


def test_read(tmp_path, write_labelled):
    labelled = read_labelled_set(write_labelled(tmp_path, 10, 6))
    assert (len(labelled.train), len(labelled.test)) == (10, 6)
    assert list(labelled.test.attributes) == ["bright", "sometimes"]
    assert labelled.prompts["red"] == ["a photo of a red wall.", "a red wall."]
    assert labelled.train.classes[0] == "red" and (labelled.train.attributes["sometimes"] == "").any()


def _replace(name, old, new):
    def edit(directory):
        path = directory / name
        path.write_text(path.read_text().replace(old, new))

    return edit


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda path: (path / "labels.csv").unlink(), "labels.csv is missing"),
        (lambda path: (path / "classes.json").unlink(), "classes.json is missing"),
        (lambda path: (path / "images" / "3.png").unlink(), "3.png is missing"),
        (_replace("labels.csv", "file,split", "path,split"), "columns"),
        (_replace("labels.csv", ",test,", ",val,"), "split 'val'"),
        (_replace("labels.csv", ",test,", ",train,"), "no rows of the split 'test'"),
        (_replace("labels.csv", ",blue,", ",violet,"), "violet"),
        (_replace("classes.json", "templates", "template"), "does not hold"),
        (_replace("classes.json", "{}", "{thing}"), "does not hold"),
        (lambda path: (path / "classes.json").write_text("[1]"), "does not hold"),
    ],
)
def test_broken_sets_are_refused(tmp_path, write_labelled, break_it, said):
    directory = write_labelled(tmp_path, 8, 8)
    break_it(directory)
    with pytest.raises(UserError, match=said):
        read_labelled_set(directory)
