"""Scores of the vision tower benchmarks, from what a tower got right or from its embeddings; knows no models, no files.

Every function takes `readable` [N], the images that could be decoded: what depends on another one counts as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from dcr_mllm.evaluation.measures import CLUSTER_SCORES, best_matches, clustering_draws, l2_normalise
from dcr_mllm.evaluation.mmvp_vlm import PATTERNS, Pair
from dcr_mllm.evaluation.scored import Columns, Measures, Scored, percent

RECALL_AT = (1, 5, 10)
TOP = 5
# Matching clusters to a thousand classes takes a tenth of a second per resample and seed.
_MANY_CLASSES, _FEW_RESAMPLES = 200, 300


def score_mmvp_vlm(pairs: Sequence[Pair], correct: np.ndarray, readable: np.ndarray) -> Scored:
    """MMVP-VLM: accuracy of pairs per pattern, and its mean over patterns, which is the published number.

    Args:
        pairs: P.
        correct: [P] bool, by `mmvp_vlm.score_pairs`; chance is 25 %.
        readable: [P] bool, both images could be decoded.
    """
    right = correct & readable
    found = {pair.pattern for pair in pairs}
    columns = Columns()
    groups = columns.add_accuracies(right, [pair.pattern for pair in pairs])
    names = [name for name in PATTERNS if name in found] + [name for name in groups if name not in PATTERNS]

    def measure(sums: np.ndarray) -> Measures:
        per_pattern = {name: columns.ratio(sums, f"right_{name}", f"all_{name}") for name in names}
        # A resample may lack a pattern.
        mean = np.nanmean(list(per_pattern.values()), axis=0)
        return {"pair_accuracy": mean, **{f"accuracy_{name}": value for name, value in per_pattern.items()}}

    return Scored(
        sums=columns.matrix(),
        measure=measure,
        headline="pair_accuracy",
        clusters=_each(len(pairs)),
        units=right,
        unit_name="pair",
        right=right,
        unparsable=[],
        chance=("pair_accuracy", 25.0),
    )


def score_zero_shot(similarities: np.ndarray, truth: np.ndarray, readable: np.ndarray) -> Scored:
    """Zero-shot classification: top-1 and top-5 accuracy, and the mean over classes of their recall.

    Args:
        similarities: [N, K] of images and classes, the larger the nearer.
        truth: [N] class indices.
        readable: [N] bool.
    """
    num_items, num_classes = similarities.shape
    right = (similarities.argmax(axis=1) == truth) & readable
    tops = {"accuracy": right}
    if num_classes > TOP:
        nearest = np.argpartition(-similarities, TOP - 1, axis=1)[:, :TOP]
        tops[f"accuracy_top{TOP}"] = (nearest == truth[:, None]).any(axis=1) & readable
    # One column per class: of a thousand classes nearly all entries are zero.
    members = sparse.csr_array((np.ones(num_items), (np.arange(num_items), truth)), shape=(num_items, num_classes))
    hits = members.multiply(right[:, None])
    plain = np.stack([np.ones(num_items), *tops.values()], axis=1)
    sums = sparse.hstack([sparse.csr_array(plain), members, hits], format="csr")
    first = plain.shape[1]

    def measure(sums: np.ndarray) -> Measures:
        values = {name: percent(sums[..., k], sums[..., 0]) for k, name in enumerate(tops, start=1)}
        recalls = percent(sums[..., first + num_classes :], sums[..., first : first + num_classes])
        return {**values, "mean_class_recall": np.nanmean(recalls, axis=-1)}

    return Scored(
        sums=sums,
        measure=measure,
        headline="accuracy",
        clusters=_each(num_items),
        units=right,
        unit_name="image",
        right=right,
        unparsable=[],
        chance=("accuracy", 100 / num_classes),
    )


def score_linear_probe(correct: dict[str, np.ndarray], readable: np.ndarray) -> Scored:
    """Linear probes: accuracy for the class, and for every attribute that the images are labelled with.

    Args:
        correct: Per label [N] of 0 and 1, NaN where it does not apply to an image; the first one is the class.
        readable: [N] bool.
    """
    headline, *attributes = correct
    columns = Columns()
    for name, values in correct.items():
        columns.add(f"right_{name}", (values == 1) & readable)
        columns.add(f"all_{name}", ~np.isnan(values))
    right = columns.column(f"right_{headline}").astype(bool)

    def measure(sums: np.ndarray) -> Measures:
        values = {name: columns.ratio(sums, f"right_{name}", f"all_{name}") for name in correct}
        means = {"accuracy_attributes": np.nanmean([values[name] for name in attributes], axis=0)} if attributes else {}
        return {"accuracy": values[headline], **means, **{f"accuracy_{name}": values[name] for name in attributes}}

    return Scored(
        sums=columns.matrix(),
        measure=measure,
        headline="accuracy",
        clusters=_each(len(right)),
        units=right,
        unit_name="image",
        right=right,
        unparsable=[],
    )


def score_clustering(truth: np.ndarray, assignments: np.ndarray) -> Scored:
    """Clustering: NMI, accuracy under the best assignment of clusters to classes, ARI; means over seeds, in percent.

    Resamples keep the clusters: they tell what other test images would say of them, not what k-means would do there.

    Args:
        truth: [N] class indices.
        assignments: [S, N] cluster of each image per seed of k-means.
    """

    def measure_weighted(weights: np.ndarray) -> Measures:
        few = len(np.unique(truth)) > _MANY_CLASSES
        draws = clustering_draws(truth, assignments, weights[:_FEW_RESAMPLES] if few else weights)
        return {name: 100 * draws[name] for name in CLUSTER_SCORES}

    matched = np.stack([best_matches(truth, clusters) for clusters in assignments])
    return Scored(
        sums=np.zeros((len(truth), 0)),
        measure=lambda sums: {},
        measure_weighted=measure_weighted,
        headline=CLUSTER_SCORES[0],
        clusters=_each(len(truth)),
        units=None,
        unit_name="image",
        right=matched.mean(axis=0) > 0.5,
        unparsable=[],
    )


def score_retrieval(images: np.ndarray, texts: np.ndarray, owner: np.ndarray, readable: np.ndarray) -> Scored:
    """Retrieval in both directions: recall@k is the share of queries with a right answer among the k nearest.

    An image has several captions, of which any is right. An equally near wrong candidate goes before the right one, so
    that embeddings without content retrieve nothing.

    Args:
        images: [N, D] embeddings.
        texts: [M, D] of the captions.
        owner: [M] image of each caption; every image has one.
        readable: [N] bool.
    """
    cosines = l2_normalise(texts) @ l2_normalise(images).T
    # An image that nobody could read is found by nothing, and stands in nobody's way.
    cosines[:, ~readable] = -np.inf
    own = cosines[np.arange(len(texts)), owner]
    to_image = (cosines >= own[:, None]).sum(axis=1)  # rank from 1: the right one counts itself
    to_image[~readable[owner]] = len(images) + max(RECALL_AT)
    to_text = np.empty(len(images), dtype=int)
    for image in range(len(images)):
        mine = owner == image
        to_text[image] = 1 + (cosines[~mine, image] >= cosines[mine, image].max()).sum()
    to_text[~readable] = len(texts) + max(RECALL_AT)
    columns = Columns()
    columns.add("images", np.ones(len(images)))
    columns.add("texts", np.bincount(owner, minlength=len(images)))
    for k in RECALL_AT:
        columns.add(f"text@{k}", to_text <= k)
        columns.add(f"image@{k}", np.bincount(owner, to_image <= k, minlength=len(images)))

    def measure(sums: np.ndarray) -> Measures:
        to_texts = {f"image_to_text_recall@{k}": columns.ratio(sums, f"text@{k}", "images") for k in RECALL_AT}
        to_images = {f"text_to_image_recall@{k}": columns.ratio(sums, f"image@{k}", "texts") for k in RECALL_AT}
        mean = (to_texts["image_to_text_recall@1"] + to_images["text_to_image_recall@1"]) / 2
        return {"mean_recall@1": mean, **to_texts, **to_images}

    return Scored(
        sums=columns.matrix(),
        measure=measure,
        headline="mean_recall@1",
        clusters=_each(len(images)),
        units=None,
        unit_name="image",
        right=to_text <= 1,
        unparsable=[],
    )


def _each(num_items: int) -> list[str]:
    """A cluster per item; their names sort as the items do, so that resamples are those of `Resampler(num_items)`."""
    width = len(str(num_items))
    return [f"{number:0{width}d}" for number in range(num_items)]
