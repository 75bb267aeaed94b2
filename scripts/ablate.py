"""Objectives, seeds and single factors on the miniature: towers, LLaVAs on some, one table, one page.

    python scripts/ablate.py [--only main|stage2|sweeps|tables] [--dry-run] [key=value ...]

Every finished cell is a small file in docs/results/ablation/; the same command again runs what has none, also after a
kill, and then makes docs/results/ablation.json, .md and .html from these files alone. scripts/ablation/grid.py is the
grid.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from dcr_mllm.cli import run_main  # noqa: E402
from dcr_mllm.errors import UserError  # noqa: E402
from scripts.ablation.grid import OBJECTIVES, SEEDS, Cell, check_names, main_cells, sweep_cells  # noqa: E402
from scripts.ablation.llavas import PREFIX, Arm, arms, pending_arms, run_arms  # noqa: E402
from scripts.ablation.running import Workshop, alone, pending, run_cells  # noqa: E402

PARTS = ("main", "stage2", "sweeps", "tables")


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"for all cells; {PREFIX}key=value: for all LLaVAs"
    )
    parser.add_argument("--only", choices=PARTS, help="one part (default: all of them, in this order)")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), metavar="OBJECTIVE")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="of the towers' benchmarks")
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "docs/results/ablation", help="folder of finished cells; tables beside"
    )
    parser.add_argument("--runs-dir", type=Path, default=REPOSITORY / "runs/ablation", help="models and logs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cells at a time (default: the cores)")
    parser.add_argument("--rerun", action="store_true", help="run cells again whose files have other settings")
    parser.add_argument("--dry-run", action="store_true", help="list cells, and which are finished")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = build_parser().parse_intermixed_args(argv)
    return run_main(lambda: _main(options))


def _main(options: argparse.Namespace) -> int:
    if options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}, expected at least 1.")
    of_llavas = [word for word in options.overrides if word.startswith(PREFIX)]
    shop = Workshop(
        out=options.out.resolve(),
        runs_dir=options.runs_dir.resolve(),
        split=options.split,
        overrides=tuple(word for word in options.overrides if not word.startswith(PREFIX)),
        jobs=options.jobs,
        rerun=options.rerun,
    )
    parts = [options.only] if options.only else list(PARTS)
    if shop.split != "test" and "stage2" in parts:
        print("note: no LLaVAs, since mini-MMVP's questions are those of the test split")
        parts.remove("stage2")
    cells = main_cells(options.objectives, options.seeds) if "main" in parts else []
    sweeps = sweep_cells() if "sweeps" in parts else []
    llavas = arms(options.objectives, options.seeds) if "stage2" in parts else []
    check_names([*cells, *sweeps])
    if options.dry_run:
        _list(shop, [*cells, *sweeps], llavas, of_llavas)
        return 0
    failed: list[str] = []
    if cells or sweeps or llavas:
        # Stale files are refused before anything runs.
        for group in (cells, sweeps):
            pending(shop, group)
        pending_arms(shop, llavas, of_llavas)
        with alone(shop.runs_dir):
            failed += run_cells(shop, pending(shop, cells))
            failed += run_arms(shop, pending_arms(shop, llavas, of_llavas), of_llavas)
            failed += run_cells(shop, pending(shop, sweeps))
    if "tables" in parts:
        from scripts.ablation.page import write_tables

        write_tables(shop.out)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def _list(shop: Workshop, cells: list[Cell], llavas: list[Arm], of_llavas: list[str]) -> None:
    left = [item.name for item in (*pending(shop, cells), *pending_arms(shop, llavas, of_llavas))]
    for item in (*cells, *llavas):
        print(f"{'to do' if item.name in left else 'finished':<9} {item.name}")
    print(f"{len(left)} of {len(cells) + len(llavas)} to do; finished ones are in {shop.out}")


if __name__ == "__main__":
    sys.exit(main())
