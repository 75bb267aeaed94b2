"""A result of `tower.evaluate_towers` as text."""

from __future__ import annotations

from dcr_mllm.evaluation.mmvp_vlm import PATTERNS

LABELS = {
    "mmvp_vlm": "MMVP-VLM pairs",
    "zero_shot": "zero-shot",
    "knn": "k-NN",
    "probes_mean": "probes, mean",
    "nmi": "clustering NMI",
    "acc": "clustering ACC",
    "ari": "clustering ARI",
}


def label(measure: str) -> str:
    """A measure's name for people."""
    return LABELS.get(measure) or measure.replace("probe:", "probe ")


def format_table(result: dict) -> str:
    """The whole result as text: measures per comparison, pairs per pattern, drift at the layer LLaVA reads."""
    lines: list[str] = []
    base = result["settings"]["baseline"]
    for name, comparison in result["comparisons"].items():
        lines += ["", f"{name} against {base} (percent; difference in points)"]
        lines.append(
            f"{'':<28}{'base':>8}{'tower':>8}{'diff':>8}  {'95 % interval':<17}{'p':>9}{'p Holm':>9}{'MDE':>7}"
        )
        for measure, entry in comparison["measures"].items():
            low, high = entry["interval"]
            line = f"{label(measure):<28}{entry['base']:>8.1f}{entry['tower']:>8.1f}{entry['difference']:>+8.1f}"
            line += f"  {f'[{low:+.1f}, {high:+.1f}]':<17}"
            if "p_value" in entry:
                effect = entry["minimum_detectable_effect"]
                found = "-" if effect is None else f"{effect:.2f}"
                line += f"{entry['p_value']:>9.2g}{entry['p_holm']:>9.2g}{found:>7}"
            lines.append(line.rstrip())
        drift = comparison["drift"]
        if drift:
            layer = drift["layers"][drift["llava_layer"]]
            parts = [f"patch tokens {_drift_text(layer['patch'])}"]
            if layer["class"]:
                parts.append(f"class token {_drift_text(layer['class'])}")
            lines.append(f"drift at hidden_states[-2], which LLaVA reads: {'; '.join(parts)}")
        lines += [f"caution: {caution}" for caution in comparison["cautions"]]
    lines += _pattern_lines(result["towers"])
    return "\n".join(lines).lstrip("\n")


def _drift_text(drift: dict) -> str:
    cka = "undefined" if drift["cka"] is None else f"{drift['cka']:.3f}"
    return f"cosine {drift['cosine']:.3f}, relative L2 {drift['relative_l2']:.3f}, CKA {cka}"


def _pattern_lines(towers: dict[str, dict]) -> list[str]:
    """MMVP-VLM per pattern, one column per tower."""
    scored = {name: report["mmvp_vlm"] for name, report in towers.items() if "mmvp_vlm" in report}
    if not scored:
        return []
    widths = {name: max(len(name), 7) + 2 for name in scored}
    lines = ["", "MMVP-VLM, pairs right in percent"]
    lines.append(f"{'':<36}" + "".join(f"{name:>{widths[name]}}" for name in scored))
    for pattern in PATTERNS:
        entries = {name: score["per_pattern"].get(pattern) for name, score in scored.items()}
        if all(entries.values()):
            cells = (f"{entry['accuracy']:>{widths[name]}.1f}" for name, entry in entries.items() if entry)
            lines.append(f"{pattern:<36}" + "".join(cells))
    lines.append(
        f"{'average':<36}" + "".join(f"{score['average']:>{widths[name]}.1f}" for name, score in scored.items())
    )
    return lines


def print_table(result: dict) -> None:
    """Print `format_table`."""
    print(format_table(result))
