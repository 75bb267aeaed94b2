"""Scores of tower benchmarks against scikit-learn and against resamples that are written out item by item."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from sklearn import metrics

from dcr_mllm.evaluation.mmvp_vlm import PATTERNS, Pair, summarise
from dcr_mllm.evaluation.statistics import Resampler
from dcr_mllm.evaluation.tower_scorers import (
    score_clustering,
    score_linear_probe,
    score_mmvp_vlm,
    score_retrieval,
    score_zero_shot,
)
from dcr_mllm.evaluation.verdicts import compare_task


def everything(count: int) -> np.ndarray:
    return np.ones(count, dtype=bool)


def make_pairs(sizes: dict[str, int]) -> list[Pair]:
    files = (Path("a.jpg"), Path("b.jpg"))
    return [
        Pair(pattern=pattern, images=files, statements=("x", "y"))
        for pattern, count in sizes.items()
        for _ in range(count)
    ]


def test_mmvp_vlm_is_the_published_mean_over_patterns():
    pairs = make_pairs({PATTERNS[3]: 4, PATTERNS[0]: 12, PATTERNS[8]: 7})
    correct = np.random.default_rng(0).random(len(pairs)) < 0.4
    scored = score_mmvp_vlm(pairs, correct, everything(len(pairs)))
    expected, values = summarise(pairs, correct), scored.values()
    assert values.pop("pair_accuracy") == pytest.approx(expected["average"])
    assert values[f"accuracy_{PATTERNS[0]}"] == expected["per_pattern"][PATTERNS[0]]["accuracy"]
    assert list(values) == [f"accuracy_{name}" for name in (PATTERNS[0], PATTERNS[3], PATTERNS[8])]
    assert (scored.units == correct).all() and scored.chance == ("pair_accuracy", 25.0)


def test_a_resample_without_a_pattern_is_the_mean_of_the_others():
    pairs = make_pairs({PATTERNS[0]: 2, PATTERNS[1]: 1})
    scored = score_mmvp_vlm(pairs, np.array([True, False, False]), everything(3))
    drawn = scored.resample(np.array([[2, 1, 0], [0, 0, 3]]))
    assert drawn["pair_accuracy"] == pytest.approx([200 / 3, 0])
    assert np.isnan(drawn[f"accuracy_{PATTERNS[1]}"][0])


def test_unreadable_pairs_are_wrong():
    scored = score_mmvp_vlm(make_pairs({PATTERNS[0]: 2}), everything(2), np.array([True, False]))
    assert scored.values()["pair_accuracy"] == 50 and not scored.right[1]


@pytest.fixture(scope="module")
def similar() -> tuple[np.ndarray, np.ndarray]:
    """Similarities [200, 8] that mostly prefer the right one of 8 unequally frequent classes."""
    rng = np.random.default_rng(1)
    truth = np.minimum(rng.geometric(0.3, 200) - 1, 7)
    similarities = rng.normal(size=(200, 8))
    similarities[np.arange(200), truth] += 1.0
    return similarities, truth


def test_zero_shot_against_sklearn(similar):
    similarities, truth = similar
    guess = similarities.argmax(axis=1)
    assert score_zero_shot(similarities, truth, everything(200)).values() == pytest.approx(
        {
            "accuracy": 100 * metrics.accuracy_score(truth, guess),
            "accuracy_top5": 100 * metrics.top_k_accuracy_score(truth, similarities, k=5),
            "mean_class_recall": 100 * metrics.balanced_accuracy_score(truth, guess),
        }
    )


def test_zero_shot_resamples_are_those_of_the_items(similar):
    similarities, truth = similar
    scored = score_zero_shot(similarities, truth, everything(200))
    weights = Resampler(200, num_resamples=5).weights()
    drawn = scored.resample(weights.astype(np.float32))
    for row, weight in enumerate(weights):
        index = np.repeat(np.arange(200), weight)
        again = score_zero_shot(similarities[index], truth[index], everything(200)).values()
        assert again == pytest.approx({name: values[row] for name, values in drawn.items()})


def test_zero_shot_of_unreadable_images_and_few_classes(similar):
    similarities, truth = similar
    values = score_zero_shot(similarities, truth, np.zeros(200, dtype=bool)).values()
    assert set(values.values()) == {0.0} and len(values) == 3
    few = score_zero_shot(similarities[:, :5], np.minimum(truth, 4), everything(200))
    assert "accuracy_top5" not in few.values()  # any five of five are right
    assert few.chance == ("accuracy", 20)


def test_linear_probe_leaves_out_where_a_label_does_not_apply():
    correct = {
        "class": np.array([1.0, 0, 1, 1]),
        "colour": np.array([1.0, np.nan, 0, np.nan]),
        "size": np.array([1.0, 1, 1, 1]),
    }
    values = score_linear_probe(correct, np.array([True, True, True, False])).values()
    assert values == {"accuracy": 50, "accuracy_attributes": 62.5, "accuracy_colour": 50, "accuracy_size": 75}
    assert score_linear_probe({"class": correct["class"]}, everything(4)).values() == {"accuracy": 75}


def clusterings(seed: int, num_items: int = 120) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = np.arange(num_items) % 6
    noise = rng.integers(6, size=(3, num_items))
    return truth, np.where(rng.random((3, num_items)) < 0.3, noise, (truth + np.arange(3)[:, None]) % 6)


def by_sklearn(truth: np.ndarray, assignments: np.ndarray) -> dict[str, float]:
    scores = []
    for clusters in assignments:
        table = metrics.cluster.contingency_matrix(truth, clusters)
        rows, columns = linear_sum_assignment(-table)
        nmi = metrics.normalized_mutual_info_score(truth, clusters)
        scores.append((nmi, table[rows, columns].sum() / len(truth), metrics.adjusted_rand_score(truth, clusters)))
    return dict(zip(("nmi", "acc", "ari"), 100 * np.mean(scores, axis=0), strict=True))


def test_clustering_against_sklearn():
    truth, assignments = clusterings(0)
    scored = score_clustering(truth, assignments)
    assert scored.values() == pytest.approx(by_sklearn(truth, assignments))
    weights = Resampler(120, num_resamples=4).weights()
    drawn = scored.resample(weights)
    for row, weight in enumerate(weights):
        index = np.repeat(np.arange(120), weight)
        expected = by_sklearn(truth[index], assignments[:, index])
        assert {name: values[row] for name, values in drawn.items()} == pytest.approx(expected)


def test_images_count_as_right_where_most_seeds_put_them_to_their_class():
    truth = np.array([0, 0, 0, 1, 1, 1])
    assignments = np.array([[0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 1]])
    assert list(score_clustering(truth, assignments[::-1]).right) == [True, True, True, True, True, True]
    assert score_clustering(np.array([0, 1, 2, 2]), np.array([[1, 2, 0, 0]])).right.all()
    assert list(score_clustering(truth, assignments[1:2]).right) == [True, True, False, True, True, True]


def test_clusterings_are_compared_on_the_same_resamples():
    truth, better = clusterings(0)
    _, worse = clusterings(1)
    worse[:, :60] = worse[:, 59::-1]
    base, model = score_clustering(truth, worse), score_clustering(truth, better)
    entry = compare_task([base], [model])
    assert entry["headline"] == "nmi" and entry["p_value"] < 0.01
    same = compare_task([base], [base])
    assert same["measures"]["ari"]["interval"] == [0, 0] and same["p_value"] == 1.0
    expected = by_sklearn(truth, better)["acc"] - by_sklearn(truth, worse)["acc"]
    assert entry["measures"]["acc"]["difference"] == pytest.approx(expected)
    low, high = entry["measures"]["acc"]["interval"]
    assert low < expected < high


def test_a_thousand_classes_take_fewer_resamples():
    truth = np.arange(300)
    scored = score_clustering(truth, truth[None])
    assert scored.resample(np.ones((310, 300)))["nmi"].shape == (300,)


def retrieval_by_sorting(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    cosines = metrics.pairwise.cosine_similarity(images, texts)
    values = {}
    for k in (1, 5, 10):
        found = [owner[np.argsort(-row)[:k]] for row in cosines]
        to_text = [image in hits for image, hits in enumerate(found)]
        to_image = [owner[text] in np.argsort(-row)[:k] for text, row in enumerate(cosines.T)]
        values[f"image_to_text_recall@{k}"] = 100 * np.mean(to_text)
        values[f"text_to_image_recall@{k}"] = 100 * np.mean(to_image)
    both = values["image_to_text_recall@1"] + values["text_to_image_recall@1"]
    return {"mean_recall@1": both / 2, **values}


@pytest.fixture(scope="module")
def captioned() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(40), rng.integers(1, 6, size=40))
    images = rng.normal(size=(40, 12)) * rng.uniform(1, 9, size=(40, 1))
    return images, images[owner] / 5 + rng.normal(size=(len(owner), 12)), owner


def test_retrieval_against_sorting(captioned):
    images, texts, owner = captioned
    scored = score_retrieval(images, texts, owner, everything(40))
    expected = retrieval_by_sorting(images, texts, owner)
    assert scored.values() == pytest.approx(expected)
    assert 20 < expected["mean_recall@1"] < 80 and scored.units is None and len(scored.clusters) == 40


def test_retrieval_resamples_images_with_all_their_captions(captioned):
    images, texts, owner = captioned
    scored = score_retrieval(images, texts, owner, everything(40))
    weights = np.zeros((1, 40))
    weights[0, [3, 7]] = 2, 1
    cosines = metrics.pairwise.cosine_similarity(texts, images)
    hits = cosines.argmax(axis=1) == owner
    counted = [*hits[owner == 3], *hits[owner == 3], *hits[owner == 7]]
    assert scored.resample(weights)["text_to_image_recall@1"] == pytest.approx([100 * np.mean(counted)])


def test_embeddings_without_content_retrieve_nothing():
    scored = score_retrieval(np.ones((20, 4)), np.ones((20, 4)), np.arange(20), everything(20))
    assert set(scored.values().values()) == {0.0}


def test_unreadable_images_are_not_found_and_hide_no_other(captioned):
    images, texts, owner = captioned
    readable = everything(40)
    readable[5] = False
    scored = score_retrieval(images, texts, owner, readable)
    kept, kept_texts = np.delete(images, 5, axis=0), owner != 5
    # Captions of image 5 still are candidates for the others.
    cosines = metrics.pairwise.cosine_similarity(texts[kept_texts], kept)
    renumbered = owner[kept_texts] - (owner[kept_texts] > 5)
    hits = (cosines.argmax(axis=1) == renumbered).sum()
    values = scored.values()
    assert values["text_to_image_recall@1"] == pytest.approx(100 * hits / len(owner))
    assert not scored.right[5]
    everywhere = score_retrieval(images[:3], texts[:3] * 0 + images[:3], np.arange(3), np.array([True, False, True]))
    assert everywhere.values()["image_to_text_recall@10"] == pytest.approx(200 / 3)
    assert everywhere.values()["text_to_image_recall@10"] == pytest.approx(200 / 3)
