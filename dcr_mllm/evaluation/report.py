"""The page that a person looks at: verdict first, then every measure, what changed per pattern, the pairs that flipped.

One HTML file without a single request to elsewhere, for light and dark, wide and narrow screens.
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dcr_mllm.evaluation.scored import Scored
from dcr_mllm.evaluation.scorers import SCORERS
from dcr_mllm.runs import write_text_atomic

if TYPE_CHECKING:
    from dcr_mllm.evaluation.mllm_tasks import TaskData

_MAX_PAIRS = 12
_INK = "#010203"  # replaced by the page's text colour


def write_report(
    results: dict[str, Any],
    tasks: dict[str, TaskData],
    items: dict[str, dict[str, list[dict[str, Any]]]],
    scored: dict[str, dict[str, Scored]],
    out: Path,
) -> None:
    """Write the report.

    Args:
        results: As in `results.json`.
        tasks: Rows with images, by task.
        items: Answers by model and task name.
        scored: The same, scored.
        out: HTML file.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    models = list(results["config"]["models"])
    data = {found.name: (name, found) for name, found in tasks.items()}
    page = environment.get_template("report.html.jinja").render(
        title=f"{' and '.join(models[1:]) or models[0]}{f' against {models[0]}' if models[1:] else ''}",
        subtitle=_subtitle(results, list(data)),
        verdicts=_verdicts(results),
        models=models,
        others=models[1:],
        tables=[_table(results, task, SCORERS[data[task][0]].judge) for task in data],
        plot=_plot(data, scored),
        galleries=_galleries(models, data, items, scored),
        provenance=_provenance(results),
    )
    write_text_atomic(out, page)


def _subtitle(results: dict[str, Any], names: Sequence[str]) -> str:
    if all(name.startswith("mini-") for name in names):
        return (
            "Drawn benchmarks of the miniature: a controlled experiment whose numbers say nothing about MMVP or POPE."
        )
    return f"Benchmarks: {', '.join(names)}."


def _verdicts(results: dict[str, Any]) -> list[dict[str, str]]:
    found = []
    first = next(iter(results["config"]["models"]))
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
    rows.append({"name": "answers that say nothing", "cells": unparsable, "differences": empty, "headline": False})
    return {"task": task, "questions": first["questions"], "rows": rows, "judge": judge}


def _words(name: str) -> str:
    return name.replace("_", " ").replace("f1", "F1")


def _plot(data: dict[str, tuple[str, TaskData]], scored: dict[str, dict[str, Scored]]) -> Any:
    """A dot per model and pattern, where the data name patterns; None elsewhere (MMVP itself does not)."""
    from markupsafe import Markup

    for task, (_, found) in data.items():
        patterns = [row.get("Pattern") for row in found.rows[::2]]
        if not all(patterns) or next(iter(scored.values()))[task].units is None:
            continue
        return Markup(_pattern_svg(patterns, {model: entries[task].units for model, entries in scored.items()}))
    return None


def _pattern_svg(patterns: list[Any], units: dict[str, Any]) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from scipy.stats import binomtest

    names = list(dict.fromkeys(patterns))
    figure = Figure(figsize=(5.4, 0.42 * len(names) + 1.0))
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    colours = ("#b8912b", "#2f83c9", "#3f9c63", "#b25fb0", "#c25b4c")
    for number, (model, right) in enumerate(units.items()):
        for row, name in enumerate(names):
            hits = np.array([bool(hit) for hit, pattern in zip(right, patterns, strict=True) if pattern == name])
            interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
            height = row + (number - (len(units) - 1) / 2) * 0.22
            colour = colours[number % len(colours)]
            axes.plot([100 * interval.low, 100 * interval.high], [height] * 2, color=colour, linewidth=1.6)
            label = model if row == 0 else None
            axes.plot([100 * hits.mean()], [height], "o", color=colour, markersize=6, label=label)
    axes.axvline(25, color=_INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), [textwrap.fill(name, 20) for name in names], color=_INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("pairs right, %, 95 % intervals; dotted: chance", color=_INK)
    axes.tick_params(colors=_INK)
    for spine in axes.spines.values():
        spine.set_color(_INK)
    axes.legend(frameon=False, labelcolor=_INK, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(units))
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def _galleries(
    models: list[str],
    data: dict[str, tuple[str, TaskData]],
    items: dict[str, dict[str, list[dict[str, Any]]]],
    scored: dict[str, dict[str, Scored]],
) -> list[dict[str, Any]]:
    """The pairs that only one of two models gets right, those that the new one gained first."""
    galleries = []
    first = models[0]
    for task, (name, found) in data.items():
        if name != "mmvp":
            continue
        order = sorted(range(len(found.rows)), key=lambda k: found.rows[k]["Index"])
        for model in models[1:]:
            base, new = scored[first][task], scored[model][task]

            def both(entry: Scored, pair: tuple[int, int]) -> bool:
                return bool(entry.right[list(pair)].all())

            pairs = list(zip(order[::2], order[1::2], strict=True))
            gained = [pair for pair in pairs if both(new, pair) and not both(base, pair)]
            lost = [pair for pair in pairs if both(base, pair) and not both(new, pair)]
            for title, chosen in ((f"Gained by {model}", gained), (f"Lost by {model}", lost)):
                shown = [
                    [
                        _side(found.rows[k], {m: items[m][task][k] for m in (first, model)}, k, scored, task)
                        for k in pair
                    ]
                    for pair in chosen[:_MAX_PAIRS]
                ]
                galleries.append(
                    {
                        "title": f"{task}: {title}",
                        "count": f"{len(chosen)} pair{'' if len(chosen) == 1 else 's'}",
                        "more": len(chosen) > _MAX_PAIRS,
                        "pairs": shown,
                    }
                )
    return galleries


def _side(
    row: dict[str, Any],
    answers: dict[str, dict[str, Any]],
    position: int,
    scored: dict[str, dict[str, Scored]],
    task: str,
) -> dict[str, Any]:
    content = row["image"]["bytes"]
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    said = [
        {"model": model, "text": item["answer"] or "(nothing)", "right": bool(scored[model][task].right[position])}
        for model, item in answers.items()
    ]
    return {
        "image": f"data:image/{kind};base64,{base64.b64encode(content).decode()}",
        "index": row["Index"],
        "question": row["Question"],
        "options": row["Options"],
        "truth": row["Correct Answer"],
        "answers": said,
    }


def _provenance(results: dict[str, Any]) -> list[tuple[str, str]]:
    config = results["config"]
    rows = [(name, f"{path}, sha256 {config['model_hashes'][name][:16]}…") for name, path in config["models"].items()]
    rows += [("data", str(config["data"])), ("decoding", f"{results['decoding']}, batches of {config['batch_size']}")]
    rows += [("device", config["device"]), ("limit", "none" if config["limit"] is None else str(config["limit"]))]
    packages = {name: version for name, version in results["packages"].items() if version}
    return [*rows, ("packages", ", ".join(f"{name} {version}" for name, version in packages.items()))]
