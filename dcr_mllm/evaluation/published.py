"""Published numbers (`published.yaml`, with sources) for the backbone of what was measured here."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from dcr_mllm.headers import read_json

# Columns of the published LLaVA-1.5 tables: the task and the measure that they are here.
_COLUMNS = {
    "mmvp": ("mmvp", "pair_accuracy"),
    "naturalbench_acc": ("naturalbench", "accuracy"),
    "naturalbench_q": ("naturalbench", "Q"),
    "naturalbench_i": ("naturalbench", "I"),
    "naturalbench_g": ("naturalbench", "G"),
    "cvbench2d_ade": ("cv_bench", "accuracy_ADE20K"),
    "cvbench2d_coco": ("cv_bench", "accuracy_COCO"),
    "cvbench3d": ("cv_bench", "accuracy_3d"),
    "pope_random": ("pope", "f1_random"),
    "pope_popular": ("pope", "f1_popular"),
    "pope_adversarial": ("pope", "f1_adversarial"),
    "pope_f1": ("pope", "f1"),
    "mme_perception": ("mme", "sum_perception"),
    "scienceqa_img": ("scienceqa_img", "accuracy"),
    "mmvp_pair": ("mmvp", "pair_accuracy"),
    "mmvp_single": ("mmvp", "accuracy"),
}
_LLMS = {"vicuna-7b": "vicuna-7b", "vicuna-13b": "vicuna-13b"}


@functools.cache
def _published() -> dict[str, Any]:
    import yaml

    return yaml.safe_load((Path(__file__).parent / "published.yaml").read_text(encoding="utf-8"))


def ablations() -> list[dict[str, Any]]:
    """Published ablations: `source`, `confidence` and `rows` by name."""
    return _published()["ablations"]


def backbone_of(path: str | Path) -> tuple[str | None, str | None]:
    """The published names of a model's original tower and LLM (such as `openai-l14-336`, `vicuna-7b`), if known.

    Follows the provenance of a LLaVA to its tower, and of a tower to what it was made from.

    Args:
        path: LLaVA or tower directory.
    """
    path = Path(path)
    config, tower, llm = _config(path), str(path), None
    towers = config.get("towers")
    if isinstance(towers, dict):
        arm = path.parent.name if path.name == "llava" else path.name
        tower, llm = str(towers.get(arm, "")), _published_llm(str(config.get("llm")))
    for _ in range(5):  # a tower made from a tower made from ...
        base = read_json(Path(tower) / "provenance.json").get("base_tower") if _has_provenance(tower) else None
        if not base:
            break
        tower = str(base["path"] if isinstance(base, dict) else base)
    return _published_tower(tower), llm


def published_rows(
    backbone: tuple[str | None, str | None], measured: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """Published numbers of the same backbone for what was measured here.

    Args:
        backbone: As `backbone_of` has it.
        measured: The baseline's measures by task.

    Returns:
        Rows with `task`, `measure`, `method`, `value`, `ours` (the baseline's), `source`, `confidence`.
    """
    tower, llm = backbone
    rows: list[dict[str, Any]] = []

    def add(task: str, measure: str, method: str, value: float, entry: dict[str, Any]) -> None:
        if measure in measured.get(task, {}):
            rows.append(
                {
                    "task": task,
                    "measure": measure,
                    "method": method,
                    "value": value,
                    "ours": measured[task][measure],
                    "source": entry["source"],
                    "confidence": entry["confidence"],
                }
            )

    content = _published()
    for entry in content["mmvp_vlm_averages"]:
        if tower in entry["values"]:
            add("mmvp_vlm", "pair_accuracy", entry["method"], entry["values"][tower]["avg"], entry)
    if tower == "openai-l14-336" and llm:  # the tower of LLaVA-1.5
        for entry in content["mllm_llava15"]:
            named = entry.get("rows_by_name", {}).get(llm, {})
            listed = {
                method: dict(zip(entry.get("columns", ()), values, strict=True))
                for method, values in entry.get("rows", {}).get(llm, {}).items()
            }
            for method, values in {**listed, **named}.items():
                for column, value in values.items():
                    if column in _COLUMNS:
                        add(*_COLUMNS[column], method, value, entry)
        zoo = content["llava15_model_zoo"]
        for name, values in zoo["rows"].items():
            if name.split("_")[0] == llm.removeprefix("vicuna-"):
                for column, value in zip(zoo["columns"], values, strict=True):
                    if column in _COLUMNS:
                        add(*_COLUMNS[column], f"LLaVA-1.5 {name.replace('_', ' ')}", value, zoo)
    return sorted(rows, key=lambda row: (row["task"], row["measure"]))


def _config(path: Path) -> dict[str, Any]:
    return read_json(path / "provenance.json").get("config", {}) if _has_provenance(path) else {}


def _has_provenance(path: str | Path) -> bool:
    return (Path(path) / "provenance.json").is_file()


def _published_tower(path: str) -> str | None:
    for name, hub_id in _published()["backbones"]["hub_ids"].items():
        parts = Path(path).parts
        if path == hub_id or f"models--{hub_id.replace('/', '--')}" in parts or hub_id.split("/")[1] in parts[-1:]:
            return name
    return None


def _published_llm(path: str) -> str | None:
    return next((name for word, name in _LLMS.items() if word in path.lower()), None)
