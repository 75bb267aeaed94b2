"""Statistics over records: gains over items and seeds, paired tests, and everything that the tables show.

P-Ability is the share of MMVP-VLM pairs; D-Ability here is the mean of zero-shot accuracy, k-NN and clustering NMI. An
interval of a gain is a bootstrap over items and training seeds, as in `dcr_mllm.evaluation.statistics`; with three
seeds it is too narrow rather than too wide.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from dcr_mllm.evaluation.published import ablations
from dcr_mllm.evaluation.statistics import Resampler, centred, combine_seed_draws, holm, interval, mcnemar_exact
from scripts.ablation.grid import BASE, OBJECTIVES, STAGE2_ARMS, SWEEP_OBJECTIVE, SWEEP_SEED, SWEEPS, Cell
from scripts.ablation.records import DRAWN, ITEMS, find, unpack_bits, unpack_draws
from scripts.ablation.verdicts import verdicts

D_ABILITY = ("zero_shot", "knn", "nmi")
GAINS = ("pairs", "d_ability", "zero_shot", "knn", *DRAWN)
REFERENCE = "dcr"
ORDER = ("joint", "dcr-end-to-end", "dcr")  # the paper's ablation of the training strategy, worst first

Record = Mapping[str, Any]


@lru_cache
def _weights(num_items: int) -> np.ndarray:
    """[R, N] share of each item in each resample, kept because every measure of every record wants them."""
    return Resampler(num_items).weights() / num_items


def change(record: Record, measure: str, other: Record | None = None) -> tuple[float, np.ndarray]:
    """A tower's difference to the base, or to another tower: in points, and its draws [R] over the items.

    Draw r is the same resample of the items for every record, so draws of several records may be subtracted and
    averaged. Those that a record keeps are moved onto their difference (see `centred`).
    """
    if measure == "d_ability":
        parts = [change(record, name, other) for name in D_ABILITY]
        shortest = min(len(draws) for _, draws in parts)
        value = float(np.mean([difference for difference, _ in parts]))
        return value, np.mean([draws[:shortest] for _, draws in parts], axis=0)
    if measure in record["items"]:
        after = unpack_bits(record["items"][measure]["tower"]).astype(float)
        before = unpack_bits((other or record)["items"][measure]["tower" if other else "base"]).astype(float)
        deltas = 100 * (after - before)
        return float(deltas.mean()), _weights(len(deltas)) @ deltas
    value, draws = record["measures"][measure]["difference"], unpack_draws(record["draws"][measure])
    if other is not None:
        value = value - other["measures"][measure]["difference"]
        draws = draws - unpack_draws(other["draws"][measure])
    return float(value), centred(draws, value)


def over_seeds(changes: Sequence[tuple[float, np.ndarray]]) -> dict[str, Any]:
    """Mean over seeds of `change`, its 95 % interval over items and seeds, and a two-sided p-value from the draws."""
    draws = combine_seed_draws(np.stack([draws for _, draws in changes]), seed=1)
    values = [value for value, _ in changes]
    return {
        "mean": float(np.mean(values)),
        "interval": interval(draws),
        "per_seed": values,
        "p_value": bootstrap_p(draws),
    }


def bootstrap_p(draws: np.ndarray) -> float:
    """Two-sided, from the share of draws on the other side of zero; never below what so many draws can tell."""
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * (beyond + 1) / (len(draws) + 1))


def tested(record: Record, measure: str, other: Record | None = None) -> dict[str, Any]:
    """Exact McNemar test of one tower against the base or another tower."""
    items = record["items"][measure]
    before = (other or record)["items"][measure]["tower" if other else "base"]
    return {"seed": record["cell"]["seed"], **mcnemar_exact(unpack_bits(before), unpack_bits(items["tower"]))}


def table(records: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """Everything in `ablation.json`."""
    cells, llavas = list(records["cell"]), list(records["stage2"])
    main = sorted((r for r in cells if not r["cell"]["changes"]), key=_order)
    summary = summarise(main)
    found = {
        "command": shlex.join(["python", "scripts/ablate.py", *cells[0]["overrides"], *_overrides(llavas)]),
        "split": cells[0]["split"],
        "items": {name: entry["base"]["number"] for name, entry in cells[0]["items"].items()},
        "time": time_spent([*cells, *llavas]),
        "base": base_of(cells),
        "main": [row(record) for record in main],
        "summary": summary,
        "contrasts": contrasts(main),
        "sweeps": sweeps(cells),
        "stage2": stage2(llavas),
        "diagnostics": {name: conflict([r for r in main if r["cell"]["objective"] == name]) for name in summary},
        "paper": ablations(),
    }
    return found | {"verdicts": verdicts(found)}


def row(record: Record) -> dict[str, Any]:
    """A cell: objective, seed, every measure, and its differences to the base."""
    measures = dict(record["measures"])
    ability = [measures[name] for name in D_ABILITY]
    measures["d_ability"] = {
        key: float(np.mean([entry[key] for entry in ability])) for key in ("base", "tower", "difference")
    }
    return {
        "objective": record["cell"]["objective"],
        "seed": record["cell"]["seed"],
        **{name: entry["tower"] for name, entry in measures.items()},
        "difference": {name: entry["difference"] for name, entry in measures.items()},
        "pairs_per_pattern": {name: entry["tower"] for name, entry in record["pairs_per_pattern"].items()},
        "diagnostics": record["diagnostics"],
        "seconds": seconds(record),
        "device": record["device"],
    }


def base_of(cells: Sequence[Record]) -> dict[str, Any]:
    """The untouched tower's measures, and in how many records it was measured otherwise (other libraries, devices)."""
    first = cells[0]
    bits = [{name: entry["base"] for name, entry in record["items"].items()} for record in cells]
    values = {name: entry["base"] for name, entry in first["measures"].items()}
    return {
        **values,
        "d_ability": float(np.mean([values[name] for name in D_ABILITY])),
        "pairs_per_pattern": {name: entry["base"] for name, entry in first["pairs_per_pattern"].items()},
        "records_that_measured_otherwise": sum(entry != bits[0] for entry in bits),
    }


def summarise(main: Sequence[Record]) -> dict[str, Any]:
    """Per objective: mean values, gains against the base and against `dcr`, exact tests per seed, Holm over objectives.

    Against `dcr` a tower is paired with that of the same seed.
    """
    summary: dict[str, Any] = {}
    for objective in dict.fromkeys(record["cell"]["objective"] for record in main):
        own = [record for record in main if record["cell"]["objective"] == objective]
        pairs = [(r, find(main, REFERENCE, r["cell"]["seed"])) for r in own if objective != REFERENCE]
        pairs = [(record, other) for record, other in pairs if other is not None]
        values = [row(record) for record in own]
        summary[objective] = {
            "seeds": [record["cell"]["seed"] for record in own],
            "mean": {name: float(np.mean([entry[name] for entry in values])) for name in GAINS},
            "gain": {name: over_seeds([change(record, name) for record in own]) for name in GAINS},
            "exact_tests": {name: [tested(record, name) for record in own] for name in ITEMS},
            "against_dcr": {name: over_seeds([change(r, name, other) for r, other in pairs]) for name in GAINS}
            if pairs
            else None,
            "exact_tests_against_dcr": {name: [tested(r, name, other) for r, other in pairs] for name in ITEMS},
        }
    _adjust([entry["gain"] for entry in summary.values()])
    _adjust([entry["against_dcr"] for entry in summary.values() if entry["against_dcr"] is not None])
    return summary


def contrasts(main: Sequence[Record]) -> list[dict[str, Any]]:
    """Each strategy of the paper's ablation against the one that it found better, paired by seed."""
    found = []
    for worse, better in itertools.pairwise(ORDER):
        own = [record for record in main if record["cell"]["objective"] == better]
        pairs = [(record, find(main, worse, record["cell"]["seed"])) for record in own]
        pairs = [(record, other) for record, other in pairs if other is not None]
        if pairs:
            gains = {name: over_seeds([change(record, name, other) for record, other in pairs]) for name in GAINS}
            found.append({"worse": worse, "better": better, "gain": gains})
    return found


def sweeps(cells: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per tried value, factor by factor; one seed, so that intervals cover the items alone."""
    default = find(cells, SWEEP_OBJECTIVE, SWEEP_SEED)
    order = list(SWEEPS)
    tried = [record for record in cells if record["cell"]["changes"]]
    tried.sort(key=lambda r: order.index(r["cell"]["factor"]) if r["cell"]["factor"] in order else len(order))
    rows = []
    for record in tried:
        names = {"factor": record["cell"]["factor"], "label": Cell(**record["cell"]).label}
        gains = {name: over_seeds([change(record, name)]) for name in GAINS}
        against = {name: over_seeds([change(record, name, default)]) for name in GAINS} if default else None
        exact = {name: tested(record, name, default) for name in ITEMS} if default else None
        rows.append(
            names
            | {"changes": record["cell"]["changes"], **row(record), "gain": gains}
            | {"against_default": against, "exact_tests_against_default": exact}
        )
    return rows


def stage2(llavas: Sequence[Record]) -> dict[str, Any]:
    """LLaVAs per arm and seed, and each arm's gain against the base's LLaVA of the same seed."""
    rows = [
        {
            "tower": record["arm"]["tower"],
            "seed": record["arm"]["seed"],
            **record["measures"],
            "seconds": seconds(record),
            "device": record["device"],
        }
        for record in sorted(llavas, key=lambda r: (STAGE2_ARMS.index(r["arm"]["tower"]), r["arm"]["seed"]))
    ]
    gains: dict[str, Any] = {}
    bases = {record["arm"]["seed"]: record for record in llavas if record["arm"]["tower"] == BASE}
    for arm in STAGE2_ARMS[1:]:
        pairs = [(r, bases[r["arm"]["seed"]]) for r in llavas if r["arm"]["tower"] == arm and r["arm"]["seed"] in bases]
        if not pairs:
            continue
        gains[arm] = {}
        for name in llavas[0]["items"]:
            bits = [[unpack_bits(record["items"][name]) for record in pair] for pair in pairs]
            deltas = [100 * (after.astype(float) - before) for after, before in bits]
            gains[arm][name] = over_seeds([(float(d.mean()), _weights(len(d)) @ d) for d in deltas])
            gains[arm][name]["exact_tests"] = [
                {"seed": pair[0]["arm"]["seed"], **mcnemar_exact(before, after)}
                for pair, (after, before) in zip(pairs, bits, strict=True)
            ]
    _adjust(list(gains.values()))
    return {"rows": rows, "gain": gains}


def conflict(records: Sequence[Record]) -> dict[str, Any] | None:
    """How often the two gradients pointed apart, over all looks of all seeds; None where nobody looked."""
    seen = [r["diagnostics"]["conflict"] for r in records if r["diagnostics"] and r["diagnostics"]["conflict"]]
    if not seen:
        return None
    shares = [100 * entry["negative"] / entry["looks"] for entry in seen]
    return {
        "looks": sum(entry["looks"] for entry in seen),
        "negative": sum(entry["negative"] for entry in seen),
        "share_per_seed": shares,
        "mean_cosine": float(np.average([e["mean_cosine"] for e in seen], weights=[e["looks"] for e in seen])),
    }


def seconds(record: Record) -> float:
    """Of a cell's own processes; its projector, which cells share, is counted apart."""
    own = [part for name, part in record["spent"].items() if part is not None and name != "projector"]
    return round(sum(part["ended"] - part["started"] for part in own), 1)


def time_spent(records: Sequence[Record]) -> dict[str, Any]:
    """Seconds of all processes, each run once, and of the clock while at least one of them ran."""
    spans = {}
    for record in records:
        for name, part in record["spent"].items():
            if part is not None:
                spans[part.get("run", (name, part["started"]))] = (part["started"], part["ended"])
    return {
        "process_seconds": round(sum(end - start for start, end in spans.values()), 1),
        "wall_clock_seconds": round(union(spans.values()), 1),
        "resumed_runs": len({p["run"] for r in records for p in r["spent"].values() if p and p.get("resumed")}),
        "devices": sorted({record["device"] for record in records}),
    }


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _overrides(llavas: Sequence[Record]) -> list[str]:
    return llavas[0]["overrides"] if llavas else []


def _adjust(gains: Sequence[dict[str, Any]]) -> None:
    """Holm over the objectives, measure by measure."""
    for name in gains[0] if gains else ():
        adjusted = holm({str(number): entry[name]["p_value"] for number, entry in enumerate(gains)})
        for number, entry in enumerate(gains):
            entry[name]["p_holm"] = adjusted[str(number)]


def _order(record: Record) -> tuple[int, int]:
    objective = record["cell"]["objective"]
    return (OBJECTIVES.index(objective) if objective in OBJECTIVES else len(OBJECTIVES)), record["cell"]["seed"]
