"""Which of the paper's claims hold on the miniature: one rule and one sentence each, from the numbers alone.

A claim about a difference holds where its 95 % interval lies on the claimed side of 0, does not where it lies on the
other side, and cannot be told where it covers 0. A claim about several differences holds if all of them do, and does
not if any does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HOLDS, FAILS, UNKNOWN, NOT_RUN = "holds", "does not hold", "cannot be told", "not run"

Gain = Mapping[str, Any]


def verdicts(table: Mapping[str, Any]) -> list[dict[str, str]]:
    """One entry per claim with `claim`, `verdict` and `sentence`.

    Args:
        table: As `comparing.table` makes it: `summary`, `contrasts` and `diagnostics` are read.
    """
    summary, contrasts = table["summary"], table["contrasts"]
    found = [
        _order("P-Ability: the joint loss is below end-to-end DCR, and that below two-stage DCR", contrasts, "pairs"),
        _order("Clustering (NMI) is ordered in the same way", contrasts, "nmi"),
        _conflict(table["diagnostics"].get("joint")),
        _about(
            "Reconstruction alone costs D-Ability",
            summary.get("reconstruction"),
            [("d_ability", -1)],
            also=("zero_shot", "knn", "nmi"),
        ),
        _about(
            "DCR raises both abilities", summary.get("dcr"), [("pairs", 1), ("d_ability", 1)], also=("probes_mean",)
        ),
    ]
    return found


def side(gain: Gain, sign: int) -> str:
    """Whether a claim that a difference is positive (1) or negative (-1) holds."""
    low, high = gain["interval"]
    if low > 0 or high < 0:
        return HOLDS if (low > 0) == (sign > 0) else FAILS
    return UNKNOWN


def together(words: Sequence[str]) -> str:
    """Of several claims at once."""
    if FAILS in words:
        return FAILS
    return HOLDS if words and all(word == HOLDS for word in words) else UNKNOWN


def _order(claim: str, contrasts: Sequence[Mapping[str, Any]], measure: str) -> dict[str, str]:
    if len(contrasts) < 2:
        return _entry(claim, NOT_RUN, "the three training strategies have not been run at a common seed")
    words = [side(entry["gain"][measure], 1) for entry in contrasts]
    parts = [f"{c['better']} minus {c['worse']} {figures(c['gain'][measure])}" for c in contrasts]
    return _entry(claim, together(words), " and ".join(parts))


def _conflict(seen: Mapping[str, Any] | None) -> dict[str, str]:
    """Looks within one run resemble each other, so that seeds decide: all of them on one side, or it cannot be told."""
    claim = "The gradients of contrast and reconstruction conflict in most steps of the joint loss (paper: 86.3 %)"
    if seen is None:
        return _entry(claim, NOT_RUN, "no run of joint has looked at its gradients")
    shares = seen["share_per_seed"]
    word = HOLDS if min(shares) > 50 else FAILS if max(shares) < 50 else UNKNOWN
    per_seed = ", ".join(f"{share:.0f}" for share in shares)
    sentence = (
        f"the cosine was negative in {seen['negative']} of {seen['looks']} looks "
        f"({100 * seen['negative'] / seen['looks']:.1f} %; by seed {per_seed} %), "
        f"mean cosine {seen['mean_cosine']:+.3f}"
    )
    return _entry(claim, word, sentence)


def _about(
    claim: str, objective: Mapping[str, Any] | None, parts: Sequence[tuple[str, int]], also: Sequence[str]
) -> dict[str, str]:
    if objective is None:
        return _entry(claim, NOT_RUN, "the objective has not been run")
    words = [side(objective["gain"][measure], sign) for measure, sign in parts]
    told = [f"{NAMES[name]} {figures(objective['gain'][name])}" for name, _ in parts]
    more = [f"{NAMES[name]} {figures(objective['gain'][name])}" for name in also]
    return _entry(claim, together(words), f"{' and '.join(told)}; besides, {', '.join(more)}")


def _entry(claim: str, verdict: str, figures: str) -> dict[str, str]:
    start = {
        HOLDS: "Holds here",
        FAILS: "Does not hold here",
        UNKNOWN: "Cannot be told from this (an interval covers 0, or seeds disagree)",
        NOT_RUN: "Not run",
    }[verdict]
    return {"claim": claim, "verdict": verdict, "sentence": f"{start}: {figures}."}


def figures(gain: Gain) -> str:
    """A gain with its interval, in points."""
    low, high = gain["interval"]
    return f"{gain['mean']:+.2f} [{low:+.2f}, {high:+.2f}]"


NAMES = {
    "pairs": "P-Ability (pairs)",
    "d_ability": "D-Ability",
    "zero_shot": "zero-shot",
    "knn": "k-NN",
    "nmi": "NMI",
    "acc": "ACC",
    "ari": "ARI",
    "probes_mean": "probes",
    "mmvp_pairs": "mini-MMVP pairs",
    "mmvp_single": "mini-MMVP single",
    "heldout": "held-out",
    "heldout_blind": "held-out, blind",
}
