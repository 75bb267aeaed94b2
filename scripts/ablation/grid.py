"""What is tried: the grid as plain data, and a cell of it as a config of stage 1.

To try something else, add a line to `SWEEPS`, or an objective to `OBJECTIVES`; its cell runs with the next
`python scripts/ablate.py`, and nothing else does.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dcr_mllm.config import differences, to_dict, with_defaults
from dcr_mllm.errors import UserError
from dcr_mllm.headers import resolve_weights
from dcr_mllm.runs import hash_directory
from stage1_dcr.__main__ import parse
from stage1_dcr.config import Stage1Config

CONFIG = "mini"
OBJECTIVES = ("dcr", "reconstruction", "contrastive", "joint", "dcr-end-to-end")
SEEDS = (0, 1, 2)

# One factor at a time around the objective `dcr` at one seed. The default's own value is the main table's cell.
SWEEP_OBJECTIVE, SWEEP_SEED = "dcr", 0
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "temperature": [{"tau": 0.03}, {"tau": 0.3}],
    "negatives": [{"negatives": 1}, {"negatives": 3}],  # of the 7 others in a batch of 8
    "LoRA rank": [{"lora_rank": 4, "lora_alpha": 4}, {"lora_rank": 64, "lora_alpha": 64}],  # scaled by 1 throughout
    "tower steps": [{"tower_steps": 175}, {"tower_steps": 700}],
    "timesteps": [{"timestep_range": [0, 500]}, {"timestep_sampling": "logit-normal"}],
    "keep close": [{"keep_close": 0.0}, {"keep_close": 10.0}, {"keep_close_tokens": "class+patches"}],
    "condition": [{"condition": "class+pooled-patches"}, {"condition": "pooled-patches@-2"}],
    "positives": [{"positives": "view"}, {"positives": "target"}],
}

# In one phase, end to end, projector and tower get as many steps as in two.
OBJECTIVE_SETTINGS: dict[str, dict[str, Any]] = {"dcr-end-to-end": {"tower_steps": 800}}

# LLaVAs are trained on the untouched tower and on these objectives' towers, at every seed.
BASE = "base"
STAGE2_ARMS = (BASE, "dcr", "reconstruction")

# What every cell starts from. Written out, so that other defaults of the miniature do not make finished cells stale.
SETTINGS: dict[str, Any] = {
    "projector_width": 256,
    "projector_steps": 450,
    "projector_learning_rate": 1e-3,
    "tower_steps": 350,
    "tower_learning_rate": 5e-4,
    "batch_size": 8,
    "accumulation": 1,
    "tau": 0.1,
    "contrastive_weight": 1.0,
    "reconstruction_weight": 1.0,
    "positives": "view+target",
    "negatives": "local",
    "condition": "class",
    "timestep_range": [0, 1000],
    "timestep_sampling": "uniform",
    "keep_close": 3.0,
    "keep_close_tokens": "class",
    "keep_close_distance": "cosine",
    "lora_rank": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "select": "final",
}

# Of every cell; they change no tower.
BOOKKEEPING: dict[str, Any] = {"evaluate": False, "report_to": "none", "diagnose_every": 25, "validation": None}

# A cell that changes one of these trains a projector of its own. All other changes are made in the tower phase alone,
# behind the projector that all cells of a seed share.
PROJECTOR_SETTINGS = (
    "condition",
    "projector_objective",
    "projector_width",
    "projector_steps",
    "projector_learning_rate",
)

# Of the config: names and places, and what changes nothing about a tower.
_NO_SETTING = (
    *("run", "runs_dir", "projector", "num_workers", "save_every", "log_every"),
    *("evaluate", "report_to", "diagnose_every", "validation", "validate_every", "zero_shot_margin"),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One tower: an objective, a seed, and what is changed besides.

    Attributes:
        objective: Of the config.
        seed: Of everything random.
        changes: Further settings by key of the config.
        factor: The sweep that it belongs to; None in the main table.
    """

    objective: str
    seed: int
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    factor: str | None = None

    @property
    def name(self) -> str:
        """Of its record and, with a digest of its settings, of its run."""
        words = [self.objective, f"seed{self.seed}", *(f"{key}-{_text(value)}" for key, value in self.changes.items())]
        return re.sub(r"[^\w.+]+", "-", "-".join(words)).strip("-")

    @property
    def label(self) -> str:
        """What is changed, for tables."""
        return ", ".join(f"{key}={_text(value)}" for key, value in self.changes.items())


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a cell runs.

    Attributes:
        settings: Resolved configs of its `tower` and `projector` phase (None without one), without names and places.
        tower, projector: Overrides of the config `mini` for the two runs, without names and places.
    """

    settings: dict[str, dict[str, Any] | None]
    tower: list[str]
    projector: list[str] | None


def main_cells(objectives: Sequence[str] = OBJECTIVES, seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """The main table, seed by seed."""
    return [Cell(objective, seed) for seed in seeds for objective in objectives]


def sweep_cells() -> list[Cell]:
    """All sweeps, factor by factor."""
    return [Cell(SWEEP_OBJECTIVE, SWEEP_SEED, changes, factor) for factor, tried in SWEEPS.items() for changes in tried]


def plan(cell: Cell, overrides: Sequence[str] = ()) -> Plan:
    """Resolves a cell.

    Args:
        cell: What is asked for.
        overrides: `key=value` for every cell, behind `SETTINGS`; what the cell says itself comes after them.
    """
    own = {"objective": cell.objective, "seed": cell.seed, **OBJECTIVE_SETTINGS.get(cell.objective, {})}
    common = [*_arguments(SETTINGS), *overrides]
    tower = [*common, *_arguments({**BOOKKEEPING, **own, **cell.changes})]
    wanted = _config(*tower, "projector=shared")
    projector = None
    if wanted.steps_of("projector"):
        of_projector = {key: value for key, value in cell.changes.items() if key in PROJECTOR_SETTINGS}
        of_projector |= {"objective": "dcr", "projector_objective": wanted.objective_of("projector")}
        # keep_close belongs to the tower phase, and would only be remarked upon.
        off = {"seed": cell.seed, "tower_steps": 0, "keep_close": 0.0, "evaluate": False, "report_to": "none"}
        projector = [*common, *_arguments({**of_projector, **off})]
        tower.append("projector_steps=0")
        wanted = dataclasses.replace(wanted, projector_steps=0)
    settings = {"tower": settings_of(wanted), "projector": projector and settings_of(_config(*projector))}
    return Plan(settings, tower, projector)


def settings_of(config: Stage1Config | Mapping[str, Any]) -> dict[str, Any]:
    """A config, resolved or from a record, without names, places and what changes no tower."""
    values = to_dict(config) if isinstance(config, Stage1Config) else with_defaults(Stage1Config, config)
    return {key: value for key, value in values.items() if key not in _NO_SETTING}


def changed_settings(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between a record's settings and those of a plan; keys that were added since have their defaults."""
    lines = []
    for phase in ("projector", "tower"):
        before, now = stored[phase], wanted[phase]
        if before is None or now is None:
            lines += [] if before is now else [f"{phase} phase: {'none' if before is None else 'one'} before"]
        else:
            lines += [f"{phase}: {line}" for line in differences(settings_of(before), now)]
    return lines


def digest(settings: Any) -> str:
    """Eight digits that name settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


@functools.cache
def weights(tower: str, denoiser: str) -> dict[str, str]:
    """Hashes of the models that a cell starts from."""
    named = {"tower": resolve_weights(tower, "tower"), "denoiser": resolve_weights(denoiser, "denoiser")}
    return {name: hash_directory(path) for name, path in named.items()}


def check_names(cells: Sequence[Cell]) -> None:
    """Refuses a grid in which two cells would have one record."""
    names = [cell.name for cell in cells]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"the grid has {min(twice)} twice; take one of the two out of scripts/ablation/grid.py.")


@functools.cache
def _config(*overrides: str) -> Stage1Config:
    return parse([CONFIG, *overrides])[1]


def _arguments(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={_text(value)}" for key, value in values.items()]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
