"""The tables as JSON, Markdown and one HTML file, from the records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcr_mllm.evaluation.report import page_environment
from dcr_mllm.runs import write_json_atomic, write_text_atomic
from scripts.ablation.comparing import table
from scripts.ablation.plots import sweep_plot, trade_off_plot
from scripts.ablation.records import read_records
from scripts.ablation.verdicts import NAMES, figures

COLUMNS = ("pairs", "d_ability", "zero_shot", "knn", "nmi", "acc", "ari", "probes_mean")
_COMPARED = (
    *("P-Ability (pairs)", "p Holm", "by seed", "D-Ability", "p Holm"),
    *(NAMES[name] for name in COLUMNS if name not in ("pairs", "d_ability")),
)
# The paper's names of what it compares, and ours.
PAPER = {"naive_joint": "joint", "end_to_end": "dcr-end-to-end", "dcr_two_stage": "dcr"}


@dataclass(frozen=True)
class Section:
    """A table with its title and a note below; cells are text."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_tables(out: Path) -> None:
    """Writes `<out>.json`, `<out>.md` and `<out>.html` beside the folder of records.

    Args:
        out: Folder of records.
    """
    found = table(read_records(out))
    found |= {"columns": {name: NAMES[name] for name in COLUMNS}}
    write_json_atomic(out.with_name(f"{out.name}.json"), found)
    write_text_atomic(out.with_name(f"{out.name}.md"), as_markdown(found))
    write_text_atomic(out.with_name(f"{out.name}.html"), as_html(found))
    for entry in found["verdicts"]:
        print(f"{entry['claim']}.\n  {entry['sentence']}")
    print(f"tables: {', '.join(str(out.with_name(out.name + end)) for end in ('.json', '.md', '.html'))}")


def facts(found: Mapping[str, Any]) -> list[str]:
    """What stands above the tables."""
    time, items = found["time"], found["items"]
    lines = [
        f"Command: `{found['command']}`.",
        f"Time: {_hours(time['wall_clock_seconds'])} by the clock while anything ran, "
        f"{_hours(time['process_seconds'])} of processes; on {'; '.join(time['devices'])}.",
        f"*Mini* numbers, {found['split']} split: {items['pairs']:,} pairs, {items['zero_shot']:,} images. P-Ability: "
        "pairs that the tower's text side tells apart. D-Ability: mean of zero-shot, k-NN and NMI. In percent, "
        "differences in points; intervals are 95 %.",
    ]
    if time["resumed_runs"]:
        lines.append(
            f"Runs that were killed and went on: {time['resumed_runs']}; what came before is not in their time."
        )
    others = found["base"]["records_that_measured_otherwise"]
    if others:
        lines.append(f"{others} cells measured the base a little differently (other libraries or devices).")
    return lines


def sections(found: Mapping[str, Any]) -> list[Section]:
    """All tables."""
    made = [_main(found), _gains(found), _against_dcr(found), _patterns(found), _stage2(found), _sweeps(found)]
    return [section for section in (*made, _diagnostics(found), _paper(found)) if section.rows]


def _main(found: Mapping[str, Any]) -> Section:
    rows = [["untouched tower", "", *(f"{found['base'][name]:.2f}" for name in COLUMNS), ""]]
    for entry in found["main"]:
        values = [f"{entry[name]:.2f}" for name in COLUMNS]
        rows.append([entry["objective"], str(entry["seed"]), *values, f"{entry['seconds']:.0f}"])
    note = "Seconds of the tower phase and its measuring; a seed's projector is trained once for all that share it."
    return Section("Every tower", note, ["objective", "seed", *(NAMES[name] for name in COLUMNS), "s"], rows)


def _gains(found: Mapping[str, Any]) -> Section:
    rows = [
        [objective, str(len(entry["seeds"])), *_compared(entry["gain"], entry["exact_tests"])]
        for objective, entry in found["summary"].items()
    ]
    note = (
        "Mean over seeds, bootstrap over items and seeds (too narrow rather than too wide with few seeds); p-values "
        "from the same draws, Holm over the objectives. By seed: pairs gained:lost, exact McNemar p."
    )
    return Section("Gain over the untouched tower", note, ["objective", "seeds", *_COMPARED], rows)


def _against_dcr(found: Mapping[str, Any]) -> Section:
    rows = [
        [objective, *_compared(entry["against_dcr"], entry["exact_tests_against_dcr"])]
        for objective, entry in found["summary"].items()
        if entry["against_dcr"] is not None
    ]
    return Section(
        "Difference to dcr", "Each tower against that of dcr with the same seed.", ["objective", *_COMPARED], rows
    )


def _compared(gains: Mapping[str, Any], exact: Mapping[str, Any]) -> list[str]:
    by_seed = ", ".join(f"{test['gained']}:{test['lost']} ({_p(test['p_value'])})" for test in exact["pairs"])
    cells = {name: figures(gains[name]) for name in COLUMNS}
    ability, distinction = (_p(gains[name]["p_holm"]) for name in ("pairs", "d_ability"))
    return [cells.pop("pairs"), ability, by_seed, cells.pop("d_ability"), distinction, *cells.values()]


def _patterns(found: Mapping[str, Any]) -> Section:
    patterns = list(found["base"]["pairs_per_pattern"])
    objectives = list(found["summary"])
    rows = []
    for pattern in patterns:
        cells = [f"{found['base']['pairs_per_pattern'][pattern]:.1f}"]
        for objective in objectives:
            values = [e["pairs_per_pattern"][pattern] for e in found["main"] if e["objective"] == objective]
            cells.append(f"{sum(values) / len(values):.1f}")
        rows.append([pattern, *cells])
    return Section("Pairs by pattern", "Mean over seeds.", ["pattern", "untouched", *objectives], rows)


def _stage2(found: Mapping[str, Any]) -> Section:
    names = ("mmvp_pairs", "mmvp_single", "heldout", "heldout_blind")
    rows = [
        [e["tower"], str(e["seed"]), *(f"{e[name]:.2f}" for name in names), f"{e['seconds']:.0f}"]
        for e in found["stage2"]["rows"]
    ]
    for tower, gains in found["stage2"]["gain"].items():
        cells = [f"{figures(gains[n])} (p Holm {_p(gains[n]['p_holm'])})" if n in gains else "" for n in names]
        rows.append([f"{tower} minus base", "all", *cells, ""])
    note = "A LLaVA per tower and seed, with the same data in the same order; two guesses give 25 % of the pairs."
    return Section("LLaVAs on the towers", note, ["tower", "seed", *(NAMES[name] for name in names), "s"], rows)


def _sweeps(found: Mapping[str, Any]) -> Section:
    rows = []
    for entry in found["sweeps"]:
        gains, against = entry["gain"], entry["against_default"]
        cells = [figures(gains[name]) for name in ("pairs", "d_ability", "zero_shot", "knn", "nmi", "probes_mean")]
        rest = ["", "", ""]
        if against is not None:
            exact = _p(entry["exact_tests_against_default"]["pairs"]["p_value"])
            rest = [figures(against["pairs"]), exact, figures(against["d_ability"])]
        rows.append([entry["factor"], entry["label"], *cells, *rest])
    names = [NAMES[name] for name in ("pairs", "d_ability", "zero_shot", "knn", "nmi", "probes_mean")]
    note = (
        "Gain over the untouched tower, and difference to the default of the same seed (p: exact McNemar on pairs). "
        "One seed, so intervals cover the items and not the luck of training; no p is adjusted for the number of rows."
    )
    header = ["factor", "value", *names, "P against default", "p", "D against default"]
    return Section("One factor at a time", note, header, rows)


def _diagnostics(found: Mapping[str, Any]) -> Section:
    rows = []
    for entry in found["main"]:
        seen = entry["diagnostics"]
        if seen is None:
            continue
        conflict, rank, drift = seen["conflict"], seen["effective_rank"] or {}, seen["drift_at_llava_layer"]
        rows.append(
            [
                entry["objective"],
                str(entry["seed"]),
                f"{100 * conflict['negative'] / conflict['looks']:.0f} % of {conflict['looks']}" if conflict else "-",
                f"{conflict['mean_cosine']:+.3f}" if conflict else "-",
                " / ".join(f"{norm['mean']:.3f}" for norm in conflict["norms"].values()) if conflict else "-",
                " to ".join(f"{rank[name]:.1f}" for name in ("base", "tower") if name in rank) or "-",
                *(f"{drift[kind]:.4f}" if kind in drift else "-" for kind in ("class", "patches")),
            ]
        )
    note = (
        "Share of looks at which the gradients of contrast and reconstruction point apart, their mean cosine and mean "
        "norms; effective rank of the embeddings before and after; cosine distance to the base in the layer that LLaVA "
        "reads."
    )
    header = ["objective", "seed", "conflict", "cosine", "norms", "effective rank", "drift, class", "drift, patches"]
    return Section("Diagnostics", note, header, rows)


def _paper(found: Mapping[str, Any]) -> Section:
    published: dict[str, dict[str, float]] = {}
    for entry in found["paper"]:
        for name, values in entry["rows"].items():
            published.setdefault(PAPER.get(name, ""), {}).update(values if name in PAPER else {})
    rows = []
    for objective in PAPER.values():
        ours, told = found["summary"].get(objective), published.get(objective, {})
        here = {name: ours["mean"][name] for name in ("pairs", "nmi", "acc", "ari")} if ours else {}
        seen = found["diagnostics"].get(objective)
        if seen:
            here["conflict"] = 100 * seen["negative"] / seen["looks"]
        there = {"pairs": told.get("mmvp_vlm"), "conflict": told.get("negative_cosine_percent")}
        there |= {name: 100 * told[name] for name in ("nmi", "acc", "ari") if name in told}
        cells = ("pairs", "nmi", "acc", "ari", "conflict")
        rows.append([objective, *(f"{_number(there.get(name))} / {_number(here.get(name))}" for name in cells)])
    note = (
        "Paper (OpenAI ViT-L/14 at 224 px, MMVP-VLM; second-hand) / miniature (mean over seeds): of different towers, "
        "images and benchmarks, so compare orders, not values."
    )
    return Section("Beside the paper", note, ["strategy", "pairs", "NMI", "ACC", "ARI", "negative cosine"], rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def as_markdown(found: Mapping[str, Any]) -> str:
    """`ablation.md`."""
    lines = [
        "# Ablation on the miniature",
        "",
        "Made by `python scripts/ablate.py --only tables`; not edited by hand.",
        "",
    ]
    lines += [part for fact in facts(found) for part in (fact, "")]
    lines += ["## What holds of the paper's claims", ""]
    lines += [f"- {entry['claim']}. **{entry['sentence']}**" for entry in found["verdicts"]]
    for section in sections(found):
        lines += ["", f"## {section.title}", "", section.note, "", _line(section.header)]
        lines += ["|" + "---|" * len(section.header), *(_line(row) for row in section.rows)]
    return "\n".join(lines) + "\n"


def as_html(found: Mapping[str, Any]) -> str:
    """`ablation.html`: one file that asks nothing of elsewhere."""
    plots = [("What each objective gains and costs", trade_off_plot(found["summary"]))]
    if found["sweeps"]:
        plots.append(("One factor at a time, seed 0", sweep_plot(found["sweeps"])))
    words = [fact.replace("`", "").replace("*", "") for fact in facts(found)]
    page = {"facts": words, "verdicts": found["verdicts"], "plots": plots, "sections": sections(found)}
    return page_environment(Path(__file__).parent).get_template("page.html.jinja").render(page)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"
