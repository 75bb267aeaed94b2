"""Official scores of the MLLM benchmarks, computed from raw answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.answers import (
    first_yes_no,
    mme_yes_no,
    option_letter,
    pope_yes,
    says_yes_or_no,
    scienceqa_letter,
)
from dcr_mllm.evaluation.scored import Columns, Measures, Scored, percent

Item = dict[str, Any]

POPE_CATEGORIES = ("random", "popular", "adversarial")
_OTHER = {"A": "B", "B": "A"}
# Rows of MMVP whose labels are disputed, as its authors have them; the hub copy has the other answer.
MMVP_DISPUTED = {99: "(a)", 100: "(b)", 279: "(a)", 280: "(b)"}
MME_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def score_mmvp(items: Sequence[Item], disputed: Collection[int] = MMVP_DISPUTED) -> Scored:
    """MMVP: a pair counts only if both of its questions are answered right; chance is 25 %.

    The official judge is GPT-4; a letter rule stands in. Four of the 300 labels are disputed, so that both label sets
    are scored; papers quote the original one.

    Args:
        items: `index` (1-based), `options` (words), `target` ("(a)" or "A", the original label), `answer`; two
            consecutive indices, the first of them odd, make a pair.
        disputed: Indices whose label the other label set has the other way round; none for other data than MMVP's.

    Raises:
        UserError: An item without its partner.
    """
    order = {int(item["index"]): position for position, item in enumerate(items)}
    for index in order:
        if (index + 1 if index % 2 else index - 1) not in order:
            raise UserError(f"mmvp: question {index} lacks the other one of its pair; give whole pairs")
    said = [option_letter(item["answer"], item["options"]) for item in items]
    original = [_letter_of(item["target"]) for item in items]
    other = [
        _OTHER[letter] if int(item["index"]) in disputed else letter
        for letter, item in zip(original, items, strict=True)
    ]
    label_sets = {"": original, **({"_hub_labels": other} if disputed else {})}
    odd = np.array([int(item["index"]) % 2 == 1 for item in items])
    partner = np.array(
        [order[int(item["index"]) + (1 if is_odd else -1)] for item, is_odd in zip(items, odd, strict=True)]
    )
    columns = Columns()
    columns.add("questions", np.ones(len(items)))
    columns.add("pairs", odd)
    rights = {}
    for name, labels in label_sets.items():
        right = np.array([a == b for a, b in zip(said, labels, strict=True)])
        columns.add(f"right{name}", right)
        columns.add(f"both{name}", right & right[partner] & odd)
        rights[name] = right

    def measure(sums: np.ndarray) -> Measures:
        values = {}
        for name in rights:
            values[f"pair_accuracy{name}"] = columns.ratio(sums, f"both{name}", "pairs")
            values[f"accuracy{name}"] = columns.ratio(sums, f"right{name}", "questions")
        return values

    matrix = columns.matrix()
    return Scored(
        sums=matrix,
        measure=measure,
        headline="pair_accuracy",
        clusters=[f"pair {(int(item['index']) + 1) // 2}" for item in items],
        units=columns.get(matrix, "both")[odd].astype(bool),
        unit_name="pair",
        right=rights[""],
        unparsable=[k for k, letter in enumerate(said) if letter is None],
        chance=("pair_accuracy", 25.0),
    )


def score_pope(items: Sequence[Item]) -> Scored:
    """POPE: accuracy, precision, recall, F1 and the share of predicted yes per category, and the means of the three.

    The 1,500 positive questions are the same in all categories, 18 questions share an image: resample images.

    Args:
        items: `category`, `image` (its name), `target` (yes or no), `answer`.
    """
    yes = np.array([pope_yes(item["answer"]) for item in items])
    truth = np.array([_is_yes(item["target"]) for item in items])
    found = [name for name in POPE_CATEGORIES if any(item["category"] == name for item in items)]
    unknown = sorted({str(item["category"]) for item in items} - set(found))
    if unknown:
        raise UserError(f"pope: category {unknown[0]!r} is none of {', '.join(POPE_CATEGORIES)}")
    columns = Columns()
    for name in found:
        inside = np.array([item["category"] == name for item in items])
        for outcome, chosen in (("tp", yes & truth), ("fp", yes & ~truth), ("fn", ~yes & truth), ("tn", ~yes & ~truth)):
            columns.add(f"{outcome}_{name}", inside & chosen)

    def measure(sums: np.ndarray) -> Measures:
        values: Measures = {}
        for name in found:
            tp, fp, fn, tn = (columns.get(sums, f"{outcome}_{name}") for outcome in ("tp", "fp", "fn", "tn"))
            values[f"accuracy_{name}"] = percent(tp + tn, tp + fp + fn + tn)
            values[f"precision_{name}"] = np.where(tp + fp > 0, percent(tp, np.maximum(tp + fp, 1)), 0.0)
            values[f"recall_{name}"] = np.where(tp + fn > 0, percent(tp, np.maximum(tp + fn, 1)), 0.0)
            values[f"f1_{name}"] = np.where(tp > 0, percent(2 * tp, np.maximum(2 * tp + fp + fn, 1)), 0.0)
            values[f"yes_ratio_{name}"] = percent(tp + fp, tp + fp + fn + tn)
        kinds = ("f1", "accuracy", "precision", "recall", "yes_ratio")
        means = {kind: np.mean([values[f"{kind}_{name}"] for name in found], axis=0) for kind in kinds}
        return {**means, **values}

    return Scored(
        sums=columns.matrix(),
        measure=measure,
        headline="f1",
        clusters=[str(item["image"]) for item in items],
        units=None,
        unit_name="question",
        right=yes == truth,
        unparsable=[k for k, item in enumerate(items) if not says_yes_or_no(item["answer"])],
        chance=("accuracy", 50.0),
    )


def score_cv_bench(items: Sequence[Item]) -> Scored:
    """CV-Bench: half of the mean of ADE20K and COCO (2D), half Omni3D (3D), each an accuracy.

    Args:
        items: `source`, `options`, `target` ("(A)"), `answer`, `image`.
    """
    said = [option_letter(item["answer"], item["options"]) for item in items]
    right = np.array([a == _letter_of(item["target"]) for a, item in zip(said, items, strict=True)])
    columns = Columns()
    groups = columns.add_accuracies(right, [str(item["source"]) for item in items])

    def measure(sums: np.ndarray) -> Measures:
        by = {name: columns.ratio(sums, f"right_{name}", f"all_{name}") for name in groups}
        values = {f"accuracy_{name}": value for name, value in by.items()}
        if "ADE20K" in by and "COCO" in by:
            values["accuracy_2d"] = (by["ADE20K"] + by["COCO"]) / 2
        if "Omni3D" in by:
            values["accuracy_3d"] = by["Omni3D"]
        parts = [values[name] for name in ("accuracy_2d", "accuracy_3d") if name in values] or list(by.values())
        return {"accuracy": np.mean(parts, axis=0), **values}

    return Scored(
        sums=columns.matrix(),
        measure=measure,
        headline="accuracy",
        clusters=[str(item["image"]) for item in items],
        units=None,
        unit_name="question",
        right=right,
        unparsable=[k for k, letter in enumerate(said) if letter is None],
    )


def score_naturalbench(items: Sequence[Item]) -> Scored:
    """NaturalBench: two images times two questions a group; accuracy, per question (Q), image (I) and group (G).

    Chance is 50, 25, 25 and 6.25 %.

    Args:
        items: `group`, `question` (0 or 1), `image` (0 or 1), `type` (`yes_no` or `multiple_choice`), `target`
            (Yes, No, A or B), `answer`.

    Raises:
        UserError: A group that lacks one of its four items.
    """
    right_list, unparsable = [], []
    for position, item in enumerate(items):
        if item["type"] == "yes_no":
            yes = first_yes_no(item["answer"])
            said = None if yes is None else ("Yes" if yes else "No")
        else:
            said = option_letter(item["answer"], ("", ""))
        right_list.append(said == item["target"])
        unparsable += [position] if said is None else []
    right = np.array(right_list)
    at = {(str(item["group"]), int(item["question"]), int(item["image"])): k for k, item in enumerate(items)}
    groups = list(dict.fromkeys(str(item["group"]) for item in items))
    corner = {}
    for group in groups:
        for cell in ((0, 0), (0, 1), (1, 0), (1, 1)):
            if (group, *cell) not in at:
                raise UserError(f"naturalbench: group {group} lacks question {cell[0]} on image {cell[1]}")
        corner[group] = np.array([[at[(group, q, i)] for i in (0, 1)] for q in (0, 1)])
    both = {name: np.zeros(len(items)) for name in ("Q", "I", "G", "first")}
    for group, cells in corner.items():
        grid, first = right[cells], at[(group, 0, 0)]  # [question, image]
        both["Q"][first] = grid.all(axis=1).sum()
        both["I"][first] = grid.all(axis=0).sum()
        both["G"][first] = grid.all()
        both["first"][first] = 1
    columns = Columns()
    columns.add("right", right)
    for name, values in both.items():
        columns.add(name, values)

    def measure(sums: np.ndarray) -> Measures:
        groups_in = columns.get(sums, "first")
        return {
            "G": percent(columns.get(sums, "G"), groups_in),
            "Q": percent(columns.get(sums, "Q"), 2 * groups_in),
            "I": percent(columns.get(sums, "I"), 2 * groups_in),
            "accuracy": percent(columns.get(sums, "right"), 4 * groups_in),
        }

    return Scored(
        sums=columns.matrix(),
        measure=measure,
        headline="G",
        clusters=[str(item["group"]) for item in items],
        units=np.array([right[cells].all() for cells in corner.values()]),
        unit_name="group",
        right=right,
        unparsable=unparsable,
        chance=("G", 6.25),
    )


def score_mme(items: Sequence[Item]) -> Scored:
    """MME: per category accuracy plus accuracy with both questions of an image right, summed; the sums are no percent.

    Args:
        items: `category`, `image` (two questions each), `target` (Yes or No), `answer`.
    """
    said = [mme_yes_no(item["answer"]) for item in items]
    right = np.array([a is not None and a == _is_yes(item["target"]) for a, item in zip(said, items, strict=True)])
    category = [str(item["category"]) for item in items]
    shown = [f"{name}/{item['image']}" for name, item in zip(category, items, strict=True)]
    columns = Columns()
    groups = columns.add_accuracies(right, category)
    columns.add_all_right(right, shown, "both", "images")
    for name in groups:
        inside = np.array([other == name for other in category])
        for part in ("both", "images"):
            columns.add(f"{part}_{name}", columns.column(part) * inside)

    def measure(sums: np.ndarray) -> Measures:
        score = {
            name: columns.ratio(sums, f"right_{name}", f"all_{name}")
            + columns.ratio(sums, f"both_{name}", f"images_{name}")
            for name in groups
        }
        values = {f"score_{name}": value for name, value in score.items()}
        for title, names in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION)):
            present = [score[name] for name in names if name in score]
            if present:
                values[f"sum_{title}"] = np.sum(present, axis=0)
        return values

    perception = any(name in MME_PERCEPTION for name in groups)
    return Scored(
        sums=columns.matrix(),
        measure=measure,
        headline="sum_perception" if perception else "sum_cognition",
        clusters=shown,
        units=None,
        unit_name="question",
        right=right,
        unparsable=[k for k, answer in enumerate(said) if answer is None],
    )


def score_scienceqa(items: Sequence[Item]) -> Scored:
    """ScienceQA on its image subset: accuracy by LLaVA's rule.

    Args:
        items: `options`, `target` (letter), `answer`; `image` or another name of the item.
    """
    said = [scienceqa_letter(item["answer"], len(item["options"])) for item in items]
    right = np.array([a == _letter_of(item["target"]) for a, item in zip(said, items, strict=True)])
    columns = Columns()
    columns.add_accuracies(right, ["all"] * len(items))
    return Scored(
        sums=columns.matrix(),
        measure=lambda sums: {"accuracy": columns.ratio(sums, "right_all", "all_all")},
        headline="accuracy",
        clusters=[str(k) for k in range(len(items))],
        units=right,
        unit_name="question",
        right=right,
        unparsable=[k for k, letter in enumerate(said) if letter is None],
    )


def score_hallusion_bench(items: Sequence[Item]) -> Scored:
    """HallusionBench: accuracy of all answers, of questions over all their figures, of figures over all questions.

    The official judge is GPT-4; a yes/no rule stands in ("yes" in the lower-cased answer).

    Args:
        items: `category`, `subcategory`, `set_id`, `figure_id`, `question_id`, `target` ("0" or "1"), `answer`.
    """
    yes = np.array(["yes" in item["answer"].lower() for item in items])
    right = yes == np.array([str(item["target"]) == "1" for item in items])
    columns = Columns()
    columns.add_accuracies(right, ["all"] * len(items))
    for name, key in (("question", "question_id"), ("figure", "figure_id")):
        members = [tuple(str(item[part]) for part in ("category", "subcategory", "set_id", key)) for item in items]
        columns.add_all_right(right, members, f"right_{name}", f"all_{name}")

    def measure(sums: np.ndarray) -> Measures:
        parts = (("aAcc", "all"), ("qAcc", "question"), ("fAcc", "figure"))
        return {title: columns.ratio(sums, f"right_{name}", f"all_{name}") for title, name in parts}

    return Scored(
        sums=columns.matrix(),
        measure=measure,
        headline="aAcc",
        # A set's figures and questions are tied to each other, so that it is what may be resampled.
        clusters=[f"{item['category']}/{item['subcategory']}/{item['set_id']}" for item in items],
        units=None,
        unit_name="question",
        right=right,
        unparsable=[k for k, item in enumerate(items) if not says_yes_or_no(item["answer"])],
    )


class Scorer(NamedTuple):
    """How a benchmark is scored, and what stands in for an official judge that is an API."""

    score: Callable[[Sequence[Item]], Scored]
    judge: str | None = None


SCORERS = {
    "mmvp": Scorer(score_mmvp, "letter rule in place of the GPT-4 judge"),
    "pope": Scorer(score_pope),
    "cv_bench": Scorer(score_cv_bench),
    "naturalbench": Scorer(score_naturalbench),
    "mme": Scorer(score_mme),
    "scienceqa_img": Scorer(score_scienceqa),
    "hallusion_bench_image": Scorer(score_hallusion_bench, "yes/no rule in place of the GPT-4 judge"),
}


def _letter_of(target: str) -> str:
    return target.strip().strip("().").upper()


def _is_yes(target: str) -> bool:
    return target.strip().lower() == "yes"
