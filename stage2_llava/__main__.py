"""Stage 2: plug vision towers into LLaVA and train them with PEFT, one LLaVA per tower.

    bash scripts/stage2_llava.sh [CONFIG] [key=value ...] [--print-config | --dry-run]

CONFIG is a YAML file or the bare name of a shipped config; without one, the miniature runs. Everything is checked
before anything is loaded. NPROC sets the number of processes; by default there is one per visible GPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcr_mllm.cli import run_main
from dcr_mllm.command import parse_stage
from dcr_mllm.config import to_yaml
from dcr_mllm.errors import UserError
from dcr_mllm.hardware import warn_ignored
from dcr_mllm.launch import Launch, announces, decide, is_child, start_processes
from dcr_mllm.log import rank
from dcr_mllm.runs import Run, open_run
from dcr_mllm.stopping import listening
from stage2_llava.checks import MINI, accumulation, preflight, tower_to_make
from stage2_llava.config import Stage2Config

if TYPE_CHECKING:
    from stage2_llava.phase import PhaseData

CONFIGS = Path(__file__).parent / "configs"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_main(lambda: _main(arguments))


def _main(argv: list[str]) -> int:
    options, config = parse_stage(argv, Stage2Config, CONFIGS, prog="stage2_llava.sh", description=__doc__ or "stage 2")
    if options.print_config:
        print(to_yaml(config), end="")
        return 0

    notes = preflight(config)
    run = open_run(config.runs_dir, config, create=False)
    if run.state == "finished" and not options.dry_run:
        _print_results(run.results())
        print(f"{run.path} is finished; for another run of the same config give run=NAME.")
        return 0

    launch = decide(config.precision, config.deepspeed)
    micro_steps = {name: accumulation(phase, launch.num_processes, name) for name, phase in config.phases()}
    if announces():
        for name, phase in config.phases():
            print(f"{name}: {launch.describe(phase.micro_batch_size, micro_steps[name])}")
        for note in notes:
            print(note)
        print(f"run directory: {run.path} ({run.state})", flush=True)
        warn_ignored(config.hardware, launch.device)
    if options.dry_run:
        if config.phases():
            from stage2_llava.train import phase_tables

            print(phase_tables(config))
        return 0

    if not is_child():
        # Before the processes start: none of them looks for a tower or data that another one still makes.
        _make_towers(config)
        open_run(config.runs_dir, config)
        _data(config)
        start_processes(launch.num_processes, "stage2_llava", argv)
    for tower in config.towers.values():
        if tower_to_make(config, tower) is not None:
            raise UserError(f"tower {tower} does not exist; run stage 1 ({config.stage1}) first, torchrun cannot do it")

    with listening():
        from stage2_llava.train import run_stage2

        run = open_run(config.runs_dir, config, create=rank() == 0)
        results = run_stage2(config, launch, run, _data(config))
    if rank() == 0:
        if config.heldout is not None:
            results["heldout"] = _ask_heldout(config, launch, run, results)
        run.finish(results)
        _print_results(results)
    return 0


def _make_towers(config: Stage2Config) -> None:
    """Run stage 1, a program of its own, for towers that are not there yet; then check what it made."""
    made = False
    for name, tower in config.towers.items():
        wanted = tower_to_make(config, tower)
        if wanted is None:
            continue
        runs_dir, run = wanted
        print(f"tower {name}: running stage 1 ({config.stage1}) first, into {runs_dir / run}", flush=True)
        command = [sys.executable, "-m", "stage1_dcr", str(config.stage1), f"runs_dir={runs_dir}", f"run={run}"]
        done = subprocess.run(command, check=False)
        if done.returncode != 0:
            raise UserError(f"stage 1 for tower {name} failed, see above; its run is {runs_dir / run}")
        made = True
    if made:
        preflight(config)


def mini_data(config: Stage2Config) -> Path:
    """Folder with the miniature's instruction data, drawn once below the runs directory."""
    from dcr_mllm.mini.instructions import write_instruction_data

    return write_instruction_data(Path(config.runs_dir) / "mini-data" / "instructions")


def _data(config: Stage2Config) -> dict[str, PhaseData]:
    """Files and image roots by phase; `mini` becomes files below the runs directory, drawn once."""
    from stage2_llava.phase import PhaseData

    found: dict[str, PhaseData] = {}
    for name, phase in config.phases():
        assert phase.data is not None, "preflight refuses empty data"
        if phase.data == MINI:
            folder = mini_data(config)
            found[name] = PhaseData(files=str(folder / f"{name}.json"), images=str(folder))
        else:
            found[name] = PhaseData(files=phase.data, images=phase.images)
    return found


def _ask_heldout(config: Stage2Config, launch: Launch, run: Run, results: dict[str, Any]) -> dict[str, Any]:
    """Held-out questions to every LLaVA of the run; the summary, the rest is in `heldout.json`."""
    from stage2_llava.heldout import evaluate_heldout

    assert config.heldout is not None
    data, images = config.heldout, config.heldout_images
    if data == MINI:
        folder = mini_data(config)
        data, images = str(folder / "heldout.json"), str(folder)
    llavas = {name: Path(result["llava"]) for name, result in results["llavas"].items()}
    return evaluate_heldout(
        llavas, data, images, run.path / "heldout.json", device=launch.device, limit=config.heldout_limit
    )


def _print_results(results: dict[str, Any]) -> None:
    for name, result in results["llavas"].items():
        print(f"{name}: {result['llava']}")
    if "heldout" in results:
        from stage2_llava.heldout import format_heldout

        print(format_heldout(results["heldout"]))


if __name__ == "__main__":
    sys.exit(main())
