"""What a tower's features are good for: zero-shot, k-NN, linear probes, clustering, and how far they drifted.

All functions take and return NumPy arrays and know nothing of models or files.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from scipy.optimize import linear_sum_assignment

from dcr_mllm.evaluation.statistics import mean_and_std

_SMALL = 4_000_000
CLUSTER_SCORES = ("nmi", "acc", "ari")


def _threads(features: np.ndarray) -> AbstractContextManager:
    """One thread for small problems: waiting for the others at each tiny step costs far more than they help."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1) if features.size < _SMALL else nullcontext()


def l2_normalise(features: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1."""
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def zero_shot_scores(images: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Similarity of images and classes.

    Args:
        images: [N, D] image embeddings.
        prompts: [K, T, D] normalised text embeddings of K classes in T templates; a class is the mean of its templates.

    Returns:
        [N, K], comparable within an image only.
    """
    classes = l2_normalise(prompts.mean(axis=1))
    # The scale of the images does not change which class wins, so they need no normalisation.
    return images @ classes.T


def zero_shot_correct(images: np.ndarray, prompts: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[N] whether the nearest class is the right one; `truth` [N] are class indices, see `zero_shot_scores`."""
    return zero_shot_scores(images, prompts).argmax(axis=1) == truth


def knn_correct(
    train: np.ndarray,
    train_truth: np.ndarray,
    test: np.ndarray,
    test_truth: np.ndarray,
    num_neighbours: int = 20,
    chunk: int = 1024,
) -> np.ndarray:
    """Whether the majority of the nearest training images by cosine has the right class.

    Args:
        train, test: [M, D] and [N, D] features.
        train_truth, test_truth: [M] and [N] class indices.
        num_neighbours: k; a tie of votes goes to the class with the larger sum of cosines.

    Returns:
        [N] bool.
    """
    num_neighbours = min(num_neighbours, len(train))
    train, test = l2_normalise(train), l2_normalise(test)
    num_classes = int(max(train_truth.max(), test_truth.max())) + 1
    guesses = []
    for start in range(0, len(test), chunk):
        cosines = test[start : start + chunk] @ train.T
        nearest = np.argpartition(-cosines, num_neighbours - 1, axis=1)[:, :num_neighbours]
        rows = np.arange(len(cosines))[:, None]
        votes = np.zeros((len(cosines), num_classes))
        # Cosines are at most 1, so divided by 4k they only ever break ties between whole votes.
        np.add.at(votes, (rows, train_truth[nearest]), 1 + cosines[rows, nearest] / (4 * num_neighbours))
        guesses.append(votes.argmax(axis=1))
    return np.concatenate(guesses) == test_truth


def probe_correct(
    train: np.ndarray,
    train_truth: np.ndarray,
    test: np.ndarray,
    test_truth: np.ndarray,
    strength: float = 0.1,
    max_iterations: int = 100,
) -> np.ndarray:
    """Whether a logistic regression on standardised features names the right value.

    Args:
        strength: Inverse of the L2 penalty (`C` of scikit-learn).
        max_iterations: Of L-BFGS; a probe that has not settled by then is the same for every tower.

    Returns:
        [N] bool.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(train_truth)) < 2:
        return test_truth == train_truth[0]
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(C=strength, max_iter=max_iterations, tol=1e-3)
    with warnings.catch_warnings(), _threads(train):
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(scaler.transform(train), train_truth).predict(scaler.transform(test)) == test_truth


def cluster(features: np.ndarray, num_clusters: int, seeds: Sequence[int], num_starts: int = 4) -> np.ndarray:
    """k-means on L2-normalised features.

    Args:
        features: [N, D].
        seeds: S random states.
        num_starts: Starts per seed, of which the tightest is kept.

    Returns:
        [S, N] cluster of each image.
    """
    from sklearn.cluster import KMeans

    normalised = l2_normalise(features)
    with _threads(features):
        runs = [KMeans(num_clusters, n_init=num_starts, random_state=seed).fit(normalised) for seed in seeds]
    return np.stack([run.labels_ for run in runs])


def best_matches(truth: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """[N] whether each item is in the cluster that the best one-to-one assignment gives to its class."""
    table = np.zeros((int(truth.max()) + 1, int(clusters.max()) + 1))
    np.add.at(table, (truth, clusters), 1)
    cluster_of = np.full(len(table), -1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    cluster_of[rows] = columns
    return cluster_of[truth] == clusters


def clustering_scores(truth: np.ndarray, clusters: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
    """NMI (arithmetic mean), accuracy under the best one-to-one assignment, and adjusted Rand index.

    Computed from the contingency table, so that bootstrap weights cost next to nothing; the unweighted values equal
    scikit-learn's.

    Args:
        truth, clusters: [N] non-negative integers.
        weights: [N] how often each item counts; None = once.
    """
    shape = (int(truth.max()) + 1, int(clusters.max()) + 1)
    table = np.bincount(truth * shape[1] + clusters, weights=weights, minlength=shape[0] * shape[1]).reshape(shape)
    total, rows, columns = table.sum(), table.sum(axis=1), table.sum(axis=0)

    def entropy(counts: np.ndarray) -> float:
        shares = counts[counts > 0] / total
        return float(-(shares * np.log(shares)).sum())

    row_entropy, column_entropy = entropy(rows), entropy(columns)
    information = row_entropy + column_entropy - entropy(table)
    mean_entropy = (row_entropy + column_entropy) / 2
    best_rows, best_columns = linear_sum_assignment(table, maximize=True)

    def num_pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1)).sum() / 2)

    together, row_pairs, column_pairs = num_pairs(table), num_pairs(rows), num_pairs(columns)
    expected = row_pairs * column_pairs / max(total * (total - 1) / 2, 1.0)
    ceiling = (row_pairs + column_pairs) / 2
    return {
        "nmi": max(information, 0.0) / mean_entropy if mean_entropy > 0 else 1.0,
        "acc": float(table[best_rows, best_columns].sum() / total),
        "ari": (together - expected) / (ceiling - expected) if ceiling != expected else 1.0,
    }


def clustering_summary(truth: np.ndarray, clusters: np.ndarray) -> dict[str, dict]:
    """Mean, spread and values of the three scores over S seeds; `clusters` is [S, N]."""
    runs = [clustering_scores(truth, run) for run in clusters]
    return {score: mean_and_std([run[score] for run in runs]) for score in CLUSTER_SCORES}


def clustering_draws(truth: np.ndarray, clusters: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The three scores, averaged over seeds, in R resamples of the images with the cluster assignments fixed.

    Args:
        clusters: [S, N].
        weights: [R, N], see `statistics.Resampler.weights`.

    Returns:
        Per score [R].
    """
    draws = np.zeros((len(CLUSTER_SCORES), len(weights)))
    for index, row in enumerate(weights):
        for run in clusters:
            scores = clustering_scores(truth, run, row)
            draws[:, index] += [scores[score] / len(clusters) for score in CLUSTER_SCORES]
    return dict(zip(CLUSTER_SCORES, draws, strict=True))


def linear_cka(first: np.ndarray, second: np.ndarray) -> float:
    """Linear centred kernel alignment of two feature matrices [N, D1], [N, D2] on the same N items.

    1 = same geometry up to rotation and scale; NaN = one of them has no variation.
    """
    centred = []
    for values in (first, second):
        values = values.astype(np.float64)
        centred.append(values - values.mean(axis=0))
        # Tokens that are all alike (the class token before the first block) have no geometry to compare.
        if np.linalg.norm(centred[-1]) <= 1e-5 * np.linalg.norm(values):
            return float("nan")
    first, second = centred
    scale = np.linalg.norm(first.T @ first) * np.linalg.norm(second.T @ second)
    return float(np.linalg.norm(second.T @ first) ** 2 / scale)


def token_drift(base: np.ndarray, tower: np.ndarray) -> dict[str, float | None]:
    """Mean cosine, relative L2 distance and linear CKA between the same tokens [N, H] of two towers.

    CKA is None where it is undefined: all tokens of the base or of the tower are the same.
    """
    cosine = (l2_normalise(base) * l2_normalise(tower)).sum(axis=1).mean()
    distance = np.linalg.norm(tower - base, axis=1) / np.maximum(np.linalg.norm(base, axis=1), 1e-12)
    cka = linear_cka(base, tower)
    return {
        "cosine": float(cosine),
        "relative_l2": float(distance.mean()),
        "cka": None if np.isnan(cka) else cka,
    }
