"""What an answer says: the authors' rules, and every flaw of common parsers that changes a score."""

from __future__ import annotations

import pytest

from dcr_mllm.evaluation.answers import (
    first_yes_no,
    mme_yes_no,
    option_letter,
    pope_yes,
    says_yes_or_no,
    scienceqa_letter,
)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("b", "B"),
        (" B. ", "B"),
        ("(a)", "A"),
        ("(B) to the right", "B"),
        ("A. to the left", "A"),
        ("B) to the right", "B"),
        ("The answer is A", "A"),
        ("The answer is (b).", "B"),
        ("the correct option: B", "B"),
        ("It is a B", "B"),
        ("It is (b), not the other", "B"),
        ("I would say A.", "A"),
        ("To the left.", "A"),
        ("to the RIGHT", "B"),
        # Words that end in a letter, articles and contractions name no option.
        ("banana", None),
        ("It is a side view", None),
        ("A side view", None),
        ("Closed", None),
        ("The answer is a side view", None),
        ("Vitamin B's effect", None),
        ("", None),
        ("C", None),
        ("(a) or (b)", None),
        ("A or B", None),
    ],
)
def test_letters(answer: str, letter: str | None):
    assert option_letter(answer, ["to the left", "to the right"]) == letter


def test_letters_of_more_options():
    assert option_letter("D", ["one", "two", "three", "four"]) == "D"
    assert option_letter("E", ["one", "two", "three", "four"]) is None
    assert option_letter("C or D", ["one", "two", "three", "four"]) is None
    assert option_letter("three", ["one", "two", "three", "four"]) == "C"
    assert option_letter("same", ["same", "same"]) is None


@pytest.mark.parametrize(
    ("answer", "official", "said"),
    [
        ("Yes", True, True),
        ("Yes.", True, True),
        ("Yes, it is", True, True),
        ("No", False, True),
        ("No, there is not. Yes", False, True),
        ("There is no dog", False, True),
        ("Yes. No", True, True),
        ("NO", True, True),  # case matters in the official rule
        ("", True, False),
        ("I cannot tell", True, False),
        ("Nobody", True, False),
        ("it is not,", False, True),
    ],
)
def test_pope(answer: str, official: bool, said: bool):
    assert pope_yes(answer) is official
    assert says_yes_or_no(answer) is said


@pytest.mark.parametrize(
    ("answer", "naturalbench", "mme"),
    [
        ("Yes", True, True),
        ("no", False, False),
        ("I think yes, not no", True, None),
        ("Not yesterday. No", False, False),
        ("It's NO.", False, None),
        ("Nothing", None, False),  # "no" is within the first four characters
        ("", None, None),
        (" yes ", True, True),
        ("yes, no", True, True),
    ],
)
def test_yes_or_no(answer: str, naturalbench: bool | None, mme: bool | None):
    assert first_yes_no(answer) is naturalbench
    assert mme_yes_no(answer) is mme


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B. because", "B"),
        ("The answer is B.", "B"),
        ("(B)", None),
        ("B) x", None),
        ("Z", None),
        ("", None),
    ],
)
def test_scienceqa(answer: str, letter: str | None):
    assert scienceqa_letter(answer, 3) == letter
