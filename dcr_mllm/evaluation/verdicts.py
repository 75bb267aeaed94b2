"""What a difference between two models on one benchmark is worth.

Exact McNemar where units are independent, a paired cluster bootstrap everywhere, over training runs too where there are
several; Holm over the tasks of a comparison, and the smallest gain that could have been seen. Values are in the
benchmark's own unit, mostly percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import norm

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.scored import Measures, Scored
from dcr_mllm.evaluation.statistics import (
    Resampler,
    combine_seed_draws,
    holm,
    interval,
    mcnemar_exact,
    minimum_detectable_effect,
)

_DISCORDANT_GUESS = 0.2  # where two models never disagree: a share that small changes of a tower reach


def compare_task(base: Sequence[Scored], model: Sequence[Scored], seed: int = 0) -> dict[str, Any]:
    """One model against the baseline on one benchmark.

    Args:
        base, model: One or several training runs of each, scored on the same items in the same order. With several,
            measures are means over runs, and resamples draw runs as well as items.
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
    ours, values = _over_runs(model, weights, seed + 1)
    theirs, base_values = _over_runs(base, weights, seed + 2)
    measures = {}
    for name, value in values.items():
        draws = ours[name] - theirs[name]
        measures[name] = {
            "base": base_values[name],
            "model": value,
            "difference": value - base_values[name],
            "interval": interval(draws),
        }
    single = len(base) == len(model) == 1
    if single and first.units is not None and model[0].units is not None:
        tested = mcnemar_exact(first.units, model[0].units)
        discordant = (tested["gained"] + tested["lost"]) / len(first.units)
        headline = {
            "test": f"exact McNemar on {len(first.units)} {first.unit_name}s",
            **tested,
            "minimum_detectable_effect": minimum_detectable_effect(len(first.units), discordant or _DISCORDANT_GUESS),
        }
    else:
        headline = _bootstrap_test(base, model, ours[first.headline] - theirs[first.headline])
    caution = None
    if first.chance is not None:
        name, value = first.chance
        if all(interval(draws[name])[0] <= value for draws in (ours, theirs)):
            caution = f"neither model is told from guessing here ({name.replace('_', ' ')} {value:g} by chance)"
    return {
        "headline": first.headline,
        **headline,
        "caution": caution,
        "training": _training(len(base), len(model)),
        "measures": measures,
    }


def _over_runs(runs: Sequence[Scored], weights: np.ndarray, seed: int) -> tuple[Measures, dict[str, float]]:
    """Resampled measures [R] and those of the whole test set, means over training runs."""
    resampled = [entry.resample(weights) for entry in runs]
    whole = [entry.values() for entry in runs]
    draws = {name: combine_seed_draws(np.stack([entry[name] for entry in resampled]), seed) for name in resampled[0]}
    return draws, {name: float(np.mean([entry[name] for entry in whole])) for name in whole[0]}


def _bootstrap_test(base: Sequence[Scored], model: Sequence[Scored], draws: np.ndarray) -> dict[str, Any]:
    """Two-sided, from the share of resamples on the other side of zero; never below what so many can tell."""
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    before, after = (np.mean([entry.right for entry in runs], axis=0) for runs in (base, model))
    runs = " and training runs" if len(base) + len(model) > 2 else ""
    return {
        "test": f"paired bootstrap over {len(set(base[0].clusters))} images or groups{runs}",
        "p_value": min(1.0, 2 * (beyond + 1) / (len(draws) + 1)),
        "gained": int((after > before).sum()),
        "lost": int((after < before).sum()),
        "minimum_detectable_effect": float((norm.ppf(0.975) + norm.ppf(0.8)) * draws.std()),
    }


def _training(num_base: int, num_model: int) -> str:
    if num_base == num_model == 1:
        return "one training run each: training variance not measured"
    few = "; few runs make an interval too narrow" if min(num_base, num_model) < 5 else ""
    return f"training variance measured over {num_base} and {num_model} runs{few}"


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
