"""The page's two plots as SVG in its own text colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dcr_mllm.evaluation.report_plots import COLOURS, INK, as_svg, new_figure


def trade_off_plot(summary: Mapping[str, Any]) -> str:
    """P-Ability gained against D-Ability changed: a cross per objective (95 % intervals), a dot per seed."""
    figure, axes = new_figure(6.4, 4.2)
    for number, (objective, entry) in enumerate(summary.items()):
        colour = COLOURS[number % len(COLOURS)]
        across, up = entry["gain"]["pairs"], entry["gain"]["d_ability"]
        axes.plot(across["interval"], [up["mean"]] * 2, color=colour, linewidth=1.6)
        axes.plot([across["mean"]] * 2, up["interval"], color=colour, linewidth=1.6)
        axes.plot([across["mean"]], [up["mean"]], "o", color=colour, markersize=7, label=objective)
        axes.plot(across["per_seed"], up["per_seed"], "o", color=colour, markersize=3, alpha=0.6)
    _zero(axes, both=True)
    axes.set_xlabel("P-Ability (pairs), gain in points", color=INK)
    axes.set_ylabel("D-Ability, change in points", color=INK)
    return as_svg(figure, axes)


def sweep_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Gain of each tried value over the untouched tower, in P-Ability and D-Ability."""
    figure, axes = new_figure(6.4, 0.42 * len(rows) + 1.2)
    for number, (measure, name) in enumerate((("pairs", "P-Ability (pairs)"), ("d_ability", "D-Ability"))):
        colour = COLOURS[number]
        for row, entry in enumerate(rows):
            gain, height = entry["gain"][measure], row + 0.24 * (number - 0.5)
            axes.plot(gain["interval"], [height] * 2, color=colour, linewidth=1.6)
            axes.plot([gain["mean"]], [height], "o", color=colour, markersize=5, label=name if row == 0 else None)
    _zero(axes)
    axes.set_yticks(range(len(rows)), [entry["label"] for entry in rows], color=INK)
    axes.invert_yaxis()
    axes.set_xlabel("gain over the untouched tower in points, 95 % intervals over items", color=INK)
    return as_svg(figure, axes)


def _zero(axes: Any, *, both: bool = False) -> None:
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    if both:
        axes.axhline(0, color=INK, linewidth=0.8, linestyle=":")
