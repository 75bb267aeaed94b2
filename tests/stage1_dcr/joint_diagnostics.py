"""Runs the tower phase with diagnostics, in one process or as one of two, under each engine."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch

ENGINES = ("none", "zero1", "zero2")
SETTINGS = {
    "objective": "joint",
    "projector_steps": 0,
    "tower_steps": 2,
    "tower_learning_rate": 1e-3,
    "lora_rank": 2,
    "lora_alpha": 2,
    "lora_dropout": 0.0,
    "negatives": "global",
    "batch_size": 3,
    "accumulation": 2,
    "num_workers": 0,
    "shuffle_buffer": 10,
    "save_every": 1000,
    "log_every": 1,
    "report_to": "none",
    "diagnose_every": 1,
}


def save_projector(tower: Path, denoiser: Path, path: Path) -> Path:
    """A random projector between them."""
    from dcr_mllm.towers import load_full_model, vision_tower
    from stage1_dcr.denoiser import Denoiser
    from stage1_dcr.projector import Projector

    torch.manual_seed(0)
    width = vision_tower(load_full_model(tower)).width
    Projector(width, Denoiser.load(denoiser).cross_attention_dim, hidden_width=16).save(path)
    return path


def read(folder: Path) -> list[dict]:
    """The lines of a run's diagnostics."""
    return [json.loads(line) for line in (folder / "test" / "diagnostics.jsonl").read_text().splitlines()]


def lines(
    tower: str, denoiser: str, projector: str, data: str, out: str, *, deepspeed: str, joint: bool = False
) -> list[dict]:
    """Train and read; `joint`: alone, but on the batches of two processes side by side."""
    import stage1_dcr.train as train
    from dcr_mllm.launch import launch_on
    from dcr_mllm.runs import open_run
    from stage1_dcr.config import Stage1Config

    rank = int(os.environ.get("RANK", "0"))
    folder = Path(out) / ("joint" if joint else deepspeed)
    config = Stage1Config(
        run="test",
        runs_dir=str(folder),
        tower=tower,
        denoiser=denoiser,
        data=data,
        projector=projector,
        deepspeed=deepspeed,
        **SETTINGS,  # type: ignore[arg-type]
    )
    real = train.make_loader

    class Joint:
        def __init__(self, **arguments):
            del arguments["position"]  # each loader keeps its own
            self.loaders = [real(data, **{**arguments, "rank": rank, "world_size": 2}) for rank in range(2)]

        def __iter__(self):
            for pair in zip(*self.loaders, strict=True):
                names = [name for name, value in pair[0].items() if isinstance(value, torch.Tensor)]
                yield {name: torch.cat([part[name] for part in pair]) for name in names}

    launch = launch_on("cpu", int(os.environ.get("WORLD_SIZE", "1")), "fp32", deepspeed)
    run = open_run(folder, config, create=rank == 0)
    with mock.patch.object(train, "make_loader", (lambda _, **values: Joint(**values)) if joint else real):
        if joint:
            with mock.patch.object(train.StreamPosition, "update", lambda self, batch: None):
                train.run_stage1(config, launch, run, data)
        else:
            train.run_stage1(config, launch, run, data)
    return read(folder) if rank == 0 else []


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for engine in ENGINES:
        lines(*sys.argv[1:], deepspeed=engine)


if __name__ == "__main__":
    main()
