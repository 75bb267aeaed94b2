"""Finished cells: one small JSON each, from which every table is made.

Right or wrong per item is kept as bits (hexadecimal text), and the bootstrap draws of what is no mean over items as
float32 (base64), so that any two cells can be compared later, pair by pair, without a single model.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dcr_mllm.errors import UserError
from dcr_mllm.runs import write_json_atomic

VERSION = 1

# Measured item by item: where `tower_evaluation.json` has them.
ITEMS = {"pairs": ("mmvp_vlm", "pairs"), "zero_shot": ("zero_shot", "correct"), "knn": ("knn", "correct")}
# Kept as draws: differences to the base in resamples that are the same for every cell, so many at most.
DRAWN = ("probes_mean", "nmi", "acc", "ari")
NUM_DRAWS = 1000


def pack_bits(values: ArrayLike) -> dict[str, Any]:
    """[N] of true and false as a number of items and their bits."""
    array = np.asarray(values, dtype=bool)
    return {"number": len(array), "bits": np.packbits(array).tobytes().hex()}


def unpack_bits(packed: Mapping[str, Any]) -> np.ndarray:
    """[N] bool, as `pack_bits` was given."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(packed["bits"]), np.uint8), count=packed["number"]).astype(bool)


def pack_draws(values: ArrayLike) -> str:
    """[R] numbers as float32 in base64."""
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()


def unpack_draws(packed: str) -> np.ndarray:
    """[R] float64, as `pack_draws` was given, to seven digits."""
    return np.frombuffer(base64.b64decode(packed), "<f4").astype(float)


def measured(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What a record keeps of a `tower_evaluation.json` with a base and one tower."""
    base, tower = evaluation["towers"].values()
    (comparison,) = evaluation["comparisons"].values()
    names = {"mmvp_vlm": "pairs"}
    patterns = base["mmvp_vlm"]["per_pattern"]
    return {
        "measures": {
            names.get(name, name): {key: entry[key] for key in ("base", "tower", "difference", "interval")}
            for name, entry in comparison["measures"].items()
        },
        "pairs_per_pattern": {
            pattern: {
                "base": patterns[pattern]["accuracy"],
                "tower": tower["mmvp_vlm"]["per_pattern"][pattern]["accuracy"],
            }
            for pattern in patterns
        },
        "items": {
            name: {which: pack_bits(report[task][key]) for which, report in (("base", base), ("tower", tower))}
            for name, (task, key) in ITEMS.items()
        },
        "draws": {name: pack_draws(comparison["measures"][name]["draws"][:NUM_DRAWS]) for name in DRAWN},
        "benchmarks": {
            **evaluation["settings"]["mmvp_vlm"]["sha256"],
            **evaluation["settings"]["labelled"]["sha256"],
        },
    }


def diagnosed(lines: Iterable[str]) -> dict[str, Any] | None:
    """Summary of a run's `diagnostics.jsonl`; None where nothing was looked at."""
    looks = [json.loads(line) for line in lines if line.strip()]
    if not looks:
        return None
    last = looks[-1]
    conflicts = [look["conflict"] for look in looks if look["conflict"]]
    cosines = [conflict["cosine"] for conflict in conflicts if conflict["cosine"] is not None]  # a gradient may be 0
    summary: dict[str, Any] = {"looks": len(looks), "last_step": last["step"], "conflict": None}
    if cosines:
        negative = sum(cosine < 0 for cosine in cosines)
        norms = {key: [c[f"norm_{key}"] for c in conflicts] for key in ("contrastive", "reconstruction")}
        summary["conflict"] = {
            "looks": len(cosines),
            "negative": negative,
            "mean_cosine": float(np.mean(cosines)),
            "norms": {key: {"mean": float(np.mean(v)), "min": min(v), "max": max(v)} for key, v in norms.items()},
        }
    for key in ("effective_rank", "uniformity", "alignment"):
        summary[key] = last.get(key)
    # Hidden states from the embeddings to the last block: LLaVA reads the last but one.
    drift = last.get("drift") or {}
    summary["drift_at_llava_layer"] = {k: v[-2] for k, v in drift.items() if v and v[-2] is not None}
    return summary


def write_record(directory: Path, name: str, record: Mapping[str, Any]) -> None:
    """A finished cell; from here on it does not run again."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json_atomic(directory / f"{name}.json", {"version": VERSION, **record})


def read_record(file: Path) -> dict[str, Any]:
    """One record.

    Raises:
        UserError: The file is damaged or of another version.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}); restore it, or delete it to run its cell again.") from None
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise UserError(f"{file} is no record of version {VERSION}; delete it to run its cell again.")
    return record


def read_records(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """All records by kind, `cell` and `stage2`.

    Raises:
        UserError: There is none, or some were measured on other data, from other models or with other overrides than
            the rest.
    """
    found: dict[str, list[dict[str, Any]]] = {"cell": [], "stage2": []}
    first: dict[str, tuple[Path, dict[str, Any]]] = {}
    for file in sorted(directory.glob("*.json")):
        record = read_record(file)
        if record["kind"] == "cell":
            shared = {key: record[key] for key in ("split", "overrides", "weights", "benchmarks")}
        else:
            shared = {"overrides": record["overrides"], "weights": record["settings"]["weights"]}
        other, wanted = first.setdefault(record["kind"], (file, shared))
        for key, value in shared.items():
            if value != wanted[key]:
                raise UserError(
                    f"{file} and {other} differ in {key}, so they are not of one table; move one of them away."
                )
        found[record["kind"]].append(record)
    if not found["cell"]:
        raise UserError(f"{directory} has no finished cell; run python scripts/ablate.py first.")
    return found


def find(records: Sequence[dict[str, Any]], objective: str, seed: int) -> dict[str, Any] | None:
    """The record of a cell without changes."""
    wanted = {"objective": objective, "seed": seed, "changes": {}}
    return next((r for r in records if {key: r["cell"][key] for key in wanted} == wanted), None)
