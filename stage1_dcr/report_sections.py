"""The parts of a run's report; each is a section, or a line on which setting gives it where its data are missing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dcr_mllm.evaluation.table import label
from stage1_dcr.report_plots import Curve, curve_plot, thinned
from stage1_dcr.selection import Choice, Measurement, standard_error, zero_shot_loss

_BIN = re.compile(r"(cos_\w+)@(\d+)-(\d+)")
_COSINES = {"cos_view": "augmented view", "cos_target": "true target", "cos_negative": "negatives"}
_MAX_DRIFT_CURVES = 4

Record = dict[str, Any]


@dataclass(kw_only=True)
class Table:
    """Rows of cells under a header; `marked` are the rows in bold."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Sequence[int] = ()


@dataclass(kw_only=True)
class Section:
    """A heading with plain lines, plots (caption and SVG) and a table."""

    title: str
    lines: list[str] = field(default_factory=list)
    plots: list[tuple[str, str]] = field(default_factory=list)
    table: Table | None = None


def validation_section(measurements: Sequence[Measurement], choice: Choice | None) -> Section | str:
    """Pairs and zero-shot accuracy over the tower phase, with the base as a line and the chosen step marked."""
    if choice is None:
        return "Pairs and zero-shot accuracy during training: set validation (and validate_every)."
    base, *steps = measurements
    where, mark = [step.step for step in steps], choice.chosen.step
    xlabel = "step of the tower phase; dotted: the chosen one"
    section = Section(title="Validation")
    if base.pairs is not None:
        noise = 2 * standard_error(choice.chosen)
        values = [step.pairs or 0.0 for step in steps]
        plot = curve_plot(
            [Curve(name="tower", x=where, y=values, style="o-")],
            xlabel=xlabel,
            ylabel="pairs right, %",
            levels={"base": base.pairs},
            mark=mark,
            band=(base.pairs - noise, base.pairs + noise),
        )
        caption = f"Pairs. Shaded: two binomial standard errors ({noise:.1f} points) about the base."
        section.plots.append((caption, plot))
    if base.zero_shot is not None:
        plot = curve_plot(
            [Curve(name="tower", x=where, y=[step.zero_shot or 0.0 for step in steps], style="o-")],
            xlabel=xlabel,
            ylabel="zero-shot accuracy, %",
            levels={"base": base.zero_shot, "margin": base.zero_shot - choice.margin},
            mark=mark,
        )
        section.plots.append((f"Zero-shot accuracy and zero_shot_margin ({choice.margin:g} points).", plot))
    rows = [
        (
            "base" if step.step == 0 else f"{step.step}",
            _percent(step.pairs),
            _percent(step.zero_shot),
            "–" if step.zero_shot is None or step.step == 0 else f"{zero_shot_loss(base, step):.1f}",
        )
        for step in measurements
    ]
    chosen = [number for number, step in enumerate(measurements) if step == choice.chosen]
    section.table = Table(header=("step", "pairs, %", "zero-shot, %", "zero-shot lost"), rows=rows, marked=chosen)
    section.lines.append(
        f"{base.num_pairs:,} pairs and {base.num_images:,} labelled images. Chosen by select={choice.rule}, in bold: "
        f"the best of {len(steps)} measured steps looks better here than it is, so judge the tower on another set."
    )
    return section


def loss_section(metrics: Sequence[Record]) -> Section | str:
    """Loss and its parts, phase by phase."""
    section = Section(title="Loss")
    for phase in ("projector", "tower"):
        records = [record for record in metrics if record["phase"] == phase]
        names = [name for name in _names(records) if _is_loss(name)]
        if not names:
            continue
        curves = [_curve(records, name, number + 1) for number, name in enumerate(names)]
        plot = curve_plot(curves, xlabel=f"step of the {phase} phase", ylabel="loss")
        stride = len(records) // max(len(curves[0].x), 1)
        means = f"; each point is the mean of {stride} lines of metrics.jsonl" if stride > 1 else ""
        section.plots.append((f"{phase.capitalize()} phase{means}.", plot))
    return section if section.plots else "Losses: none is logged yet; log_every says how often."


def cosine_section(metrics: Sequence[Record]) -> Section | str:
    """What the contrast sees at each range of diffusion times, at the beginning and at the end of the last phase."""
    records = [record for record in metrics if record["phase"] == (metrics[-1]["phase"] if metrics else "")]
    bins: dict[str, dict[tuple[int, int], str]] = {}
    for name in _names(records):
        if match := _BIN.fullmatch(name):
            bins.setdefault(match[1], {})[int(match[2]), int(match[3])] = name
    if not bins:
        return "Cosines by diffusion time: they belong to objective=dcr and dcr-end-to-end."
    fifth = max(len(records) // 5, 1)
    ranges = sorted(set().union(*bins.values()))
    curves = []
    for number, (kind, names) in enumerate(bins.items()):
        for part, style, name in ((records[-fifth:], "o-", _COSINES.get(kind, kind)), (records[:fifth], ":", "")):
            means = [_mean([record.get(names.get(times, "")) for record in part]) for times in ranges]
            curves.append(Curve(name=name, x=range(len(ranges)), y=means, colour=number, style=style))
    plot = curve_plot(curves, xlabel="diffusion time", ylabel="cosine", ticks=[f"{low}–{high}" for low, high in ranges])
    text = (
        f"Cosine of a prediction to the one under the view's condition, to the true target, and to those under other "
        f"images' conditions: means over the last fifth of the {records[-1]['phase']} phase; dotted: over its first "
        "fifth. Where view and negatives lie together, the denoiser hardly reads its condition at that time."
    )
    return Section(title="Cosines by diffusion time", plots=[(text, plot)])


def conflict_section(looks: Sequence[Record]) -> Section | str:
    """Cosine between the gradients of the loss's contrastive and reconstructive part."""
    found = [(look["step"], look["conflict"]["cosine"]) for look in looks if look.get("conflict")]
    found = [(step, cosine) for step, cosine in found if cosine is not None]  # none where a gradient is zero
    if not found:
        return "Gradient conflict: set diagnose_every, with an objective that has two parts (dcr, joint)."
    steps, cosines = zip(*found, strict=True)
    negative = sum(cosine < 0 for cosine in cosines)
    x, y = thinned(steps, cosines)
    plot = curve_plot(
        [Curve(name="", x=x, y=y, style="o-")],
        xlabel="step of the tower phase",
        ylabel="cosine of the two gradients",
        levels={"orthogonal": 0.0},
    )
    line = (
        f"{negative} of {len(cosines)} looks ({100 * negative / len(cosines):.0f} %) find a negative cosine: the "
        "contrastive and the reconstructive part then pull the tower in opposite directions."
    )
    return Section(title="Gradient conflict", lines=[line], plots=[("", plot)])


def embedding_section(looks: Sequence[Record]) -> Section | str:
    """Whether embeddings collapse: effective rank, uniformity and alignment against the base's."""
    measures = {
        "effective_rank": "Effective rank of the embeddings: falling means that fewer directions are in use.",
        "uniformity": "Uniformity: lower is more evenly spread over the sphere.",
        "alignment": "Alignment of two views of an image: lower is closer together.",
    }
    section = Section(title="Embeddings")
    for name, caption in measures.items():
        records = [look for look in looks if look.get(name)]
        if records:
            x, y = thinned([look["step"] for look in records], [look[name]["tower"] for look in records])
            plot = curve_plot(
                [Curve(name="tower", x=x, y=y, style="o-")],
                xlabel="step of the tower phase",
                ylabel=name.replace("_", " "),
                levels={"base": records[-1][name]["base"]},
            )
            section.plots.append((caption, plot))
    return section if section.plots else "Effective rank, uniformity and alignment: set diagnose_every."


def drift_section(looks: Sequence[Record]) -> Section | str:
    """How far hidden states moved from the base's, layer by layer, at several steps."""
    records = [look for look in looks if look.get("drift")]
    if not records:
        return "Drift by layer: set diagnose_every."
    picked = sorted(set(np.linspace(0, len(records) - 1, _MAX_DRIFT_CURVES).round().astype(int).tolist()))
    section = Section(title="Drift by layer")
    for kind, what in (("patches", "patch tokens"), ("class", "class token")):
        curves = []
        for number, index in enumerate(picked):
            values = records[index]["drift"].get(kind)
            points = [(layer, value) for layer, value in enumerate(values or ()) if value is not None]
            if points:
                x, y = zip(*points, strict=True)
                curves.append(Curve(name=f"step {records[index]['step']}", x=x, y=y, colour=number, style="o-"))
        if curves:
            num_layers = len(records[-1]["drift"][kind])
            plot = curve_plot(
                curves,
                xlabel="layer (0: embeddings); dotted: the one that LLaVA reads",
                ylabel="1 - cosine to the base",
                mark=num_layers - 2,
            )
            section.plots.append((f"{what[:1].upper()}{what[1:]}.", plot))
    return section


def evaluation_section(result: Record | None) -> Section | str:
    """The final table: the exported tower against its base on the test benchmarks."""
    if result is None or not result["comparisons"]:
        return (
            "The final table: set evaluate for the miniature's benchmarks, or run python -m dcr_mllm.evaluation.tower "
            "BASE TOWER --out RUN/evaluation and make this page again."
        )
    name, comparison = next(iter(result["comparisons"].items()))
    rows = []
    for measure, entry in comparison["measures"].items():
        low, high = entry["interval"]
        p_value = f"{entry['p_holm']:.2g}" if "p_holm" in entry else "–"
        difference = f"{entry['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
        rows.append((label(measure), f"{entry['base']:.1f}", f"{entry['tower']:.1f}", difference, p_value))
    return Section(
        title=f"Final evaluation: {name} against {result['settings']['baseline']}",
        lines=[f"{line[:1].upper()}{line[1:].rstrip('.')}." for line in comparison["cautions"]],
        table=Table(header=("percent", "base", "tower", "difference (95 % interval)", "p (Holm)"), rows=rows),
    )


def _is_loss(name: str) -> bool:
    return name.startswith("loss") or name in ("contrastive", "reconstruction", "distance_to_base")


def _names(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record))


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _mean(values: Sequence[float | None]) -> float:
    kept = _finite(values)
    return float(np.mean(kept)) if kept else float("nan")


def _curve(records: Sequence[Record], name: str, colour: int) -> Curve:
    kept = [record for record in records if _finite([record.get(name)])]
    x, y = thinned([record["step"] for record in kept], [record[name] for record in kept])
    return Curve(name=name.replace("_", " "), x=x, y=y, colour=colour)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
