"""Verdicts on two models: tests against scipy and resamples written out, words against their rules."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from scipy.stats import t as student

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.scored import Scored
from dcr_mllm.evaluation.scorers import score_mme, score_mmvp, score_pope
from dcr_mllm.evaluation.statistics import Resampler
from dcr_mllm.evaluation.verdicts import add_verdicts, compare_task


def mmvp(right: list[bool]) -> list[dict]:
    return [
        {"index": k, "options": ["x", "y"], "target": "(a)", "answer": "A" if hit else "B"}
        for k, hit in enumerate(right, start=1)
    ]


def pope(share_right: float, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    items = []
    for category in ("random", "popular", "adversarial"):
        for k in range(240):
            truth = bool(k % 2)
            said = truth if rng.random() < share_right else not truth
            names = ("no", "yes")
            items.append({"category": category, "image": k // 6, "target": names[truth], "answer": names[said].title()})
    return items


def test_mmvp_is_tested_on_pairs():
    rng = np.random.default_rng(0)
    base, model = (score_mmvp(mmvp(list(rng.random(300) < share)), ()) for share in (0.5, 0.7))
    entry = compare_task([base], [model])
    assert base.units is not None and model.units is not None
    gained, lost = int((model.units & ~base.units).sum()), int((base.units & ~model.units).sum())
    assert (entry["gained"], entry["lost"]) == (gained, lost) and gained > lost > 5
    assert entry["p_value"] == pytest.approx(binomtest(gained, gained + lost).pvalue)
    assert entry["test"] == "exact McNemar on 150 pairs"
    measure = entry["measures"]["pair_accuracy"]
    assert measure["difference"] == pytest.approx(100 * (gained - lost) / 150)
    deltas = model.units.astype(float) - base.units
    # The interval of a mean of independent differences: a normal one is close.
    half = 1.96 * 100 * deltas.std() / np.sqrt(150)
    assert measure["interval"] == pytest.approx([measure["difference"] - half, measure["difference"] + half], abs=1.5)


def test_pope_is_resampled_by_image():
    base_items, model_items = pope(0.75, 1), pope(0.85, 2)
    base, model = score_pope(base_items), score_pope(model_items)
    entry = compare_task([base], [model])
    # The same resamples of images, written out as items and scored afresh.
    weights = Resampler(len(base_items), [str(item["image"]) for item in base_items], num_resamples=40).weights()
    written = []
    for weight in weights:
        values = [
            score_pope([item for item, times in zip(items, weight, strict=True) for _ in range(times)]).values()["f1"]
            for items in (base_items, model_items)
        ]
        written.append(values[1] - values[0])
    spread = np.std(written)
    low, high = entry["measures"]["f1"]["interval"]
    assert low < entry["measures"]["f1"]["difference"] < high
    assert (high - low) / 3.92 == pytest.approx(spread, rel=0.35)
    assert entry["minimum_detectable_effect"] == pytest.approx(2.8 * (high - low) / 3.92, rel=0.15)
    assert entry["p_value"] < 0.01 and entry["test"] == "paired bootstrap over 40 images or groups"


def test_questions_on_one_image_count_once():
    """Where a model gets all questions of an image right or none, the interval is that of 40 images, not of answers."""
    rng = np.random.default_rng(0)
    by_image = rng.random(40) < 0.5
    base_items = pope(0.75, 1)
    model_items = []
    for item in base_items:
        right = by_image[item["image"]]
        answer = item["target"] if right else {"yes": "no", "no": "yes"}[item["target"]]
        model_items.append({**item, "answer": answer.title()})
    base, model = score_pope(base_items), score_pope(model_items)
    low, high = compare_task([base], [model])["measures"]["accuracy"]["interval"]
    per_image = [
        np.mean([model.right[k] - float(base.right[k]) for k, item in enumerate(base_items) if item["image"] == image])
        for image in range(40)
    ]
    assert (high - low) / 3.92 == pytest.approx(100 * np.std(per_image) / np.sqrt(40), rel=0.15)


def test_bootstrap_p_values_are_uniform_where_nothing_differs():
    values = [
        compare_task([score_pope(pope(0.8, 2 * k))], [score_pope(pope(0.8, 2 * k + 1))])["p_value"] for k in range(60)
    ]
    assert np.mean(np.array(values) < 0.2) == pytest.approx(0.2, abs=0.16)
    assert 0.3 < np.mean(values) < 0.7


def test_a_model_against_itself():
    scored = score_pope(pope(0.8, 0))
    entry = {"pope": compare_task([scored], [scored])}
    add_verdicts(entry)
    assert entry["pope"]["p_value"] == 1 and entry["pope"]["verdict"].startswith("no difference detected")


@pytest.mark.parametrize(("shares", "guessing"), [((0.5, 0.5), True), ((0.5, 0.9), False), ((0.9, 0.9), False)])
def test_guessing_is_called_guessing(shares: tuple[float, float], guessing: bool):
    base, model = (score_pope(pope(share, seed)) for seed, share in enumerate(shares))
    assert (compare_task([base], [model])["caution"] is not None) == guessing
    rng = np.random.default_rng(0)
    base, model = (score_mmvp(mmvp(list(rng.random(300) < share)), ()) for share in shares)
    caution = compare_task([base], [model])["caution"]
    assert caution == ("neither model is told from guessing here (pair accuracy 25 by chance)" if guessing else None)


def test_words_follow_holm():
    def entry(p: float, difference: float, smallest: float | None) -> dict:
        return {
            "headline": "m",
            "p_value": p,
            "minimum_detectable_effect": smallest,
            "measures": {"m": {"difference": difference}},
        }

    tasks = {"a": entry(0.01, 3, 2.0), "b": entry(0.02, -3, 2.0), "c": entry(0.03, 1, 4.25), "d": entry(0.9, 0, None)}
    add_verdicts(tasks)
    assert [tasks[name]["p_holm"] for name in "abcd"] == pytest.approx([0.04, 0.06, 0.06, 0.9])
    assert tasks["a"]["verdict"] == "better"
    assert tasks["b"]["verdict"] == "no difference detected (a gain under 2.0 points could not have been seen)"
    assert tasks["c"]["verdict"] == "no difference detected (a gain under 4.2 points could not have been seen)"
    assert tasks["d"]["verdict"] == "no difference detected (too few units for any to be seen)"
    worse = {"b": entry(0.02, -3, 2.0)}
    add_verdicts(worse)
    assert worse["b"]["verdict"] == "worse"


def test_different_questions_are_refused():
    with pytest.raises(UserError, match="did not answer the same questions"):
        compare_task([score_pope(pope(0.8, 0))], [score_pope(pope(0.8, 0)[:-6])])


def test_variance_of_training_against_a_written_out_t_test():
    """Items: a bootstrap over images written out; runs: the pooled variance of their scores."""
    base = [score_pope(pope(share, seed)) for share, seed in ((0.6, 1), (0.7, 2), (0.8, 3))]
    model = [score_pope(pope(share, seed)) for share, seed in ((0.75, 4), (0.95, 5))]
    entry = compare_task(base, model)
    accuracy = entry["measures"]["accuracy"]
    scores = [[scored.values()["accuracy"] for scored in runs] for runs in (base, model)]
    assert accuracy["difference"] == pytest.approx(np.mean(scores[1]) - np.mean(scores[0]))
    rng, draws = np.random.default_rng(7), []
    clusters = np.array(base[0].clusters)
    members = {name: np.flatnonzero(clusters == name) for name in np.unique(clusters)}
    for _ in range(800):
        chosen = np.concatenate([members[name] for name in rng.choice(list(members), len(members))])
        sides = [
            np.mean([scored.measure(scored.sums[chosen].sum(axis=0))["accuracy"] for scored in runs])
            for runs in (base, model)
        ]
        draws.append(sides[1] - sides[0])
    pooled = (2 * np.var(scores[0], ddof=1) + np.var(scores[1], ddof=1)) / 3 * (1 / 3 + 1 / 2)
    items = np.var(draws)
    freedom = (items + pooled) ** 2 / (items**2 / (len(members) - 1) + pooled**2 / 3)
    half = student.ppf(0.975, freedom) * np.sqrt(items + pooled)
    middle = accuracy["difference"]
    assert accuracy["interval"] == pytest.approx([middle - half, middle + half], abs=0.03 * half)
    one = compare_task(base[:1], model[:1])["measures"]["accuracy"]["interval"]
    assert 2 * half > 1.5 * (one[1] - one[0])
    assert entry["test"].startswith("t test over training runs") and "over 3 and 2 runs" in entry["training"]
    assert compare_task(base[:1], model[:1])["training"].startswith(
        "one training run each: training variance not measured, so verdicts speak of these two models"
    )
    assert "runs of one side" in compare_task(base[:1], model)["training"]


@pytest.mark.parametrize(("num_base", "num_model"), [(1, 3), (2, 2), (3, 3)])
def test_luck_of_training_is_no_difference(num_base: int, num_model: int):
    """Runs that differ by training alone are told apart about once in twenty times, however few there are."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=150)

    def run() -> Scored:
        right = rng.random(300) < 1 / (1 + np.exp(-(np.repeat(truth, 2) + rng.normal(0, 0.4))))
        return score_mmvp(mmvp(list(right)), ())

    p_values = [
        compare_task([run() for _ in range(num_base)], [run() for _ in range(num_model)])["p_value"] for _ in range(60)
    ]
    assert np.mean(np.array(p_values) < 0.05) <= 0.1


def test_nothing_that_varies_hides_no_gain():
    """Identical answers: no gain was out of sight, and resamples without a category do not count."""
    same = score_pope(pope(1.0, 0))
    comparison = {"pope": compare_task([same], [same])}
    add_verdicts(comparison)
    assert comparison["pope"]["verdict"] == "no difference detected (too few units for any to be seen)"
    assert comparison["pope"]["minimum_detectable_effect"] is None
    items = [
        {"category": category, "image": f"{k}", "target": "Yes", "answer": answer}
        for k, (category, answer) in enumerate([("count", "yes"), ("count", "no"), ("scene", "yes")])
    ]
    entry = compare_task([score_mme(items)], [score_mme([{**item, "answer": "yes"} for item in items])])
    assert all(np.isfinite(value) for measure in entry["measures"].values() for value in measure["interval"])
    assert 0 < entry["p_value"] <= 1 and np.isfinite(entry["minimum_detectable_effect"])


def test_runs_of_pairs_are_tested_by_the_bootstrap():
    """McNemar's test knows one run a side; with several, the difference and its test are over runs."""
    items = [
        [
            {
                "index": k,
                "options": ["x", "y"],
                "target": "(a)",
                "answer": "A" if (k * 7 + run) % 5 < 2 + run % 2 else "B",
            }
            for k in range(1, 81)
        ]
        for run in range(4)
    ]
    base, model = [[score_mmvp(items[k], ()) for k in chosen] for chosen in ((0, 2), (1, 3))]
    entry = compare_task(base, model)
    assert entry["test"] == "t test over training runs and a bootstrap over 40 images or groups"
    assert 0 < entry["p_value"] <= 1 and entry["gained"] + entry["lost"] > 0
