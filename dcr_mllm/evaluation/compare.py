"""A tower against its baseline, measured on the same items: differences, intervals, tests, drift.

All values are percentages, all differences points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from dcr_mllm.evaluation.features import TokenSample
from dcr_mllm.evaluation.measures import CLUSTER_SCORES, clustering_draws, token_drift
from dcr_mllm.evaluation.statistics import Resampler, centred, holm, interval, mcnemar_exact, minimum_detectable_effect

NUM_CLUSTERING_RESAMPLES = 300
SMALL_PAIR_SET = 300
_DISCORDANT_GUESS = 0.2  # used where the two towers never disagree: a share that small training changes reach


@dataclass(kw_only=True)
class Measured:
    """One tower's results per item, from which a comparison is made.

    Attributes:
        description: Shape and parts of the tower, see `features.DualEncoder.description`.
        pairs: [P] bool, None without an MMVP-VLM set.
        correct: Per measure of the labelled test set, [N] of 0 and 1; NaN where an attribute does not apply.
        clusters: [S, N] k-means assignments, None without a labelled set.
        tokens: Hidden states for drift.
        report: The JSON-able part.
    """

    description: dict
    pairs: np.ndarray | None = None
    correct: dict[str, np.ndarray] = field(default_factory=dict)
    clusters: np.ndarray | None = None
    tokens: TokenSample | None = None
    report: dict = field(default_factory=dict)


@dataclass(kw_only=True)
class Items:
    """The test items that all towers share.

    Attributes:
        patterns: [P] pattern of each pair, None without an MMVP-VLM set.
        classes: [N] class index of each labelled test image, None without a labelled set.
        seed: Of the resamples.
    """

    patterns: np.ndarray | None = None
    classes: np.ndarray | None = None
    seed: int = 0
    _cluster_draws: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)

    @cached_property
    def pair_resampler(self) -> Resampler:
        assert self.patterns is not None
        return Resampler(len(self.patterns), seed=self.seed)

    @cached_property
    def image_resampler(self) -> Resampler:
        assert self.classes is not None
        return Resampler(len(self.classes), seed=self.seed)

    def cluster_draws(self, measured: Measured) -> dict[str, np.ndarray]:
        """Bootstrap draws of a tower's clustering scores, kept because the baseline's are needed for every tower."""
        assert self.classes is not None and measured.clusters is not None
        if id(measured) not in self._cluster_draws:
            weights = self.image_resampler.weights(NUM_CLUSTERING_RESAMPLES)
            self._cluster_draws[id(measured)] = clustering_draws(self.classes, measured.clusters, weights)
        return self._cluster_draws[id(measured)]


def _macro(resampler: Resampler, groups: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
    """Mean over groups of their item means, and its bootstrap draws [R]; each group is [N] with NaN elsewhere."""
    value = float(np.mean([np.nanmean(group) for group in groups]))
    return value, np.nanmean([resampler.means(group) for group in groups], axis=0)


def _paired(
    resampler: Resampler, base: Sequence[np.ndarray], tower: Sequence[np.ndarray], *, keep_draws: bool = False
) -> dict:
    """Both values, their difference and its interval for one measure made of one or several groups of items.

    With `keep_draws` the bootstrap draws too, from which several training seeds can be put together.
    """
    values = [_macro(resampler, groups)[0] for groups in (base, tower)]
    difference, draws = _macro(resampler, [after - before for before, after in zip(base, tower, strict=True)])
    entry = {
        "base": 100 * values[0],
        "tower": 100 * values[1],
        "difference": 100 * difference,
        "interval": interval(100 * draws),
    }
    return entry | ({"draws": _rounded(100 * draws)} if keep_draws else {})


def _rounded(draws: np.ndarray) -> list[float]:
    return [round(float(draw), 4) for draw in draws]


def _tested(entry: dict, base: np.ndarray, tower: np.ndarray) -> dict:
    """Add the exact McNemar test over independent units and what it could have found."""
    valid = ~np.isnan(base)
    entry |= mcnemar_exact(base[valid], tower[valid])
    entry["num_units"] = int(valid.sum())
    entry["discordant_share"] = (entry["gained"] + entry["lost"]) / entry["num_units"]
    entry["minimum_detectable_effect"] = minimum_detectable_effect(entry["num_units"], entry["discordant_share"])
    return entry


def compare(base: Measured, tower: Measured, items: Items) -> dict:
    """Compare a tower with the baseline on every measure both have.

    Returns:
        `measures` (per measure base, tower, difference, 95 % interval and, for counts of independent units, exact
        McNemar with Holm over this comparison's tests), `drift` (or None), `cautions`.
    """
    measures: dict[str, dict] = {}
    if base.pairs is not None and tower.pairs is not None and items.patterns is not None:
        before, after = base.pairs.astype(float), tower.pairs.astype(float)
        # The published number is the mean over patterns, so that is what every resample recomputes.
        members = [items.patterns == pattern for pattern in np.unique(items.patterns)]
        groups = [[np.where(member, values, np.nan) for member in members] for values in (before, after)]
        measures["mmvp_vlm"] = _tested(_paired(items.pair_resampler, *groups), before, after)
    for name in base.correct:
        before, after = base.correct[name], tower.correct[name]
        measures[name] = _tested(_paired(items.image_resampler, [before], [after]), before, after)
    probes = [name for name in base.correct if name.startswith("probe:")]
    if probes:
        groups = [[measured.correct[name] for name in probes] for measured in (base, tower)]
        measures["probes_mean"] = _paired(items.image_resampler, *groups, keep_draws=True)
    if base.clusters is not None and tower.clusters is not None:
        before_draws, after_draws = items.cluster_draws(base), items.cluster_draws(tower)
        for score in CLUSTER_SCORES:
            values = [measured.report["clustering"][score]["mean"] for measured in (base, tower)]
            draws = centred(100 * (after_draws[score] - before_draws[score]), values[1] - values[0])
            measures[score] = {
                "base": values[0],
                "tower": values[1],
                "difference": values[1] - values[0],
                "interval": interval(draws),
                "draws": _rounded(draws),
            }
    adjusted = holm({name: entry["p_value"] for name, entry in measures.items() if "p_value" in entry})
    for name, p_value in adjusted.items():
        measures[name]["p_holm"] = p_value
    drift, note = compare_drift(base, tower)
    return {"measures": measures, "drift": drift, "cautions": [*_cautions(measures, base, tower), *note]}


def _cautions(measures: dict[str, dict], base: Measured, tower: Measured) -> list[str]:
    cautions = []
    pairs = measures.get("mmvp_vlm")
    if pairs is not None and pairs["num_units"] < SMALL_PAIR_SET:
        share = pairs["discordant_share"]
        effect = pairs["minimum_detectable_effect"]
        if effect is None:
            share = _DISCORDANT_GUESS
            effect = minimum_detectable_effect(pairs["num_units"], share)
        found = (
            "no difference at all" if effect is None else f"only true differences of about {effect:g} points or more"
        )
        cautions.append(
            f"{pairs['num_units']} pairs detect {found} "
            f"(exact McNemar, 80 % power at 5 %, if the towers disagree on {100 * share:.0f} % of them)."
        )
    same_kind = base.description["model_type"] == tower.description["model_type"]
    for key in ("image_size", "image_mean", "image_std"):
        if same_kind and base.description.get(key) != tower.description.get(key):
            cautions.append(
                f"{key} differs ({base.description.get(key)} and {tower.description.get(key)}), "
                "so more than the weights changed."
            )
    return cautions


def compare_drift(base: Measured, tower: Measured) -> tuple[dict | None, list[str]]:
    """Drift per layer of class token and patch tokens; None and the reason where shapes differ."""
    if base.tokens is None or tower.tokens is None:
        return None, []
    first, second = base.tokens, tower.tokens
    # The sampled tokens may agree in shape where the grids they come from do not.
    shape = ("model_type", "image_size", "patch_size", "num_layers", "hidden_size")
    if any(base.description[key] != tower.description[key] for key in shape):
        return None, ["The towers differ in shape, so their features have no drift."]
    num_layers, num_images, num_patches, width = first.patch_tokens.shape
    layers = []
    for layer in range(num_layers):
        class_drift = None
        if first.class_tokens is not None and second.class_tokens is not None:
            class_drift = token_drift(first.class_tokens[layer], second.class_tokens[layer])
        patches = (sample.patch_tokens[layer].reshape(-1, width) for sample in (first, second))
        layers.append({"layer": layer, "class": class_drift, "patch": token_drift(*patches)})
    drift = {
        "llava_layer": num_layers - 2,  # hidden_states[-2]
        "num_images": num_images,
        "patches_per_image": num_patches,
        "layers": layers,
    }
    return drift, []
