"""The official pair rule and the reading of the public layout."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.mmvp_vlm import PATTERNS, pattern_of, read_pairs, score_pairs, summarise


def official_pair(first_text, second_text):
    """The rule as the authors' script has it: softmax over the images, `img1` only above one half."""
    guesses = []
    for logits in (first_text, second_text):
        share = np.exp(logits[0] - max(logits)) / np.exp(np.array(logits) - max(logits)).sum()
        guesses.append("img1" if share > 0.5 else "img2")
    return guesses == ["img1", "img2"]


def test_score_pairs_by_hand_and_ties_go_to_the_second_image():
    logits = np.array(
        [
            [[2.0, 1.0], [1.0, 2.0]],  # both right
            [[2.0, 1.0], [2.0, 1.0]],  # both texts take the first image
            [[1.0, 2.0], [1.0, 2.0]],  # both take the second
            [[1.0, 2.0], [2.0, 1.0]],  # both wrong
            [[1.0, 1.0], [1.0, 2.0]],  # tie for the first text: it takes the second image, wrong
            [[2.0, 1.0], [1.0, 1.0]],  # tie for the second text: it takes the second image, right
        ]
    )
    assert score_pairs(logits).tolist() == [True, False, False, False, False, True]


def test_score_pairs_equals_the_official_rule():
    rng = np.random.default_rng(0)
    logits = rng.integers(-2, 3, size=(400, 2, 2)).astype(float)  # integers, so that ties occur
    assert score_pairs(logits).tolist() == [official_pair(*pair) for pair in logits]


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        *[(name, name) for name in PATTERNS],
        ("Camera Perspective", "Viewpoint and Perspective"),
        ("Color", "Color and Appearance"),
        ("Orientation", "Orientation and Direction"),
        ("Presence", "Presence of Specific Features"),
        ("Quantity", "Quantity and Count"),
        ("Spatial", "Positional and Relational Context"),
        ("State", "State and Condition"),
        ("Structural Character", "Structural Characteristics"),
        ("Text", "Texts"),
        ("structural_characteristics", "Structural Characteristics"),
        ("3_QUANTITY_AND_COUNT", "Quantity and Count"),
        ("Color & Appearance", "Color and Appearance"),
    ],
)
def test_pattern_of(name, pattern):
    assert pattern_of(name) == pattern


def test_pattern_of_unknown():
    assert pattern_of("mood") is None


def _shuffle_pairs(source, order):
    rows = list(csv.reader((source / "Questions.csv").open()))
    pairs = [rows[index : index + 2] for index in range(1, len(rows), 2)]
    with (source / "Questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([rows[0], *(row for index in order for row in pairs[index])])


def test_shuffled_pairs_keep_their_patterns(tmp_path, write_pairs):
    directory = write_pairs(tmp_path, 3)
    before = read_pairs(directory)
    correct = np.random.default_rng(1).random(len(before)) < 0.5
    order = np.random.default_rng(2).permutation(len(before))
    _shuffle_pairs(directory, order)
    after = read_pairs(directory)
    assert [pair.images for pair in after] == [before[index].images for index in order]
    assert summarise(after, correct[order])["per_pattern"] == summarise(before, correct)["per_pattern"]


def test_unknown_types_go_by_row_order_with_a_warning(tmp_path, write_pairs, capsys):
    directory = write_pairs(tmp_path, 2, types=tuple("kind" + index * "x" for index in range(9)))
    pairs = read_pairs(directory)
    assert [pair.pattern for pair in pairs] == [pattern for pattern in PATTERNS for _ in range(2)]
    assert "unknown types" in capsys.readouterr().err


def test_header_spelling_byte_order_mark_and_prompt(tmp_path, write_pairs):
    directory = write_pairs(tmp_path, 1)
    table = directory / "Questions.csv"
    text = table.read_text().replace("Question ID,Type,Statement", "question id, TYPE ,statement")
    table.write_text("\ufeff" + text, encoding="utf-8")
    pairs = read_pairs(directory)
    assert len(pairs) == 9
    assert pairs[0].texts[0] == "a photo of " + pairs[0].statements[0]
    assert [path.name for path in pairs[0].images] == ["1.jpg", "2.jpg"]


def test_average_is_the_mean_of_the_patterns(tmp_path, write_pairs):
    pairs = read_pairs(write_pairs(tmp_path, 2))[:17]  # the last pattern has one pair only
    correct = np.zeros(17, dtype=bool)
    correct[-1] = True
    report = summarise(pairs, correct)
    assert report["average"] == pytest.approx(100 / 9)
    assert (report["num_correct"], report["num_pairs"], sum(report["pairs"])) == (1, 17, 1)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda path: (path / "Questions.csv").unlink(), "Questions.csv is missing"),
        (lambda path: (path / "MLLM_VLM Images" / "Texts" / "15.jpg").unlink(), "15.jpg is missing"),
        (lambda path: (path / "Questions.csv").write_text("a,b\n"), "header"),
        (lambda path: (path / "Questions.csv").write_text("Question ID,Type,Statement\n1,Texts,x\n"), "even"),
        (lambda path: (path / "Questions.csv").write_text("Question ID,Type,Statement\n1,Texts\n"), "2 cells"),
    ],
)
def test_broken_sets_are_refused(tmp_path, write_pairs, break_it, said):
    directory = write_pairs(tmp_path, 1)
    break_it(directory)
    with pytest.raises(UserError, match=said):
        read_pairs(directory)
