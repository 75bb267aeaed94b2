"""What a difference between two models on one benchmark is worth.

Exact McNemar where units are independent, a paired cluster bootstrap everywhere, with Student's t over training runs
where there are several; Holm over the tasks of a comparison, and the smallest gain that could have been seen. Values
are in the benchmark's own unit, mostly percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.scored import Measures, Scored
from dcr_mllm.evaluation.statistics import (
    Resampler,
    holm,
    interval,
    mcnemar_exact,
    minimum_detectable_effect,
)

_DISCORDANT_GUESS = 0.2  # where two models never disagree: a share that small changes of a tower reach


def compare_task(base: Sequence[Scored], model: Sequence[Scored], seed: int = 0) -> dict[str, Any]:
    """One model against the baseline on one benchmark.

    Args:
        base, model: One or several training runs of each, scored on the same items in the same order. With several on
            either side measures are means over runs, and intervals cover the variance of training as well.
        seed: Of the resamples.

    Returns:
        For every measure `base`, `model`, `difference` and its 95 % `interval`; for the headline also `p_value` and its
        `test`, `gained` and `lost` units, and `minimum_detectable_effect`; `caution` if both may just be guessing;
        `training`, what is known of the variance of training.
    """
    first = base[0]
    if any(entry.clusters != first.clusters for entry in (*base, *model)):
        raise UserError("the models did not answer the same questions; evaluate all on the same data")
    weights = Resampler(len(first.clusters), first.clusters, seed=seed).weights().astype(np.float32)
    ours, theirs = _mean_draws(model, weights), _mean_draws(base, weights)
    values = [[entry.values() for entry in runs] for runs in (base, model)]
    single = len(base) == len(model) == 1
    measures: dict[str, dict[str, Any]] = {}
    spreads: dict[str, _Spread] = {}
    for name in first.values():
        before, after = (np.array([entry[name] for entry in runs]) for runs in values)
        draws = ours[name] - theirs[name]
        draws = draws[~np.isnan(draws)]  # a resample may lack a measure's items
        difference = float(after.mean() - before.mean())
        spreads[name] = _Spread.over_runs(before, after, draws, len(set(first.clusters)))
        measures[name] = {
            "base": float(before.mean()),
            "model": float(after.mean()),
            "difference": difference,
            "interval": interval(draws) if single else spreads[name].interval(difference),
        }
    headline, spread = measures[first.headline], spreads[first.headline]
    if single and first.units is not None and model[0].units is not None:
        tested = mcnemar_exact(first.units, model[0].units)
        discordant = (tested["gained"] + tested["lost"]) / len(first.units)
        found: dict[str, Any] = {
            "test": f"exact McNemar on {len(first.units)} {first.unit_name}s",
            **tested,
            "minimum_detectable_effect": minimum_detectable_effect(len(first.units), discordant or _DISCORDANT_GUESS),
        }
    elif single:
        draws = ours[first.headline] - theirs[first.headline]
        found = {
            "test": f"paired bootstrap over {len(set(first.clusters))} images or groups",
            "p_value": _bootstrap_p(draws[~np.isnan(draws)]),
            **_flips(base, model),
            "minimum_detectable_effect": spread.detectable(),
        }
    else:
        found = {
            "test": f"t test over training runs and a bootstrap over {len(set(first.clusters))} images or groups",
            "p_value": spread.p_value(headline["difference"]),
            **_flips(base, model),
            "minimum_detectable_effect": spread.detectable(),
        }
    caution = None
    if first.chance is not None:
        name, value = first.chance
        if all(interval(draws[name][~np.isnan(draws[name])])[0] <= value for draws in (ours, theirs)):
            caution = f"neither model is told from guessing here ({name.replace('_', ' ')} {value:g} by chance)"
    return {
        "headline": first.headline,
        **found,
        "caution": caution,
        "training": _training(len(base), len(model)),
        "measures": measures,
    }


@dataclass(frozen=True)
class _Spread:
    """How far a difference may be off: its standard error and the degrees of freedom of Student's t."""

    error: float
    freedom: float

    @classmethod
    def over_runs(cls, base: np.ndarray, model: np.ndarray, draws: np.ndarray, num_clusters: int) -> _Spread:
        """Items and training runs together.

        The variance of training is taken to be the same on both sides, so that a side of one run can be judged by the
        other's; with few runs it is known badly, which the degrees of freedom (Satterthwaite) say.

        Args:
            base, model: [S] the measure of each run on the whole test set.
            draws: [R] its difference in resamples of the items, means over runs.
            num_clusters: That are resampled.
        """
        items, free_items = float(draws.var()), max(num_clusters - 1, 1)
        free_runs = len(base) + len(model) - 2
        if not free_runs:
            return cls(items**0.5, free_items)
        squares = sum(float(((runs - runs.mean()) ** 2).sum()) for runs in (base, model))
        runs = squares / free_runs * (1 / len(base) + 1 / len(model))
        total = items + runs
        freedom = total**2 / (items**2 / free_items + runs**2 / free_runs) if total else free_items
        return cls(total**0.5, freedom)

    def interval(self, difference: float) -> list[float]:
        half = float(student.ppf(0.975, self.freedom)) * self.error
        return [difference - half, difference + half]

    def p_value(self, difference: float) -> float:
        if not self.error:
            return 1.0 if not difference else 0.0
        return float(2 * student.sf(abs(difference) / self.error, self.freedom))

    def detectable(self) -> float | None:
        """The true difference that a test at 5 % would find four times out of five; None if nothing varies."""
        if not self.error:
            return None
        return float((student.ppf(0.975, self.freedom) + student.ppf(0.8, self.freedom)) * self.error)


def _mean_draws(runs: Sequence[Scored], weights: np.ndarray) -> Measures:
    """Every measure in each resample [R], means over training runs."""
    resampled = [entry.resample(weights) for entry in runs]
    return {name: np.mean([entry[name] for entry in resampled], axis=0) for name in resampled[0]}


def _bootstrap_p(draws: np.ndarray) -> float:
    """Two-sided, from the share of resamples on the other side of zero; never below what so many can tell."""
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * (beyond + 1) / (len(draws) + 1))


def _flips(base: Sequence[Scored], model: Sequence[Scored]) -> dict[str, int]:
    """Items that more, and that fewer, of the runs get right."""
    before, after = (np.mean([entry.right for entry in runs], axis=0) for runs in (base, model))
    return {"gained": int((after > before).sum()), "lost": int((after < before).sum())}


def _training(num_base: int, num_model: int) -> str:
    if num_base == num_model == 1:
        return (
            "one training run each: training variance not measured, so verdicts speak of these two models and not of "
            "how they were made"
        )
    if min(num_base, num_model) == 1:
        return (
            f"training variance measured over the {max(num_base, num_model)} runs of one side, and taken to be the "
            "same on the other, of which there is one run"
        )
    return f"training variance measured over {num_base} and {num_model} runs"


def add_verdicts(comparisons: dict[str, dict[str, Any]]) -> None:
    """Adjust the p-values of one model's tasks by Holm, and put the verdict into words, in place."""
    adjusted = holm({task: entry["p_value"] for task, entry in comparisons.items()})
    for task, entry in comparisons.items():
        entry["p_holm"] = adjusted[task]
        difference = entry["measures"][entry["headline"]]["difference"]
        smallest = entry["minimum_detectable_effect"]
        if adjusted[task] < 0.05:
            entry["verdict"] = "better" if difference > 0 else "worse"
        elif smallest is None:
            entry["verdict"] = "no difference detected (too few units for any to be seen)"
        else:
            entry["verdict"] = f"no difference detected (a gain under {smallest:.1f} points could not have been seen)"
