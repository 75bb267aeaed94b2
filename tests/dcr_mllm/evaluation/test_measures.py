"""Feature measures against scikit-learn, plain loops and cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.neighbors import KNeighborsClassifier

from dcr_mllm.evaluation.measures import (
    cluster,
    clustering_draws,
    clustering_scores,
    clustering_summary,
    knn_correct,
    l2_normalise,
    linear_cka,
    probe_correct,
    token_drift,
    zero_shot_correct,
)


def _blobs(num_classes=4, per_class=30, width=8, spread=0.3, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(num_classes, width))
    truth = np.repeat(np.arange(num_classes), per_class)
    return centres[truth] + spread * rng.normal(size=(len(truth), width)), truth


def test_zero_shot_averages_templates_and_ignores_image_length():
    prompts = l2_normalise(np.array([[[1.0, 0.0], [1.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]]))
    images = np.array([[100.0, 1.0], [0.1, 5.0], [0.01, 0.05]])
    assert zero_shot_correct(images, prompts, np.array([0, 1, 0])).tolist() == [True, True, False]
    # 45 degrees lies nearer to the first class's mean (22.5) than to the second's (90).
    assert zero_shot_correct(np.array([[1.0, 1.0]]), prompts, np.array([0])).all()


def test_knn_against_scikit_learn():
    train, train_truth = _blobs(spread=1.5, seed=1)
    test, test_truth = _blobs(spread=1.5, seed=2)
    judge = KNeighborsClassifier(n_neighbors=7).fit(l2_normalise(train), train_truth)
    votes = np.sort(judge.predict_proba(l2_normalise(test)), axis=1)
    untied = votes[:, -1] > votes[:, -2]  # ties are broken differently
    expected = judge.predict(l2_normalise(test)) == test_truth
    found = knn_correct(train, train_truth, test, test_truth, num_neighbours=7, chunk=13)
    assert untied.sum() > 80 and 0.3 < expected.mean() < 1
    assert (found[untied] == expected[untied]).all()


def test_knn_ties_go_to_the_nearer_class_and_k_is_capped():
    train = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = knn_correct(train, np.array([0, 1]), np.array([[0.2, 1.0], [1.0, 0.2]]), np.array([1, 0]))
    assert found.all()


def test_probe_finds_a_linear_attribute_and_no_other():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(300, 10)), rng.normal(size=(200, 10))
    for scale in (1.0, 1e-3):  # standardised, so scale does not matter
        correct = probe_correct(scale * train, train[:, 0] > 0, scale * test, test[:, 0] > 0)
        assert correct.mean() > 0.9
    noise = probe_correct(train, rng.integers(2, size=300), test, rng.integers(2, size=200))
    assert noise.mean() == pytest.approx(0.5, abs=0.12)
    values = np.array(["a"] * 300)
    assert probe_correct(train, values, test, np.array(["a", "b"] * 100)).mean() == 0.5


def test_clustering_of_a_permuted_perfect_labelling_is_perfect():
    truth = np.repeat(np.arange(5), 7)
    scores = clustering_scores(truth, np.array([3, 0, 4, 1, 2])[truth])
    assert scores == pytest.approx({"nmi": 1.0, "acc": 1.0, "ari": 1.0})


def test_clustering_scores_against_scikit_learn_and_by_hand():
    rng = np.random.default_rng(4)
    truth, clusters = rng.integers(6, size=200), rng.integers(5, size=200)
    clusters[:100] = truth[:100] % 5
    scores = clustering_scores(truth, clusters)
    assert scores["nmi"] == pytest.approx(normalized_mutual_info_score(truth, clusters))
    assert scores["ari"] == pytest.approx(adjusted_rand_score(truth, clusters))
    by_hand = clustering_scores(np.array([0, 0, 0, 1, 1, 2]), np.array([1, 1, 0, 0, 0, 0]))
    assert by_hand["acc"] == pytest.approx(4 / 6)  # cluster 1 -> class 0 (2 right), cluster 0 -> class 1 (2 right)


def test_clustering_weights_equal_repeated_items():
    rng = np.random.default_rng(6)
    truth, clusters, counts = rng.integers(4, size=60), rng.integers(4, size=60), rng.integers(4, size=60)
    weighted = clustering_scores(truth, clusters, counts.astype(float))
    assert weighted == pytest.approx(clustering_scores(np.repeat(truth, counts), np.repeat(clusters, counts)))
    draws = clustering_draws(truth, clusters[None], np.stack([counts, np.ones(60)]))
    assert draws["nmi"] == pytest.approx([weighted["nmi"], clustering_scores(truth, clusters)["nmi"]])


def test_cluster_finds_blobs_and_is_repeatable():
    features, truth = _blobs(spread=0.05)
    runs = cluster(100 * features, 4, seeds=[0, 1])
    assert runs.shape == (2, len(truth))
    assert (runs == cluster(features, 4, seeds=[0, 1])).all()  # length does not matter
    summary = clustering_summary(truth, runs)
    assert summary["acc"]["mean"] == pytest.approx(1.0) and summary["acc"]["std"] == 0.0
    assert len(summary["nmi"]["values"]) == 2


def test_drift_of_a_tower_against_itself_is_none():
    tokens = np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)
    drift = token_drift(tokens, tokens)
    assert drift == pytest.approx({"cosine": 1.0, "relative_l2": 0.0, "cka": 1.0}, abs=1e-6)


def test_drift_of_a_rotation_keeps_cka_and_loses_cosine():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(400, 12))
    rotation = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    drift = token_drift(tokens, 3 * tokens @ rotation + 0.5)
    assert drift["cka"] == pytest.approx(1.0)
    assert drift["cosine"] is not None and drift["cosine"] < 0.7


def test_cka_against_the_kernel_form_and_without_variation():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(40, 5)), rng.normal(size=(40, 9))
    centring = np.eye(40) - 1 / 40
    kernels = [centring @ values @ values.T @ centring for values in (first, second)]
    expected = np.trace(kernels[0] @ kernels[1]) / (np.linalg.norm(kernels[0]) * np.linalg.norm(kernels[1]))
    assert linear_cka(first, second) == pytest.approx(expected)
    assert token_drift(np.ones((6, 3), np.float32), np.ones((6, 3), np.float32))["cka"] is None
