"""Scores of the benchmarks, against references written from the official rules item by item, and against sklearn."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation import scorers
from dcr_mllm.evaluation.scored import Scored
from dcr_mllm.evaluation.statistics import Resampler

RNG_SEED = 3


def mmvp_items(num_pairs: int = 150) -> list[dict]:
    rng = np.random.default_rng(RNG_SEED)
    answers = ["A", "B", "(a)", "b.", "Closed", "left", "right"]
    return [
        {
            "index": index,
            "options": ["left", "right"],
            "target": "(a)" if rng.random() < 0.5 else "(b)",
            "answer": str(rng.choice(answers)),
        }
        for index in range(1, 2 * num_pairs + 1)
    ]


def test_mmvp_pairs_and_both_label_sets():
    items = mmvp_items()
    read = {"A": "a", "(a)": "a", "left": "a", "B": "b", "b.": "b", "right": "b", "Closed": None}

    def reference(flipped: set[int]) -> tuple[float, float]:
        right = []
        for item in items:
            truth = item["target"][1]
            if item["index"] in flipped:
                truth = "b" if truth == "a" else "a"
            right.append(read[item["answer"]] == truth)
        pairs = [right[k] and right[k + 1] for k in range(0, 300, 2)]
        return 100 * sum(pairs) / 150, 100 * sum(right) / 300

    scored = scorers.score_mmvp(items)
    values = scored.values()
    assert (values["pair_accuracy"], values["accuracy"]) == pytest.approx(reference(set()))
    other = reference({99, 100, 279, 280})
    assert (values["pair_accuracy_hub_labels"], values["accuracy_hub_labels"]) == pytest.approx(other)
    assert scored.units is not None and len(scored.units) == 150
    assert 100 * scored.units.mean() == pytest.approx(values["pair_accuracy"])
    assert scored.unparsable == [k for k, item in enumerate(items) if item["answer"] == "Closed"]
    assert set(scorers.score_mmvp(items, disputed=()).values()) == {"pair_accuracy", "accuracy"}


def test_mmvp_does_not_care_about_the_order_of_items():
    items = mmvp_items(20)
    shuffled = [items[k] for k in np.random.default_rng(0).permutation(40)]
    assert scorers.score_mmvp(shuffled).values() == scorers.score_mmvp(items).values()


def test_mmvp_right_twice_in_different_pairs_is_no_pair():
    items = [
        {"index": k, "options": ["x", "y"], "target": "(a)", "answer": answer}
        for k, answer in zip((1, 2, 3, 4), "BAAB", strict=True)
    ]
    assert scorers.score_mmvp(items).values()["pair_accuracy"] == 0
    with pytest.raises(UserError, match="question 3 lacks the other one"):
        scorers.score_mmvp(items[:3])


def pope_items() -> list[dict]:
    rng = np.random.default_rng(RNG_SEED)
    items = []
    for category, image, number in itertools.product(("random", "popular", "adversarial"), range(40), range(6)):
        target = "yes" if number % 2 else "no"
        answer = str(
            rng.choice(["Yes", "No", "Yes.", "no, it is not", "maybe", ""], p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
        )
        items.append({"category": category, "image": f"{image}.jpg", "target": target, "answer": answer})
    return items


def test_pope_against_sklearn():
    items = pope_items()
    scored = scorers.score_pope(items)
    values = scored.values()
    f1s = []
    for category in ("random", "popular", "adversarial"):
        inside = [item for item in items if item["category"] == category]
        truth = [item["target"] == "yes" for item in inside]
        said = [item["answer"] not in ("No", "no, it is not") for item in inside]  # empty and "maybe" are yes
        f1s.append(100 * f1_score(truth, said))
        assert values[f"accuracy_{category}"] == pytest.approx(100 * accuracy_score(truth, said))
        assert values[f"precision_{category}"] == pytest.approx(100 * precision_score(truth, said))
        assert values[f"recall_{category}"] == pytest.approx(100 * recall_score(truth, said))
        assert values[f"f1_{category}"] == pytest.approx(f1s[-1])
        assert values[f"yes_ratio_{category}"] == pytest.approx(100 * np.mean(said))
    assert values["f1"] == pytest.approx(np.mean(f1s))
    assert scored.units is None  # questions on one image are not independent
    assert scored.unparsable == [k for k, item in enumerate(items) if item["answer"] in ("maybe", "")]


def test_pope_yes_ratio_is_of_predictions():
    """lmms-eval's counts the ground truth: all-yes answers would have 50 %."""
    items = [{**item, "answer": "Yes"} for item in pope_items()]
    values = scorers.score_pope(items).values()
    assert values["yes_ratio"] == 100 and values["recall"] == 100 and values["precision"] == 50
    never = scorers.score_pope([{**item, "answer": "No"} for item in items]).values()
    assert never["f1"] == never["precision"] == never["recall"] == 0 and never["accuracy"] == 50


def test_pope_refuses_other_categories():
    with pytest.raises(UserError, match="category 'rare' is none of random"):
        scorers.score_pope([*pope_items(), {"category": "rare", "image": "1", "target": "yes", "answer": "yes"}])


def test_cv_bench_is_the_mean_of_means():
    items = []
    for source, right, count in (("ADE20K", 3, 4), ("COCO", 1, 10), ("Omni3D", 5, 8)):
        for k in range(count):
            answer = "The answer is A" if k < right else "banana"
            fields = {"source": source, "image": f"{source}{k}", "target": "(A)", "options": ["x", "y", "z"]}
            items.append({**fields, "answer": answer})
    values = scorers.score_cv_bench(items).values()
    assert values["accuracy_2d"] == pytest.approx((75 + 10) / 2)
    assert values["accuracy_3d"] == pytest.approx(62.5)
    assert values["accuracy"] == pytest.approx((42.5 + 62.5) / 2)
    assert scorers.score_cv_bench(items[:14]).values()["accuracy"] == pytest.approx(42.5)


def naturalbench_items(groups: int = 60) -> list[dict]:
    rng = np.random.default_rng(RNG_SEED)
    truth = {(0, 0): True, (0, 1): False, (1, 0): False, (1, 1): True}
    items = []
    for group in range(groups):
        kind = "yes_no" if group % 3 else "multiple_choice"
        names = ("Yes", "No") if kind == "yes_no" else ("A", "B")
        for (question, image), first in truth.items():
            said = first if rng.random() < 0.7 else not first
            answer = names[0] if said else names[1]
            answer = str(rng.choice([answer, f"It is a {answer}" if kind != "yes_no" else f"{answer}, surely", "hm"]))
            fields = {"group": group, "question": question, "image": image, "type": kind}
            items.append({**fields, "target": names[0] if first else names[1], "answer": answer})
    return items


def test_naturalbench_against_a_loop():
    items = naturalbench_items()
    counts = defaultdict(list)
    for start in range(0, len(items), 4):
        q0i0, q0i1, q1i0, q1i1 = (
            item["answer"] != "hm"
            and item["answer"].removeprefix("It is a ").removesuffix(", surely") == item["target"]
            for item in items[start : start + 4]
        )
        counts["accuracy"] += [q0i0, q0i1, q1i0, q1i1]
        counts["Q"] += [q0i0 and q0i1, q1i0 and q1i1]
        counts["I"] += [q0i0 and q1i0, q0i1 and q1i1]
        counts["G"] += [q0i0 and q0i1 and q1i0 and q1i1]
    scored = scorers.score_naturalbench(items)
    assert scored.values() == pytest.approx({name: 100 * np.mean(hits) for name, hits in counts.items()})
    assert scored.units is not None and scored.units.tolist() == counts["G"]
    assert len({round(value, 6) for value in scored.values().values()}) == 4
    with pytest.raises(UserError, match="group 59 lacks question 1 on image 1"):
        scorers.score_naturalbench(items[:-1])


def mme_items() -> list[dict]:
    rng = np.random.default_rng(RNG_SEED)
    items = []
    for category in ("existence", "OCR", "code_reasoning"):
        for image in range(20):
            for target in ("Yes", "No"):
                answer = str(rng.choice(["Yes", "No", "yes it is", "Certainly not"]))
                items.append({"category": category, "image": image, "target": target, "answer": answer})
    return items


def test_mme_against_a_loop():
    items = mme_items()
    says = {"Yes": "Yes", "No": "No", "yes it is": "Yes", "Certainly not": None}
    expected = {}
    for category in ("existence", "OCR", "code_reasoning"):
        rows = [says[item["answer"]] == item["target"] for item in items if item["category"] == category]
        both = [rows[k] and rows[k + 1] for k in range(0, len(rows), 2)]
        expected[f"score_{category}"] = 100 * np.mean(rows) + 100 * np.mean(both)
    expected["sum_perception"] = expected["score_existence"] + expected["score_OCR"]
    expected["sum_cognition"] = expected["score_code_reasoning"]
    scored = scorers.score_mme(items)
    assert scored.values() == pytest.approx(expected)
    assert scored.headline == "sum_perception"
    assert scorers.score_mme(items[80:]).headline == "sum_cognition"


def test_mme_takes_an_image_name_of_two_categories_for_two_images():
    items = [
        {"category": "count", "image": "1.jpg", "target": "Yes", "answer": "Yes"},
        {"category": "OCR", "image": "1.jpg", "target": "Yes", "answer": "No"},
    ]
    assert scorers.score_mme(items).values() == {"score_count": 200, "score_OCR": 0, "sum_perception": 200}


def test_scienceqa():
    answers = ["B", "B. x", "(B)", "The answer is B."]
    items = [{"options": ["x", "y"], "target": "B", "answer": answer} for answer in answers]
    scored = scorers.score_scienceqa(items)
    assert scored.values() == {"accuracy": 75} and scored.unparsable == [2]


def hallusion_items() -> list[dict]:
    rng = np.random.default_rng(RNG_SEED)
    keys = itertools.product(("VD", "VS"), ("illusion", "chart"), range(3), range(3), range(2))
    return [
        {
            **dict(zip(("category", "subcategory", "set_id", "figure_id", "question_id"), key, strict=True)),
            "target": str(rng.integers(2)),
            "answer": str(rng.choice(["Yes, it is", "No", "YES", "unclear"])),
        }
        for key in keys
    ]


def test_hallusion_bench_against_a_loop():
    items = hallusion_items()
    right = [("yes" in item["answer"].lower()) == (item["target"] == "1") for item in items]
    by = {"question_id": defaultdict(list), "figure_id": defaultdict(list)}
    for item, hit in zip(items, right, strict=True):
        for key, groups in by.items():
            groups[item["category"], item["subcategory"], item["set_id"], item[key]].append(hit)
    values = scorers.score_hallusion_bench(items).values()
    assert values["aAcc"] == pytest.approx(100 * np.mean(right))
    assert values["qAcc"] == pytest.approx(100 * np.mean([all(hits) for hits in by["question_id"].values()]))
    assert values["fAcc"] == pytest.approx(100 * np.mean([all(hits) for hits in by["figure_id"].values()]))
    assert len(by["question_id"]) != len(by["figure_id"])


ALL = {
    "mmvp": mmvp_items,
    "pope": pope_items,
    "naturalbench": naturalbench_items,
    "mme": mme_items,
    "hallusion_bench_image": hallusion_items,
}


@pytest.mark.parametrize("task", ALL)
def test_weighted_sums_score_a_resampled_test_set(task: str):
    """A resample of clusters, written out as items and scored afresh, has the scores that the weights give."""
    items = ALL[task]()
    scored: Scored = scorers.SCORERS[task].score(items)
    weights = Resampler(len(items), scored.clusters, num_resamples=3).weights()
    values = scored.measure(weights @ scored.sums)
    for draw, weight in enumerate(weights):
        written: list[dict] = []
        for copy in range(weight.max()):
            chosen = [item for item, times in zip(items, weight, strict=True) if times > copy]
            written += [renamed(task, item, copy) for item in chosen]
        again = scorers.SCORERS[task].score(written).values()
        for name in set(again) - {"pair_accuracy_hub_labels", "accuracy_hub_labels"}:
            assert values[name][draw] == pytest.approx(again[name]), name


def renamed(task: str, item: dict, copy: int) -> dict:
    """The same item as a part of another copy of its cluster."""
    if task == "mmvp":
        return {**item, "index": item["index"] + 1000 * copy}
    key = {"pope": "image", "naturalbench": "group", "mme": "image", "hallusion_bench_image": "set_id"}[task]
    return {**item, key: f"{item[key]}/{copy}"}


def test_scores_are_vectorised_over_resamples():
    scored = scorers.score_pope(pope_items())
    weights = Resampler(len(scored.right), scored.clusters, num_resamples=5).weights()
    assert all(value.shape == (5,) for value in scored.measure(weights @ scored.sums).values())
