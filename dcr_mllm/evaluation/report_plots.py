"""The report's plots as SVG in the page's own text colour: patterns, POPE's categories, drift by layer."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

INK = "#010203"
"""Replaced by the text colour of the page."""
COLOURS = ("#9a7416", "#2f83c9", "#3f9c63", "#b25fb0", "#c25b4c")


def pattern_plot(patterns: Sequence[str], units: Mapping[str, np.ndarray]) -> str:
    """A dot per model and pattern with its 95 % interval (Wilson).

    Args:
        patterns: [U] of each pair.
        units: By model, [U] whether the pair is right.
    """
    from scipy.stats import binomtest

    names = list(dict.fromkeys(patterns))
    rows: dict[str, list[tuple[float, float, float]]] = {model: [] for model in units}
    for model, right in units.items():
        for name in names:
            hits = np.array([bool(hit) for hit, pattern in zip(right, patterns, strict=True) if pattern == name])
            interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
            rows[model].append((100 * hits.mean(), 100 * interval.low, 100 * interval.high))
    return interval_plot(names, rows, "pairs right, %, 95 % intervals; dotted: chance", chance=25)


def interval_plot(
    names: Sequence[str],
    rows: Mapping[str, Sequence[tuple[float, float, float]]],
    caption: str,
    chance: float | None = None,
) -> str:
    """Dots with intervals: a line per name, the models' beside each other.

    Args:
        names: Of the lines.
        rows: By model, for every name the value and the ends of its 95 % interval, in percent.
        caption: Of the axis.
        chance: Where a dotted line goes.
    """
    step = min(0.22, 0.7 / len(rows))
    figure, axes = new_figure(5.4, max(0.42, 0.16 * len(rows)) * len(names) + 1.0 + 0.1 * len(rows))
    for number, (model, values) in enumerate(rows.items()):
        colour = COLOURS[number % len(COLOURS)]
        for row, (value, low, high) in enumerate(values):
            height = row + (number - (len(rows) - 1) / 2) * step
            axes.plot([low, high], [height] * 2, color=colour, linewidth=1.6)
            axes.plot([value], [height], "o", color=colour, markersize=6, label=model if row == 0 else None)
    if chance is not None:
        axes.axvline(chance, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), [textwrap.fill(name, 20) for name in names], color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(caption, color=INK)
    return as_svg(figure, axes)


def drift_plot(drifts: Mapping[str, Mapping[str, Any]]) -> str:
    """How far the patch tokens of each tower are from the base's, layer by layer; the layer that LLaVA reads is marked.

    Args:
        drifts: By tower the `drift` of `tower_evaluation.json`.
    """
    figure, axes = new_figure(5.4, 2.8)
    for number, (name, drift) in enumerate(drifts.items()):
        layers = [entry["layer"] for entry in drift["layers"]]
        cosine = [entry["patch"]["cosine"] for entry in drift["layers"]]
        axes.plot(layers, cosine, "o-", color=COLOURS[(number + 1) % len(COLOURS)], markersize=4, label=name)
        axes.axvline(drift["llava_layer"], color=INK, linewidth=0.8, linestyle=":")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer (0: embeddings); dotted: the one that LLaVA reads", color=INK)
    axes.set_ylabel("cosine to the base tower", color=INK)
    return as_svg(figure, axes)


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """Figure and axes of a size in inches; for `as_svg`."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    return figure, figure.subplots()


def as_svg(figure: Any, axes: Any) -> str:
    """The SVG element, in the text colour of the page that it stands in, with the legend above the axes.

    Equal figures give equal text.
    """
    import matplotlib

    axes.tick_params(colors=INK)
    for spine in axes.spines.values():
        spine.set_color(INK)
    handles, names = axes.get_legend_handles_labels()
    if names:
        names = [textwrap.fill(name, 44, break_on_hyphens=False) for name in names]
        columns = 1 if max(map(len, names)) > 22 else min(len(names), 3)
        axes.legend(
            handles,
            names,
            frameon=False,
            labelcolor=INK,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=columns,
        )
    figure.tight_layout()
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "dcr-mllm"}):
        # Tight: whole names, however long.
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
