"""What a difference between two models on one benchmark is worth.

Exact McNemar where units are independent, a paired cluster bootstrap everywhere, Holm over the tasks of a comparison,
and the smallest gain that could have been seen. Values are in the benchmark's own unit, mostly percent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import norm

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.scored import Scored
from dcr_mllm.evaluation.statistics import Resampler, holm, interval, mcnemar_exact, minimum_detectable_effect

_DISCORDANT_GUESS = 0.2  # where two models never disagree: a share that small changes of a tower reach


def compare_task(base: Scored, model: Scored, seed: int = 0) -> dict[str, Any]:
    """One model against the baseline on one benchmark.

    Args:
        base, model: Scored on the same items in the same order.
        seed: Of the resamples.

    Returns:
        For every measure `base`, `model`, `difference` and its 95 % `interval`; for the headline also `p_value` and its
        `test`, `gained` and `lost` units, and `minimum_detectable_effect`; `caution` if both may just be guessing.
    """
    if base.clusters != model.clusters:
        raise UserError("the two models did not answer the same questions; evaluate both on the same data")
    weights = Resampler(len(base.clusters), base.clusters, seed=seed).weights().astype(np.float32)
    ours, theirs = model.resample(weights), base.resample(weights)
    values, base_values = model.values(), base.values()
    measures = {}
    for name, value in values.items():
        draws = ours[name] - theirs[name]
        measures[name] = {
            "base": base_values[name],
            "model": value,
            "difference": value - base_values[name],
            "interval": interval(draws),
        }
    draws = ours[base.headline] - theirs[base.headline]
    right = {"gained": int((model.right & ~base.right).sum()), "lost": int((base.right & ~model.right).sum())}
    if base.units is not None and model.units is not None:
        tested = mcnemar_exact(base.units, model.units)
        discordant = (tested["gained"] + tested["lost"]) / len(base.units)
        headline = {
            "test": f"exact McNemar on {len(base.units)} {base.unit_name}s",
            **tested,
            "minimum_detectable_effect": minimum_detectable_effect(len(base.units), discordant or _DISCORDANT_GUESS),
        }
    else:
        # Two-sided, from the share of resamples on the other side of zero; never below what so many can tell.
        beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
        headline = {
            "test": f"paired bootstrap over {len(set(base.clusters))} images or groups",
            "p_value": min(1.0, 2 * (beyond + 1) / (len(draws) + 1)),
            **right,
            "minimum_detectable_effect": float((norm.ppf(0.975) + norm.ppf(0.8)) * draws.std()),
        }
    caution = None
    if base.chance is not None:
        name, value = base.chance
        if all(interval(draws[name])[0] <= value for draws in (ours, theirs)):
            caution = f"neither model is told from guessing here ({name.replace('_', ' ')} {value:g} by chance)"
    return {"headline": base.headline, **headline, "caution": caution, "measures": measures}


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
