"""One picture of a result: measures with intervals, pairs per pattern, drift per layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dcr_mllm.evaluation.mmvp_vlm import PATTERNS
from dcr_mllm.evaluation.table import label

_BASE_COLOUR = "0.45"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind readers too


def plot_result(result: dict, path: Path) -> None:
    """Draw `result` of `tower.evaluate_towers` to a PNG.

    Left: every measure of the baseline and of each tower, with the 95 % interval of the difference drawn around the
    tower's value, so that it misses the baseline's mark exactly where the interval misses zero. Middle: MMVP-VLM pairs
    per pattern. Right: drift per layer, with the layer that LLaVA reads marked. Panels without data are left out.
    """
    import matplotlib

    # Not pyplot: a figure of its own needs no display and leaves the caller's backend alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = []
    if result["comparisons"]:
        panels.append(_plot_measures)
    if any("mmvp_vlm" in report for report in result["towers"].values()):
        panels.append(_plot_patterns)
    if any(comparison["drift"] for comparison in result["comparisons"].values()):
        panels.append(_plot_drift)
    if not panels:
        panels.append(_plot_patterns)
    num_measures = max((len(comparison["measures"]) for comparison in result["comparisons"].values()), default=9)
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        height = max(4.5, 0.32 * max(num_measures, len(PATTERNS)) + 1.2)
        figure = Figure(figsize=(5.6 * len(panels), height), layout="constrained")
        FigureCanvasAgg(figure)
        for index, panel in enumerate(panels):
            panel(figure.add_subplot(1, len(panels), index + 1), result)
        figure.savefig(path, dpi=120, format="png", metadata={"Software": None})


def _colours(result: dict) -> dict[str, str]:
    return {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(result["comparisons"])}


def _plot_measures(axes: Any, result: dict) -> None:
    comparisons = result["comparisons"]
    names = list(next(iter(comparisons.values()))["measures"])
    step = 0.7 / len(comparisons)
    for index, (tower, colour) in enumerate(_colours(result).items()):
        for row, measure in enumerate(names):
            entry = comparisons[tower]["measures"][measure]
            height = row + (index - (len(comparisons) - 1) / 2) * step
            low, high = (entry["base"] + bound for bound in entry["interval"])
            axes.plot([low, high], [height, height], color=colour, linewidth=1.6, solid_capstyle="butt")
            axes.plot(entry["tower"], height, "o", color=colour, markersize=4.5, label=None if row else tower)
    for row, measure in enumerate(names):
        value = next(iter(comparisons.values()))["measures"][measure]["base"]
        axes.plot([value, value], [row - 0.42, row + 0.42], color=_BASE_COLOUR, linewidth=2, zorder=1)
    axes.plot([], [], color=_BASE_COLOUR, linewidth=2, label=f"{result['settings']['baseline']} (baseline)")
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("percent; bar = 95 % interval of the difference to the baseline")
    axes.set_title("Measures")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False, ncols=3)


def _plot_patterns(axes: Any, result: dict) -> None:
    scored = {name: report["mmvp_vlm"] for name, report in result["towers"].items() if "mmvp_vlm" in report}
    colours = {result["settings"]["baseline"]: _BASE_COLOUR} | _colours(result)
    patterns = [name for name in PATTERNS if any(name in score["per_pattern"] for score in scored.values())]
    height = 0.8 / max(len(scored), 1)
    for index, (tower, score) in enumerate(scored.items()):
        rows = [row + (index - (len(scored) - 1) / 2) * height for row in range(len(patterns) + 1)]
        values = [score["per_pattern"][name]["accuracy"] for name in patterns] + [score["average"]]
        axes.barh(rows, values, height=0.92 * height, color=colours[tower], label=tower)
    axes.axvline(25, color="black", linestyle=":", linewidth=1, label="chance")
    axes.axhline(len(patterns) - 0.5, color="0.7", linewidth=0.8)
    axes.set_yticks(range(len(patterns) + 1), [*patterns, "average"])
    axes.invert_yaxis()
    axes.set_xlabel("pairs right, percent")
    axes.set_title("MMVP-VLM per pattern")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False, ncols=3)


def _plot_drift(axes: Any, result: dict) -> None:
    styles = {("patch", "cosine"): "-", ("patch", "cka"): "--", ("class", "cosine"): "-.", ("class", "cka"): ":"}
    lowest = 0.99
    drifts = {name: value["drift"] for name, value in result["comparisons"].items() if value["drift"]}
    for name, drift in drifts.items():
        for (token, measure), style in styles.items():
            points = [
                (entry["layer"], entry[token][measure])
                for entry in drift["layers"]
                if entry[token] is not None and entry[token][measure] is not None
            ]
            if points:
                layers, values = zip(*points, strict=True)
                lowest = min(lowest, *values)
                axes.plot(layers, values, style, marker="o", markersize=3, color=_colours(result)[name])
    for (token, measure), style in styles.items():
        if token == "patch" or any(drift["layers"][0]["class"] for drift in drifts.values()):
            name = f"{token} {'CKA' if measure == 'cka' else measure}"
            axes.plot([], [], style, color="black", label=name)
    for name in drifts if len(drifts) > 1 else ():
        axes.plot([], [], "-", color=_colours(result)[name], label=name)
    for index, layer in enumerate({drift["llava_layer"] for drift in drifts.values()}):
        name = None if index else "read by LLaVA (hidden_states[-2])"
        axes.axvline(layer, color="0.6", linewidth=7, alpha=0.4, zorder=0, label=name)
    axes.set_ylim(lowest - 0.05 * (1 - lowest) - 0.001, 1 + 0.05 * (1 - lowest))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer (0 = input of the first block)")
    axes.set_ylabel("1 = unchanged")
    axes.set_title("Drift against the baseline")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False, ncols=3)
