"""What a model's answer says: a letter, or yes or no, by the rules of the benchmarks' authors.

An answer that says neither is `None`: it counts as wrong, or as its benchmark's own rule has it, and is reported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_WHOLE = re.compile(r"\(?([A-Za-z])\)?[.:)]?")
_LEADING = re.compile(r"(?:\(([A-Za-z])\)|([A-Z])[.):])(?:\s|$)")
_STATED = re.compile(r"\b(?i:answer|option|choice)(?i:\s+is|\s*:)?\s+(?:\(([A-Za-z])\)|([A-Z])\b(?!['\w]))")
_BRACKETED = re.compile(r"\(([A-Za-z])\)")
_CAPITAL = re.compile(r"(?<![\w'])([B-Z])(?![\w'])")
_CAPITAL_A = re.compile(r"(?<![\w'])(A)(?=\W*$| or | and )")


def option_letter(answer: str, options: Sequence[str]) -> str | None:
    """The option that an answer to a multiple-choice question chooses.

    Where the official judge is a model (MMVP) or the official rule reads the article "a" as an option (NaturalBench,
    lmms-eval's MMVP), this deterministic rule stands in: the whole answer is a letter; it begins with one ("B. left",
    "(b) left"); it states one ("The answer is B"); it brackets one; it is an option's words; a single capital among
    the letters stands in it alone, "A" only where it can be no article. Two letters, and a word that merely ends in
    one, are none.

    Args:
        answer: As generated.
        options: Words of the options, A first.

    Returns:
        An upper-case letter of one of the options, or None.
    """
    letters = [chr(ord("A") + index) for index in range(len(options))]
    text = answer.strip()
    bracketed = {found.upper() for found in _BRACKETED.findall(text)} & set(letters)
    if len(bracketed) > 1:
        return None
    for match in (_WHOLE.fullmatch(text), _LEADING.match(text), _STATED.search(text)):
        if match:
            found = next(group for group in match.groups() if group).upper()
            return found if found in letters else None
    if bracketed:
        return bracketed.pop()
    words = _words(text)
    same = [letter for letter, option in zip(letters, options, strict=True) if _words(option) == words]
    if words and len(same) == 1:
        return same[0]
    alone = {*_CAPITAL.findall(text), *_CAPITAL_A.findall(text)} & set(letters)
    return alone.pop() if len(alone) == 1 else None


def pope_yes(answer: str) -> bool:
    """POPE's rule (RUCAIBox/POPE, evaluate.py): `no` if the first sentence has a No, not or no, else yes.

    By it "NO" and an empty answer are yes; `says_yes_or_no` tells which answers said neither.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def says_yes_or_no(answer: str) -> bool:
    """Whether yes, no or not is among the words of an answer."""
    return bool({"yes", "no", "not"} & set(re.findall(r"[a-z]+", answer.lower())))


def first_yes_no(answer: str) -> bool | None:
    """NaturalBench's rule: the earlier of the words yes and no, in any case."""
    match = re.search(r"\b(yes|no)\b", answer, re.IGNORECASE)
    return None if match is None else match[1].lower() == "yes"


def mme_yes_no(answer: str) -> bool | None:
    """MME's rule (its eval_tool): the whole answer in lower case, else yes or no within its first four characters."""
    text = answer.strip().lower()
    start = text if text in ("yes", "no") else text[:4]
    return True if "yes" in start else False if "no" in start else None


def scienceqa_letter(answer: str, num_options: int) -> str | None:
    """ScienceQA's rule in LLaVA (eval_science_qa.py): the letter, "B. ...", or one "The answer is B."."""
    letters = [chr(ord("A") + index) for index in range(num_options)]
    text = answer.strip()
    if text in letters:
        return text
    if len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
        return text[0]
    stated = re.findall(r"The answer is ([A-Z]).", text)
    return stated[0] if len(stated) == 1 and stated[0] in letters else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
