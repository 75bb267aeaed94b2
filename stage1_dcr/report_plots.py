"""The curves of a run's report, as SVG in the page's own text colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dcr_mllm.evaluation.report_plots import COLOURS, INK, as_svg, new_figure

_MAX_POINTS = 240


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a plot.

    Attributes:
        name: In the legend; empty: not there.
        x, y: Its points, as many of both.
        colour: Index into the colours of all reports.
        style: Of matplotlib.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 1
    style: str = "-"


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means over neighbours where there are more points than a plot can show."""
    stride = -(-len(x) // _MAX_POINTS)
    starts = range(0, len(x), stride or 1)
    return tuple([float(np.mean(v[start : start + stride])) for start in starts] for v in (x, y))  # type: ignore[return-value]


def curve_plot(
    curves: Sequence[Curve],
    *,
    xlabel: str,
    ylabel: str,
    levels: Mapping[str, float] | None = None,
    mark: float | None = None,
    band: tuple[float, float] | None = None,
    ticks: Sequence[str] | None = None,
) -> str:
    """Curves over steps, layers or times.

    Args:
        curves: What is drawn.
        xlabel, ylabel: Of the axes.
        levels: Horizontal lines by their names.
        mark: Where a dotted vertical line goes.
        band: A shaded range of heights.
        ticks: Names of x = 0, 1, ...; None: numbers.
    """
    figure, axes = new_figure(5.4, 2.8)
    if band is not None:
        axes.axhspan(*band, color=COLOURS[0], alpha=0.15, linewidth=0)
    for number, (name, height) in enumerate((levels or {}).items()):
        axes.axhline(height, color=COLOURS[0], linewidth=1.2, linestyle=("-", "--")[number % 2], label=name)
    for curve in curves:
        colour = COLOURS[curve.colour % len(COLOURS)]
        axes.plot(curve.x, curve.y, curve.style, color=colour, markersize=4, linewidth=1.4, label=curve.name or None)
    if mark is not None:
        axes.axvline(mark, color=INK, linewidth=0.8, linestyle=":")
    if ticks is None:
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        axes.set_xticks(range(len(ticks)), ticks, color=INK)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    return as_svg(figure, axes)
