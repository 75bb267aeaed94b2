"""Does DCR raise P-Ability on the miniature without costing D-Ability? Several training seeds, one table, one verdict.

    python scripts/miniature_seeds.py [--seeds 0 1 2] [--split test|validation] [--jobs N] [--out FILE] [key=value ...]

Runs `mini` once per seed (data order, noise and initialisation vary, the shipped base stays), skips finished runs, and
measures each tower against the base. The interval of a gain comes from a bootstrap over items and seeds. JSON goes to
FILE, a Markdown table and the verdict to standard output.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dcr_mllm.evaluation.statistics import combine_seed_draws, interval, seeds_and_items_bootstrap
from dcr_mllm.evaluation.tower import evaluate_towers
from dcr_mllm.headers import resolve_weights
from dcr_mllm.mini.data import write_benchmarks
from dcr_mllm.runs import write_json_atomic

MARGIN = -2.0  # points that D-Ability may lose at the lower end of its interval


def train(seed: int, name: str, overrides: list[str], runs_dir: Path, threads: int) -> Path:
    """Run `mini` with a seed, unless it is finished; returns its tower."""
    run = f"{name}-seed{seed}"
    command = [sys.executable, "-m", "stage1_dcr", "mini", f"run={run}", f"runs_dir={runs_dir}", f"seed={seed}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([*command, "evaluate=false", *overrides], check=True, stdout=sys.stderr, env=environment)
    return runs_dir / run / "tower"


def train_all(seeds: list[int], jobs: int, name: str, overrides: list[str], runs_dir: Path) -> list[Path]:
    """The towers of all seeds, `jobs` runs at a time with an equal share of the processor's cores."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda seed: train(seed, name, overrides, runs_dir, threads), seeds))


def summarise(evaluation: dict[str, Any], names: list[str]) -> tuple[dict[str, Any], str]:
    """Gains over all seeds with their intervals, and the verdict."""
    base = evaluation["towers"]["base"]
    towers = [evaluation["towers"][name] for name in names]
    items = {
        "mmvp_vlm": lambda tower: tower["mmvp_vlm"]["pairs"],
        "zero_shot": lambda tower: tower["zero_shot"]["correct"],
        "knn": lambda tower: tower["knn"]["correct"],
    }
    gains: dict[str, Any] = {}
    for measure, read in items.items():
        before = np.array(read(base), dtype=float)
        deltas = 100 * np.stack([np.array(read(tower), dtype=float) - before for tower in towers])
        gains[measure] = seeds_and_items_bootstrap(deltas)
    for measure in ("probes_mean", "nmi"):  # not a mean over single items, so their draws come with the comparison
        entries = [evaluation["comparisons"][name]["measures"][measure] for name in names]
        draws = combine_seed_draws(np.stack([entry["draws"] for entry in entries]))
        gains[measure] = {"mean": float(np.mean([e["difference"] for e in entries])), "interval": interval(draws)}

    pairs = gains["mmvp_vlm"]
    low, high = pairs["interval"]
    gained = f"P-Ability {pairs['mean']:+.1f} points [{low:+.1f}, {high:+.1f}] on {len(items['mmvp_vlm'](base))} pairs"
    word = "raised" if low > 0 else "lowered" if high < 0 else "not detectably changed"
    lost = [name for name in ("zero_shot", "knn", "nmi") if gains[name]["interval"][0] <= MARGIN]
    kept = "zero-shot, k-NN and NMI kept within 2 points" if not lost else f"not shown to keep: {', '.join(lost)}"
    probes = gains["probes_mean"]
    read = f"attribute probes {probes['mean']:+.1f} [{probes['interval'][0]:+.1f}, {probes['interval'][1]:+.1f}]"
    verdict = f"On the miniature, over {len(names)} seeds, P-Ability was {word} ({gained}; {read}); {kept}."
    return gains, verdict


def markdown(seeds: list[dict[str, Any]], gains: dict[str, Any]) -> str:
    """The table for people: every measure before and after per seed, and the gain over all seeds."""
    names = [f"seed {entry['seed']}" for entry in seeds]
    lines = [f"| measure (%) | base | {' | '.join(names)} | gain, 95 % interval |", f"|---|{'---|' * (len(names) + 2)}"]
    for measure, entry in seeds[0]["measures"].items():
        cells = [f"{run['measures'][measure]['tower']:.1f}" for run in seeds]
        mean = np.mean([run["measures"][measure]["difference"] for run in seeds])
        gain = f"{mean:+.1f}"
        if measure in gains:
            low, high = gains[measure]["interval"]
            gain += f" [{low:+.1f}, {high:+.1f}]"
        lines.append(f"| {measure} | {entry['base']:.1f} | {' | '.join(cells)} | {gain} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--name", default="mini", help="runs are called NAME-seedN")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--out", type=Path, help="where the JSON goes; default: standard output only")
    options = parser.parse_intermixed_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}, expected at least 1")

    towers: dict[str, str | Path] = {"base": resolve_weights("mini", "tower")}
    trained = train_all(options.seeds, options.jobs, options.name, options.overrides, options.runs_dir)
    towers |= {f"seed {seed}": tower for seed, tower in zip(options.seeds, trained, strict=True)}
    benchmarks = write_benchmarks(options.runs_dir / "mini-data" / options.split, options.split)
    evaluation = evaluate_towers(towers, mmvp_vlm=benchmarks / "mmvp_vlm", labelled=benchmarks / "labelled")
    names = [name for name in towers if name != "base"]
    gains, verdict = summarise(evaluation, names)
    seeds = [
        {
            "seed": seed,
            "measures": {
                measure: {key: entry[key] for key in ("base", "tower", "difference", "interval")}
                for measure, entry in evaluation["comparisons"][name]["measures"].items()
            },
            "pairs_per_pattern": {
                pattern: {
                    which: evaluation["towers"][tower]["mmvp_vlm"]["per_pattern"][pattern]["accuracy"]
                    for which, tower in (("base", "base"), ("tower", name))
                }
                for pattern in evaluation["towers"]["base"]["mmvp_vlm"]["per_pattern"]
            },
        }
        for seed, name in zip(options.seeds, names, strict=True)
    ]
    command = " ".join(["python scripts/miniature_seeds.py", *(sys.argv[1:] if argv is None else argv)])
    result = {"command": command, "split": options.split, "seeds": seeds, "gains": gains, "verdict": verdict}
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(options.out, result)
    print(markdown(seeds, gains))
    print(f"\n{verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
