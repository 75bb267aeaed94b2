"""Stage 2 of the main objectives: a LLaVA on each tower, asked mini-MMVP and the held-out questions."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dcr_mllm.command import parse_stage
from dcr_mllm.config import differences, to_dict, with_defaults
from dcr_mllm.headers import resolve_weights
from dcr_mllm.runs import hash_directory
from scripts.ablation import running
from scripts.ablation.grid import BASE, CONFIG, OBJECTIVES, SEEDS, STAGE2_ARMS, Cell, Plan, digest, plan
from scripts.ablation.records import pack_bits, write_record
from scripts.ablation.running import Workshop
from stage2_llava.__main__ import CONFIGS
from stage2_llava.config import Stage2Config

PREFIX = "stage2."
"""Overrides that begin with it belong to stage 2."""

_NO_SETTING = ("run", "runs_dir", "towers", "num_workers", "save_every", "log_every", "report_to")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One LLaVA: whose tower it has, `base` or an objective's, and the seed of both stages."""

    tower: str
    seed: int

    @property
    def name(self) -> str:
        """Of its record."""
        return f"stage2-{self.tower}-seed{self.seed}"


def arms(objectives: Sequence[str] = OBJECTIVES, seeds: Sequence[int] = SEEDS) -> list[Arm]:
    """The base and those of the objectives that get LLaVAs, seed by seed."""
    return [Arm(tower, seed) for seed in seeds for tower in STAGE2_ARMS if tower == BASE or tower in objectives]


def pending_arms(shop: Workshop, wanted: Sequence[Arm], overrides: Sequence[str]) -> list[Arm]:
    """Arms without a record.

    Raises:
        UserError: A record is of other settings than would be run now.
    """
    return [
        arm
        for arm in wanted
        if not running.is_finished(
            shop, arm.name, functools.partial(_stale, settings_of(arm, plan_of(shop, arm), overrides))
        )
    ]


def run_arms(shop: Workshop, wanted: Sequence[Arm], overrides: Sequence[str]) -> list[str]:
    """Runs arms; returns what failed."""
    tasks = {arm.name: functools.partial(run_arm, shop, arm, overrides) for arm in wanted}
    return running.in_parallel(shop.jobs, tasks) if tasks else []


def plan_of(shop: Workshop, arm: Arm) -> Plan | None:
    """How the arm's tower is made; None for the base."""
    return None if arm.tower == BASE else plan(Cell(arm.tower, arm.seed), shop.overrides)


def settings_of(arm: Arm, of_tower: Plan | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Everything that decides about an arm, without names and places."""
    config = parse_stage([CONFIG, *_arguments(arm, overrides)], Stage2Config, CONFIGS, prog="", description="")[1]
    return {
        "stage2": {key: value for key, value in to_dict(config).items() if key not in _NO_SETTING},
        "tower": None if of_tower is None else of_tower.settings,
        "weights": {
            "tower": hash_directory(resolve_weights(CONFIG, "tower")),
            "llm": hash_directory(resolve_weights(str(config.llm), "llm")),
        },
    }


def run_arm(shop: Workshop, arm: Arm, overrides: Sequence[str]) -> None:
    """Makes the tower if it is not there, trains the LLaVA on it, asks it, and writes its record."""
    of_tower = plan_of(shop, arm)
    settings = settings_of(arm, of_tower, overrides)
    tower, spent = CONFIG, {}
    if of_tower is not None:
        made, made_in = running.ensure_tower(shop, Cell(arm.tower, arm.seed), of_tower)
        tower, spent = str(made / "tower"), made_in
    run = f"{arm.name}-{digest(settings)}"
    llava = shop.runs_dir / run / arm.tower / "llava"
    towers = f"towers={json.dumps({arm.tower: tower})}"
    spent["llava"] = {
        "run": run,
        **running.ensure_run(shop, run, [*_arguments(arm, overrides), towers], "stage2_llava"),
    }
    started, answers = time.time(), shop.runs_dir / f"{run}-answers"
    command = [sys.executable, "eval/run.py", "--tasks", "mmvp", "--data", "mini", "--models", str(llava)]
    log = shop.runs_dir / "logs" / f"{run}.log"
    running.call([*command, "--out", str(answers)], log, shop.threads, running.held())
    spent["measuring"] = {"started": started, "ended": time.time()}
    record = {
        "kind": "stage2",
        "arm": dataclasses.asdict(arm),
        "overrides": list(overrides),
        "settings": settings,
        **read_answers(shop.runs_dir / run, answers),
        **running.told(shop, spent),
    }
    write_record(shop.out, arm.name, record)
    shutil.rmtree(llava.parent / "checkpoints", ignore_errors=True)


def read_answers(run: Path, answers: Path) -> dict[str, Any]:
    """What a record keeps: percentages, and right or wrong per pair and per held-out question.

    Args:
        run: Finished run of stage 2 with one arm.
        answers: Finished evaluation of its LLaVA on mini-MMVP.
    """
    heldout = json.loads((run / "heldout.json").read_text(encoding="utf-8"))
    ((name, entry),) = heldout["llavas"].items()
    scores = json.loads((answers / "results.json").read_text(encoding="utf-8"))["scores"]
    ((model, benchmarks),) = scores.items()
    ((benchmark, score),) = benchmarks.items()
    lines = (answers / "answers" / model / f"{benchmark}.jsonl").read_text(encoding="utf-8").splitlines()
    right = [json.loads(line)["right"] for line in lines]
    pairs = [first and second for first, second in zip(right[::2], right[1::2], strict=True)]
    return {
        "measures": {
            "mmvp_pairs": score["measures"]["pair_accuracy"],
            "mmvp_single": score["measures"]["accuracy"],
            "heldout": entry["accuracy"],
            "heldout_blind": entry["blind"],
        },
        "items": {
            "mmvp_pairs": pack_bits(pairs),
            "heldout": pack_bits([record[name] for record in heldout["records"]]),
        },
    }


def _arguments(arm: Arm, overrides: Sequence[str]) -> list[str]:
    return [*(word.removeprefix(PREFIX) for word in overrides), f"seed={arm.seed}", "stage1=null"]


def _stale(wanted: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """What differs between a record and what would be run."""
    stored = dict(record["settings"])
    full = with_defaults(Stage2Config, stored["stage2"])
    changes = differences({key: value for key, value in full.items() if key not in _NO_SETTING}, wanted["stage2"])
    if (stored["tower"] is None) != (wanted["tower"] is None):
        changes.append("tower: one of the two is the base")
    elif wanted["tower"] is not None:
        changes += running.changed_settings(stored["tower"], wanted["tower"])
    return changes + ([] if stored["weights"] == wanted["weights"] else ["weights of the miniature"])
