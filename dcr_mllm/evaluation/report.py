"""The page that a person looks at: verdict first, then every measure, what changed per pattern, the pairs that flipped.

One HTML file without a single request to elsewhere, for light and dark, wide and narrow screens; and the same in
Markdown without pictures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dcr_mllm.evaluation import table
from dcr_mllm.evaluation.galleries import flipped_pairs
from dcr_mllm.evaluation.published import backbone_of, published_rows
from dcr_mllm.evaluation.report_plots import drift_plot, interval_plot, pattern_plot
from dcr_mllm.evaluation.scored import Scored
from dcr_mllm.evaluation.scorers import POPE_CATEGORIES, SCORERS
from dcr_mllm.evaluation.statistics import Resampler, interval
from dcr_mllm.runs import write_text_atomic

if TYPE_CHECKING:
    import jinja2

    from dcr_mllm.evaluation.mllm_data import TaskData


def write_report(
    results: dict[str, Any],
    tasks: Mapping[str, TaskData],
    items: Mapping[str, dict[str, list[dict[str, Any]]]],
    scored: Mapping[str, dict[str, Scored]],
    out: Path,
) -> None:
    """Write `report.html` and `report.md`.

    Args:
        results: As in `results.json`.
        tasks: MLLM benchmarks by task.
        items: Answers by model and name of the benchmark.
        scored: The same, scored; also the tower benchmarks.
        out: Folder.
    """
    environment = page_environment()
    page = _page(results, tasks, items, scored)
    for name in ("report.html", "report.md"):
        write_text_atomic(out / name, environment.get_template(f"{name}.jinja").render(page))


def page_environment(*folders: Path) -> jinja2.Environment:
    """Templates of these folders, then those beside this module, such as the `style.css` that pages include."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent / "templates"]),
        autoescape=lambda name: name is not None and "html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def _page(
    results: dict[str, Any],
    tasks: Mapping[str, TaskData],
    items: Mapping[str, dict[str, list[dict[str, Any]]]],
    scored: Mapping[str, dict[str, Scored]],
) -> dict[str, Any]:
    groups: dict[str, list[str]] = results["config"]["groups"]
    first, *others = groups
    names = list(next(iter(results["scores"].values())))
    judges = {data.name: SCORERS[task].judge for task, data in tasks.items()}
    galleries = [
        gallery
        for task, data in tasks.items()
        if task == "mmvp"
        for other in others
        for gallery in flipped_pairs(
            data,
            groups[first][0],
            groups[other][0],
            {model: entries[data.name] for model, entries in items.items()},
            {model: entries[data.name] for model, entries in scored.items()},
        )
    ]
    return {
        "title": f"{' and '.join(others) or first}{f' against {first}' if others else ''}",
        "subtitle": _subtitle(results, names),
        "verdicts": _verdicts(results),
        "training": sorted(
            {entry["training"] for found in results["comparisons"].values() for entry in found.values()}
        ),
        "differences": results["differences"],
        "models": list(results["scores"]),
        "others": others,
        "first": first,
        "tables": [_table(results, name, judges.get(name)) for name in names],
        "plots": _plots(tasks, scored),
        "galleries": galleries,
        "towers": _towers(results),
        "published": _published(results, {data.name: task for task, data in tasks.items()}),
        "passed_through": [
            (model, task, ", ".join(f"{_words(name)} {value:.4g}" for name, value in values.items()))
            for model, found in results["passed_through"].items()
            for task, values in found.items()
        ],
        "undecodable": [
            (name, f"{len(rows)}: " + "; ".join(f"{row}, {problem}" for row, problem in list(rows.items())[:20]))
            for name, rows in results["undecodable"].items()
        ],
        "notes": [f"{name}: {note}" for name, notes in results["notes"].items() for note in notes],
        "provenance": _provenance(results),
    }


def _subtitle(results: dict[str, Any], names: Sequence[str]) -> str:
    if names and all(name.startswith("mini-") for name in names):
        return (
            "Drawn benchmarks of the miniature: a controlled experiment whose numbers say nothing about real "
            "benchmarks or models."
        )
    return f"Benchmarks: {', '.join((*names, *dict.fromkeys(_other_tasks(results))))}."


def _other_tasks(results: dict[str, Any]) -> list[str]:
    return [task for found in results["passed_through"].values() for task in found]


def _verdicts(results: dict[str, Any]) -> list[dict[str, str]]:
    found = []
    first = next(iter(results["config"]["groups"]))
    for model, tasks in results["comparisons"].items():
        for task, entry in tasks.items():
            headline = entry["measures"][entry["headline"]]
            low, high = headline["interval"]
            sentence = (
                f"{model} {headline['model']:.1f}, {first} {headline['base']:.1f} ({_words(entry['headline'])}): "
                f"{headline['difference']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}; {entry['test']}, "
                f"p {entry['p_value']:.2g}, {entry['p_holm']:.2g} after Holm; {entry['gained']} gained, "
                f"{entry['lost']} lost."
            )
            if entry["caution"]:
                sentence += f" Caution: {entry['caution']}."
            kind = entry["verdict"] if entry["verdict"] in ("better", "worse") else ""
            title = f"{task}, {model}" if len(results["comparisons"]) > 1 else task
            found.append({"task": title, "words": entry["verdict"], "kind": kind, "sentence": sentence})
    return found


def _table(results: dict[str, Any], task: str, judge: str | None) -> dict[str, Any]:
    scores = {model: entries[task] for model, entries in results["scores"].items()}
    first = next(iter(scores.values()))
    comparisons = [tasks[task] for tasks in results["comparisons"].values()]
    rows = []
    for name in first["measures"]:
        differences = []
        for entry in comparisons:
            low, high = entry["measures"][name]["interval"]
            points = f"{entry['measures'][name]['difference']:+.1f}"
            differences.append({"points": points, "interval": f"{low:+.1f} … {high:+.1f}"})
        values = [f"{entry['measures'][name]:.1f}" for entry in scores.values()]
        headline = any(entry["headline"] == name for entry in comparisons)
        rows.append({"name": _words(name), "cells": values, "differences": differences, "headline": headline})
    unparsable = [str(entry["unparsable"]) for entry in scores.values()]
    empty = [{"points": "", "interval": ""} for _ in comparisons]
    if task.removeprefix("mini-") in SCORERS:
        rows.append({"name": "answers that say nothing", "cells": unparsable, "differences": empty, "headline": False})
    own = [
        f"{model}: " + ", ".join(f"{_words(name)} {value:.4g}" for name, value in entry["lmms_eval"].items())
        for model, entry in scores.items()
        if entry["lmms_eval"]
    ]
    return {"task": task, "questions": first["questions"], "rows": rows, "judge": judge, "lmms_eval": own}


def _words(name: str) -> str:
    return name.replace("_", " ").replace("f1", "F1")


def _plots(tasks: Mapping[str, TaskData], scored: Mapping[str, dict[str, Scored]]) -> list[tuple[str, Any]]:
    """Pairs by pattern where the data name patterns (MMVP itself does not), F1 by category of POPE."""
    from markupsafe import Markup

    plots = []
    for task, data in tasks.items():
        runs = {model: entries[data.name] for model, entries in scored.items()}
        patterns = [str(row.get("Pattern") or "") for row in data.rows[::2]]
        units = {model: entry.units for model, entry in runs.items() if entry.units is not None}
        if task == "mmvp" and all(patterns) and units:
            plots.append((f"{data.name}: pairs by pattern", Markup(pattern_plot(patterns, units))))
        if task == "pope":
            found = [f"f1_{name}" for name in POPE_CATEGORIES if f"f1_{name}" in next(iter(runs.values())).values()]
            plots.append((f"{data.name}: F1 by category", _interval_plot(runs, found, "F1, %, 95 % intervals")))
    for name in {name for entries in scored.values() for name in entries if name.endswith("mmvp_vlm")}:
        runs = {model: entries[name] for model, entries in scored.items()}
        found = [measure for measure in next(iter(runs.values())).values() if measure.startswith("accuracy_")]
        caption = "pairs right, %, 95 % intervals; dotted: chance"
        plots.append((f"{name}: pairs by pattern", _interval_plot(runs, found, caption, chance=25)))
    return plots


def _interval_plot(
    runs: Mapping[str, Scored], measures: Sequence[str], caption: str, chance: float | None = None
) -> Any:
    from markupsafe import Markup

    rows = {model: _intervals(entry, measures) for model, entry in runs.items()}
    return Markup(interval_plot([name.split("_", 1)[1] for name in measures], rows, caption, chance))


def _intervals(entry: Scored, measures: Sequence[str]) -> list[tuple[float, float, float]]:
    """Each measure with the ends of its 95 % interval; a resample that lacks a measure's items does not count."""
    weights = Resampler(len(entry.clusters), entry.clusters, seed=0).weights().astype(np.float32)
    drawn, whole = entry.resample(weights), entry.values()
    ends = [interval(drawn[name][~np.isnan(drawn[name])]) for name in measures]
    return [(whole[name], low, high) for name, (low, high) in zip(measures, ends, strict=True)]


def _towers(results: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured of the towers in the models when they were made, where it lies beside them."""
    from markupsafe import Markup

    measures, drifts = [], {}
    for group in list(results["config"]["groups"])[1:]:
        model = results["config"]["groups"][group][0]
        record = _tower_record(Path(results["config"]["models"][model]))
        for name, comparison in (record or {}).get("comparisons", {}).items():
            title = group if len(record["comparisons"]) == 1 else f"{group}, {name}"  # type: ignore[index]
            if comparison["drift"]:
                drifts[title] = comparison["drift"]
            for measure, entry in comparison["measures"].items():
                low, high = entry["interval"]
                measures.append(
                    (
                        title,
                        table.label(measure),
                        f"{entry['base']:.1f}",
                        f"{entry['tower']:.1f}",
                        f"{entry['difference']:+.1f}",
                        f"{low:+.1f} … {high:+.1f}",
                    )
                )
    if not measures:
        return None
    return {"rows": measures, "drift": Markup(drift_plot(drifts)) if drifts else None}


def _tower_record(model: Path) -> dict[str, Any] | None:
    """`tower_evaluation.json` of the run that made a model's tower; None unless it is of exactly that tower."""
    from dcr_mllm.errors import UserError
    from dcr_mllm.evaluation.tower_tasks import tower_of
    from dcr_mllm.runs import hash_directory

    try:
        tower = tower_of(model)
    except UserError:  # a LLaVA whose tower is not at hand
        return None
    record = tower.parent / "evaluation" / "tower_evaluation.json"
    if not record.is_file():
        return None
    found = json.loads(record.read_text(encoding="utf-8"))
    measured = {entry["description"]["sha256"] for entry in found["towers"].values()}
    return found if hash_directory(tower) in measured else None


def _published(results: dict[str, Any], tasks: Mapping[str, str]) -> list[dict[str, Any]]:
    first = results["config"]["groups"][next(iter(results["config"]["groups"]))][0]
    measured = {tasks.get(name, name): entry["measures"] for name, entry in results["scores"][first].items()}
    if all(name.startswith("mini-") for name in results["scores"][first]):
        return []
    return published_rows(backbone_of(results["config"]["models"][first]), measured)


def _provenance(results: dict[str, Any]) -> list[tuple[str, str]]:
    config = results["config"]
    rows = [(name, f"{path}, sha256 {config['model_hashes'][name][:16]}…") for name, path in config["models"].items()]
    rows += [("data", str(config["data"])), ("decoding", f"{results['decoding']}, batches of {config['batch_size']}")]
    rows += [("device", config["device"]), ("limit", "none" if config["limit"] is None else str(config["limit"]))]
    for entry in list(results["conditions"].values())[:1]:
        shown = {"precision": entry["precision"], "template": entry["template"], "images": entry["image_padding"]}
        rows += [(key, str(value)) for key, value in shown.items()]
        rows += [(f"data {task}", f"sha256 {digest[:16]}…") for task, digest in entry["data"].items()]
    packages = {name: version for name, version in results["packages"].items() if version}
    return [*rows, ("packages", ", ".join(f"{name} {version}" for name, version in packages.items()))]
