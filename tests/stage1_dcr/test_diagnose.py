"""Diagnostics of whole runs: what is written, that training does not notice, kill and resume."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dcr_mllm.launch import Launch
from dcr_mllm.runs import open_run
from stage1_dcr.config import Stage1Config
from stage1_dcr.diagnose import negative_cosines
from tests.stage1_dcr.joint_diagnostics import save_projector
from tests.stage1_dcr.test_train import losses

STEPS = 4
LAUNCH = Launch(device="cpu", num_processes=1, precision="fp32", deepspeed=None)


@pytest.fixture(scope="module")
def projector(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path, tiny_denoiser: Path) -> Path:
    return save_projector(tiny_clip, tiny_denoiser, tmp_path_factory.mktemp("projector"))


@pytest.fixture(scope="module")
def train(tiny_clip: Path, tiny_denoiser: Path, tiny_shards: str, projector: Path) -> Callable[..., Path]:
    """Trains in this process and gives the run's directory."""
    from stage1_dcr.train import run_stage1

    def train(folder: Path, **changes: object) -> Path:
        settings = {
            "objective": "dcr",
            "projector": str(projector),
            "projector_steps": 0,
            "tower_steps": STEPS,
            "tower_learning_rate": 1e-3,
            "lora_rank": 2,
            "batch_size": 3,
            "accumulation": 2,
            "num_workers": 0,
            "shuffle_buffer": 10,
            "save_every": 1,
            "log_every": 1,
            "report_to": "none",
            "diagnose_every": 2,
        }
        config = Stage1Config(
            run="test",
            runs_dir=str(folder),
            tower=str(tiny_clip),
            denoiser=str(tiny_denoiser),
            data=tiny_shards,
            **{**settings, **changes},  # type: ignore[arg-type]
        )
        run = open_run(folder, config)
        run_stage1(config, LAUNCH, run, tiny_shards)
        return run.path

    return train


def read(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "diagnostics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("whole"))


def test_lines_hold_what_they_should(finished: Path):
    lines = read(finished)
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert lines[0]["conflict"] is None
    assert set(lines[1]["conflict"]) == {"cosine", "dot", "norm_contrastive", "norm_reconstruction"}
    for line in lines:
        assert set(line) == {"step", "conflict", "effective_rank", "uniformity", "alignment", "drift"}
        assert len(line["drift"]["class"]) == len(line["drift"]["patches"]) == 4  # three blocks and what enters them
        assert all(line[name]["base"] == lines[0][name]["base"] for name in ("effective_rank", "uniformity"))
    assert max(lines[0]["drift"]["class"] + lines[0]["drift"]["patches"]) == 0
    assert 0 < lines[1]["drift"]["class"][-1] < lines[2]["drift"]["class"][-1]


def test_training_does_not_notice(finished: Path, train: Callable[..., Path], tmp_path: Path):
    """LoRA dropout is on, so that a single random number more would show."""
    without = train(tmp_path, diagnose_every=0)
    assert not (without / "diagnostics.jsonl").exists()
    assert len(losses(finished)) == STEPS and losses(without) == losses(finished)
    one, other = (load_file(path / "tower" / "model.safetensors") for path in (without, finished))
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("last", [3, 0])
def test_a_resumed_run_has_each_line_once(finished: Path, train: Callable[..., Path], tmp_path: Path, last: int):
    """Killed after the line of step 4 and in the middle of another, with this last checkpoint, or none."""
    folder = tmp_path / "runs"
    shutil.copytree(finished.parent, folder)
    run = folder / "test"
    shutil.rmtree(run / "tower")
    for checkpoint in (run / "checkpoints" / "tower").iterdir():
        if int(checkpoint.name.split("-")[1]) > last:
            shutil.rmtree(checkpoint)
    with (run / "diagnostics.jsonl").open("a") as file:
        file.write('{"step": 6, "conflict": {"cosine": 0.5}')
    assert train(folder) == run
    assert read(run) == read(finished)


def test_the_share_of_negative_cosines(tmp_path: Path):
    file = tmp_path / "diagnostics.jsonl"
    cosines = [-0.5, 0.1, None, -0.1]
    lines: list[dict] = [{"conflict": None}, *({"conflict": {"cosine": value}} for value in cosines)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert negative_cosines(file) == (2, 3)


def test_objectives_without_two_parts_have_no_conflict(
    train: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger="dcr_mllm"):
        lines = read(train(tmp_path, objective="reconstruction", tower_steps=1, diagnose_every=1))
    assert [line["conflict"] for line in lines] == [None, None]
    assert not [record for record in caplog.records if "gradient conflict" in record.message]


def test_end_to_end_measures_the_tower_alone(train: Callable[..., Path], tmp_path: Path):
    """The projector trains too, but its gradients are not in the norms: those of `dcr` behind the same projector."""
    few = {"tower_steps": 1, "diagnose_every": 1, "lora_dropout": 0.0}
    both = [train(tmp_path / name, objective=name, **few) for name in ("dcr", "dcr-end-to-end")]
    one, other = (read(run)[1]["conflict"] for run in both)
    assert one == pytest.approx(other, rel=1e-5)
