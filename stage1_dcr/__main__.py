"""Stage 1: post-train a vision tower with Diffusion Contrastive Reconstruction.

    bash scripts/stage1.sh [CONFIG] [key=value ...] [--print-config | --dry-run]

CONFIG is a YAML file or the bare name of a shipped config; without one, the miniature runs. Everything is checked
before anything is loaded. NPROC sets the number of processes; by default there is one per visible GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dcr_mllm.cli import run_main
from dcr_mllm.command import parse_stage
from dcr_mllm.config import to_yaml
from dcr_mllm.hardware import warn_ignored
from dcr_mllm.launch import announces, decide, is_child, start_processes
from dcr_mllm.log import get_logger, rank
from dcr_mllm.runs import Run, open_run
from dcr_mllm.stopping import listening
from stage1_dcr.checks import preflight
from stage1_dcr.config import Stage1Config
from stage1_dcr.profiles import profile_values
from stage1_dcr.validation_split import validation_directory

CONFIGS = Path(__file__).parent / "configs"

logger = get_logger(__name__)


def parse(argv: list[str]) -> tuple[argparse.Namespace, Stage1Config]:
    """Arguments and the resolved config."""
    return parse_stage(
        argv, Stage1Config, CONFIGS, prog="stage1.sh", description=__doc__ or "", values_below=profile_values
    )


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_main(lambda: _main(arguments))


def _main(argv: list[str]) -> int:
    options, config = parse(argv)
    if options.print_config:
        print(to_yaml(config), end="")
        return 0

    notes = preflight(config)
    run = open_run(config.runs_dir, config, create=False)
    if run.state == "finished" and not options.dry_run:
        _print_results(run, run.results())
        print(f"{run.path} is finished; for another run of the same config give run=NAME.")
        return 0

    launch = decide(config.precision, config.deepspeed)
    config.num_negatives(launch.num_processes)  # refuses more than there are
    if announces():
        print(launch.describe(config.batch_size, config.accumulation))
        for note in notes:
            print(note)
        print(f"run directory: {run.path} ({run.state})", flush=True)
        warn_ignored(config.hardware, launch.device)
    if options.dry_run:
        from stage1_dcr.estimate import time_table, trainable_table
        from stage1_dcr.train import Stage1

        stage = Stage1(config, launch)
        print(trainable_table(stage))
        print(time_table(stage))
        return 0

    if not is_child():
        # Before the processes start, so that none of them looks for shards that another one still draws.
        open_run(config.runs_dir, config)
        _data(config)
        validation_directory(config)
        start_processes(launch.num_processes, "stage1_dcr", argv)

    with listening():
        from stage1_dcr.report import write_report
        from stage1_dcr.train import run_stage1

        run = open_run(config.runs_dir, config, create=rank() == 0)
        results: dict[str, Any] = run_stage1(config, launch, run, _data(config))
    if rank() == 0:
        if config.evaluate and "tower" in results:
            results["evaluation"] = _evaluate(config, run)
        results["report"] = str(write_report(run.path))
        run.finish(results)
        _print_results(run, results)
    return 0


def _data(config: Stage1Config) -> str | list[str]:
    """The image source; `mini` becomes shards below the runs directory, drawn once."""
    assert config.data is not None, "preflight refuses empty data"
    if config.data != "mini":
        return config.data
    from dcr_mllm.mini.data import write_training_shards

    return write_training_shards(Path(config.runs_dir) / "mini-data" / "train")


def _evaluate(config: Stage1Config, run: Run) -> dict[str, Any]:
    """Base against new tower on the miniature's test benchmarks; keeps the summary, the rest is in the folder."""
    from dcr_mllm.evaluation.tower import evaluate_towers
    from dcr_mllm.headers import resolve_weights
    from dcr_mllm.mini.data import write_benchmarks

    benchmarks = write_benchmarks(Path(config.runs_dir) / "mini-data" / "test")
    out = run.path / "evaluation"
    result = evaluate_towers(
        {"base": resolve_weights(config.tower, "tower"), config.run: run.path / "tower"},
        mmvp_vlm=benchmarks / "mmvp_vlm",
        labelled=benchmarks / "labelled",
        out=out,
    )
    return {"directory": str(out), "result": result}


def _print_results(run: Run, results: dict[str, Any]) -> None:
    for name in ("projector", "tower"):
        if name in results:
            print(f"{name}: {results[name]}")
    if "evaluation" in results:
        from dcr_mllm.evaluation.tower import print_table

        print_table(results["evaluation"]["result"])
        print(f"evaluation: {results['evaluation']['directory']}")
    if "report" in results:
        print(f"report: {results['report']}")
    print(f"metrics: {run.path / 'metrics.jsonl'}")


if __name__ == "__main__":
    sys.exit(main())
