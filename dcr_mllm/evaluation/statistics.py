"""Paired statistics: is the difference between two models on the same items more than luck?

Everything here works on per-item results of both models. All resampling has a fixed seed, and one `Resampler` serves
every measure of a test set, so that both models and all measures see the same resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binom, binomtest

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000


def mcnemar_exact(base: ArrayLike, tower: ArrayLike) -> dict:
    """Exact two-sided McNemar test: a binomial test on the units that only one of the two models gets right.

    Args:
        base, tower: [N] bool, right or wrong per unit; units have to be independent (pairs, not questions).

    Returns:
        `p_value`, `gained` (only the tower is right), `lost` (only the base is right).
    """
    base, tower = np.asarray(base, dtype=bool), np.asarray(tower, dtype=bool)
    if base.shape != tower.shape:
        raise ValueError(f"base has {base.shape} results and tower {tower.shape}: a paired test needs the same units")
    gained, lost = int((tower & ~base).sum()), int((base & ~tower).sum())
    discordant = gained + lost
    p_value = float(binomtest(gained, discordant, 0.5).pvalue) if discordant else 1.0
    return {"p_value": p_value, "gained": gained, "lost": lost}


def interval(draws: ArrayLike, confidence: float = CONFIDENCE) -> list[float]:
    """Percentile interval [low, high] of bootstrap draws."""
    tail = 100 * (1 - confidence) / 2
    low, high = np.nanpercentile(np.asarray(draws, dtype=float), [tail, 100 - tail])
    return [float(low), float(high)]


def centred(draws: ArrayLike, estimate: float) -> np.ndarray:
    """Bootstrap draws [R] moved so that their mean is the estimate on the whole set.

    For statistics that resampling biases: items drawn twice agree with themselves, so clustering scores of a resample
    are too high, the lower the score the more, and a large difference of two would lie outside of its own interval.
    Means over items have no such bias.
    """
    draws = np.asarray(draws, dtype=float)
    return draws + (estimate - np.nanmean(draws))


class Resampler:
    """Bootstrap weights over the clusters of one test set, drawn once and shared by everything measured on it.

    Args:
        num_items: N.
        clusters: [N] a cluster name per item (images, where several questions share one); None = each item its own.
        num_resamples: R.
        seed: Fixed, so that two runs on the same test set use the same resamples.
    """

    def __init__(
        self, num_items: int, clusters: ArrayLike | None = None, num_resamples: int = NUM_RESAMPLES, seed: int = 0
    ) -> None:
        if num_items < 1:
            raise ValueError("there is nothing to resample: 0 items")
        names = np.arange(num_items) if clusters is None else np.asarray(clusters)
        if len(names) != num_items:
            raise ValueError(f"{len(names)} cluster names for {num_items} items")
        unique, self._cluster_of = np.unique(names, return_inverse=True)
        rng = np.random.default_rng(seed)
        # How often each cluster occurs: weights replace index lists, so that a mean is one matrix product. A byte is
        # enough (a count above 255 needs more than 255 clusters and then never happens) and 50,000 images stay small.
        self._counts = np.zeros((num_resamples, len(unique)), dtype=np.uint8)
        for row in self._counts:
            row[:] = np.bincount(rng.integers(len(unique), size=len(unique)), minlength=len(unique))

    def weights(self, limit: int | None = None) -> np.ndarray:
        """[R, N] how often each item occurs in each of the first `limit` resamples."""
        return self._counts[:limit][:, self._cluster_of]

    def means(self, values: ArrayLike) -> np.ndarray:
        """[R] mean of `values` [N] in every resample; NaN items do not count, NaN = none left."""
        values = np.asarray(values, dtype=float)
        valid = ~np.isnan(values)
        num_clusters = self._counts.shape[1]
        sums = np.bincount(self._cluster_of, np.where(valid, values, 0.0), minlength=num_clusters)
        sizes = np.bincount(self._cluster_of, valid.astype(float), minlength=num_clusters)
        parts = [chunk.astype(float) @ np.stack([sums, sizes], axis=1) for chunk in np.array_split(self._counts, 20)]
        totals = np.concatenate(parts)
        with np.errstate(invalid="ignore"):
            return totals[:, 0] / totals[:, 1]  # 0 / 0 where a resample holds no valid item: NaN


def paired_bootstrap(
    base: ArrayLike,
    tower: ArrayLike,
    clusters: ArrayLike | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict:
    """Difference of means, tower minus base, with the 95 % interval of a paired cluster bootstrap.

    Args:
        base, tower: [N] results per item.
        clusters: [N] cluster of each item, see `Resampler`.

    Returns:
        `difference`, `interval` [low, high].
    """
    deltas = np.asarray(tower, dtype=float) - np.asarray(base, dtype=float)
    draws = Resampler(len(deltas), clusters, num_resamples, seed).means(deltas)
    return {"difference": float(np.nanmean(deltas)), "interval": interval(draws)}


def combine_seed_draws(draws: ArrayLike, seed: int = 0) -> np.ndarray:
    """Bootstrap draws of the mean over training seeds, resampling seeds as well as items.

    Args:
        draws: [S, R] per training seed the measure in R resamples of the items; resample r must be the same items for
            every seed (it is, with one `Resampler`).

    Returns:
        [R] in resample r, the mean over S seeds drawn with replacement.
    """
    draws = np.asarray(draws, dtype=float)
    num_seeds, num_resamples = draws.shape
    chosen = np.random.default_rng(seed).integers(num_seeds, size=(num_seeds, num_resamples))
    return np.take_along_axis(draws, chosen, axis=0).mean(axis=0)


def seeds_and_items_bootstrap(
    deltas: ArrayLike, clusters: ArrayLike | None = None, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict:
    """Mean gain over training seeds and items, with an interval that covers the luck of both.

    In each resample items are drawn once, jointly for all seeds (they are measured on the same items), and seeds are
    drawn with replacement. With few seeds the interval is too narrow rather than too wide, as for any bootstrap.

    Args:
        deltas: [S, N] tower minus base per training seed and item; NaN items do not count.
        clusters: [N] cluster of each item, see `Resampler`.

    Returns:
        `mean`, `interval` [low, high] at 95 %, `per_seed` [S].
    """
    deltas = np.atleast_2d(np.asarray(deltas, dtype=float))
    resampler = Resampler(deltas.shape[1], clusters, num_resamples, seed)
    draws = combine_seed_draws([resampler.means(row) for row in deltas], seed=seed + 1)
    per_seed = np.nanmean(deltas, axis=1)
    return {
        "mean": float(per_seed.mean()),
        "interval": interval(draws),
        "per_seed": [float(value) for value in per_seed],
    }


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment over one family of tests, named beforehand.

    Returns:
        Adjusted p-values under the same names; those below 0.05 stay significant with the family-wise error at 5 %.
    """
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


@lru_cache(maxsize=8)
def _largest_rejected(num_units: int, alpha: float) -> np.ndarray:
    """[n + 1] per number of discordant units, the largest smaller count at which the exact test rejects; -1 = never."""
    discordant = np.arange(num_units + 1)
    # By symmetry the two-sided p-value is twice the lower tail.
    largest = binom.ppf(alpha / 2, discordant, 0.5)
    largest = np.nan_to_num(largest, nan=-1.0)
    return np.where(2 * binom.cdf(largest, discordant, 0.5) <= alpha, largest, largest - 1)


def _power(num_units: int, discordant_share: float, difference: float, alpha: float) -> float:
    """Power of the exact McNemar test, the number of discordant units being binomial."""
    discordant = np.arange(num_units + 1)
    limit = _largest_rejected(num_units, alpha)
    gain = (discordant_share + difference) / (2 * discordant_share)
    reject = binom.cdf(limit, discordant, gain) + binom.sf(discordant - limit - 1, discordant, gain)
    return float(binom.pmf(discordant, num_units, discordant_share) @ np.where(limit >= 0, reject, 0.0))


def minimum_detectable_effect(
    num_units: int, discordant_share: float, power: float = 0.8, alpha: float = 0.05, step: float = 0.25
) -> float | None:
    """The smallest true difference that the exact McNemar test finds with the given power.

    Args:
        num_units: Independent units, such as pairs.
        discordant_share: Share of units on which the two models disagree.
        step: Grid of the answer in points; it is rounded up to it.

    Returns:
        Points (percent), or None if so few units disagree that no difference could be found.
    """
    if not 0 < discordant_share <= 1 or num_units < 1:
        return None
    for index in range(1, int(100 * discordant_share / step) + 1):
        if _power(num_units, discordant_share, index * step / 100, alpha) >= power:
            return index * step
    return None


def mean_and_std(values: Sequence[float]) -> dict:
    """Mean, sample standard deviation and the values themselves."""
    array = np.asarray(values, dtype=float)
    spread = float(array.std(ddof=1)) if len(array) > 1 else 0.0
    return {"mean": float(array.mean()), "std": spread, "values": [float(value) for value in array]}
