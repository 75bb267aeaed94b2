"""Stage 1 as a user starts it, on tiny random models: output layout, kill and resume, several processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dcr_mllm.mini.data import write_labelled, write_mmvp_vlm
from tests.processes import clean_environment, kill_when_there, run_to_end

REPOSITORY = Path(__file__).parents[2]
NUM_STEPS = 12


@pytest.fixture(scope="module")
def settings(tiny_clip: Path, tiny_denoiser: Path, tiny_shards: str) -> dict:
    """A config on tiny models; every step is saved so that a kill can come anywhere."""
    return {
        "tower": str(tiny_clip),
        "denoiser": str(tiny_denoiser),
        "data": tiny_shards,
        "projector_width": 16,
        "projector_steps": NUM_STEPS,
        "tower_steps": NUM_STEPS,
        "projector_learning_rate": 1e-3,
        "tower_learning_rate": 1e-3,
        "lora_rank": 4,
        "lora_alpha": 4,
        "batch_size": 3,
        "accumulation": 2,
        "num_workers": 1,
        "shuffle_buffer": 10,
        "save_every": 1,
        "log_every": 1,
        "report_to": "none",
    }


def command(folder: Path, settings: dict, **changes: object) -> tuple[list[str], dict[str, str]]:
    folder.mkdir(exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({**settings, "run": "test", "runs_dir": str(folder / "runs"), **changes}))
    return [sys.executable, "-m", "stage1_dcr", str(config)], clean_environment()


def run(folder: Path, settings: dict, processes: int = 1, **changes: object) -> Path:
    """Run to the end; returns the run directory."""
    argv, environment = command(folder, settings, **changes)
    run_to_end(argv, {**environment, "NPROC": str(processes)})
    return folder / "runs" / "test"


def kill_after(folder: Path, settings: dict, checkpoint: str) -> None:
    """Start, and kill -9 as soon as a checkpoint is complete."""
    argv, environment = command(folder, settings)
    marker = folder / "runs" / "test" / "checkpoints" / checkpoint / "COMPLETE"
    kill_when_there(argv, environment, marker, folder / "log.txt")


def losses(directory: Path) -> list[tuple[str, int, float]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [(record["phase"], record["step"], record["loss"]) for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, settings: dict) -> Path:
    """The uninterrupted run."""
    return run(tmp_path_factory.mktemp("whole"), settings)


def test_run_directory_holds_everything(finished: Path, tiny_clip: Path):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel, CLIPVisionModel

    tower = finished / "tower"
    for name in ("config.json", "model.safetensors", "provenance.json", "README.md"):
        assert (tower / name).is_file()
    AutoImageProcessor.from_pretrained(tower)
    model = AutoModel.from_pretrained(tower)
    assert isinstance(model, CLIPModel)
    assert len(AutoTokenizer.from_pretrained(tower)) == model.config.text_config.vocab_size
    CLIPVisionModel.from_pretrained(tower)

    base, new = load_file(tiny_clip / "model.safetensors"), load_file(tower / "model.safetensors")
    assert set(base) == set(new)
    changed = {name for name in base if not torch.equal(base[name].float(), new[name].float())}
    assert changed and all(".encoder.layers." in name and name.startswith("vision_model.") for name in changed)
    for name in set(base) - changed:
        assert base[name].dtype == new[name].dtype

    record = json.loads((tower / "provenance.json").read_text())
    for key in ("config", "base_tower", "denoiser", "data", "seeds", "packages", "steps", "git"):
        assert key in record
    assert (finished / "projector" / "model.safetensors").is_file()
    assert json.loads((finished / "finished.json").read_text())["tower"].endswith("tower")


def test_hardware_settings_change_no_loss(finished: Path, settings: dict, tmp_path: Path):
    """On a CPU some are ignored, with a warning each, and the others give the same numbers."""
    hardware = {"tf32": True, "prefetch": True, "cuda_graphs": True, "channels_last": True, "attention": "math"}
    changes = {"hardware": hardware, "projector_steps": 2, "tower_steps": 0}
    argv, environment = command(tmp_path, settings, **changes)
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = losses(tmp_path / "runs" / "test")
    expected = [line for line in losses(finished) if line[0] == "projector"][:2]
    assert [line[:2] for line in found] == [line[:2] for line in expected]
    assert [line[2] for line in found] == pytest.approx([line[2] for line in expected], rel=1e-5)
    for name in ("tf32", "prefetch", "cuda_graphs"):
        assert done.stderr.count(f"hardware.{name} does nothing on a CPU and is ignored") == 1
    assert "channels_last does nothing" not in done.stderr


def test_siglip_tower_trains_and_is_exported(settings: dict, tiny_siglip: Path, tmp_path: Path):
    from transformers import AutoImageProcessor, AutoTokenizer, SiglipModel

    tower = run(tmp_path, settings, tower=str(tiny_siglip), projector_steps=2, tower_steps=2) / "tower"
    SiglipModel.from_pretrained(tower)
    assert list(AutoImageProcessor.from_pretrained(tower).image_mean) == [0.5] * 3
    assert len(AutoTokenizer.from_pretrained(tower)) == len(AutoTokenizer.from_pretrained(tiny_siglip))
    base, new = load_file(tiny_siglip / "model.safetensors"), load_file(tower / "model.safetensors")
    assert set(base) == set(new)
    changed = {name for name in base if not torch.equal(base[name].float(), new[name].float())}
    # Every linear layer of the blocks has moved, the pooling head and the text side have not.
    layers = {name for name in base if name.startswith("vision_model.encoder.layers.") and base[name].ndim == 2}
    assert layers and changed == layers


def test_end_to_end_has_one_phase_and_both_rates(settings: dict, tmp_path: Path):
    """Killed and resumed as well: weights and losses are those of an uninterrupted run."""
    changes = {"objective": "dcr-end-to-end", "condition": "class+pooled-patches", "tower_steps": 4}
    changes |= {"projector_learning_rate": 1e-2, "tower_learning_rate": 1e-4}
    whole = run(tmp_path / "whole", settings, **changes)
    assert {phase for phase, _, _ in losses(whole)} == {"tower"}
    state = torch.load(whole / "checkpoints" / "tower" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    # 6 tensors of the projector: 3 of them biases or a norm's, which no weight decay holds back.
    rates = sorted((group["lr"], group["weight_decay"], len(group["params"])) for group in state["param_groups"])
    weights = load_file(whole / "checkpoints" / "tower" / "checkpoint-4" / "model.safetensors")
    num_lora = sum(".lora_" in name for name in weights)
    assert rates == [(1e-4, 0.01, num_lora), (1e-2, 0.0, 4), (1e-2, 0.01, 2)]
    projector = load_file(whole / "projector" / "model.safetensors")
    for name, value in projector.items():
        assert torch.equal(value, weights[f"projector.{name}"])
    assert (whole / "tower" / "model.safetensors").is_file()

    resumed = tmp_path / "resumed"
    argv, environment = command(resumed, settings, **changes)
    marker = resumed / "runs" / "test" / "checkpoints" / "tower" / "checkpoint-2" / "COMPLETE"
    kill_when_there(argv, environment, marker, resumed / "log.txt")
    again = run(resumed, settings, **changes)
    assert losses(again) == losses(whole)
    for part in ("projector", "tower"):
        assert (again / part / "model.safetensors").read_bytes() == (whole / part / "model.safetensors").read_bytes()


def test_checkpoints_hold_what_trains_and_no_more(finished: Path):
    for phase, marker in (("projector", "projector."), ("tower", ".lora_")):
        last = finished / "checkpoints" / phase / f"checkpoint-{NUM_STEPS}"
        names = set(load_file(last / "model.safetensors"))
        assert names and all(marker in name for name in names)
        assert not (last / "training_args.bin").exists()


def test_metrics_are_complete(finished: Path):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(r["phase"], r["step"]) for r in records] == [
        (phase, step) for phase in ("projector", "tower") for step in range(1, NUM_STEPS + 1)
    ]
    for name in ("loss", "loss_view", "loss_target", "cos_view", "cos_target", "cos_negative", "grad_norm"):
        assert all(name in record for record in records)
    assert all(record["num_negatives"] == 2 for record in records)
    assert all(abs(r["loss"] - (r["loss_view"] + r["loss_target"]) / 2) < 1e-4 for r in records)
    assert any("images_per_second" in record for record in records)


def test_killed_in_both_phases_and_resumed_gives_the_same_losses(finished: Path, settings: dict, tmp_path: Path):
    kill_after(tmp_path, settings, "projector/checkpoint-4")
    kill_after(tmp_path, settings, "tower/checkpoint-5")
    resumed = run(tmp_path, settings)
    assert losses(resumed) == losses(finished)
    expected = load_file(finished / "tower" / "model.safetensors")
    one = load_file(resumed / "tower" / "model.safetensors")
    assert all(torch.equal(one[name], expected[name]) for name in expected)
    # As a kill between the last checkpoint and the export leaves it: nothing is left to train.
    shutil.rmtree(resumed / "tower")
    (resumed / "finished.json").unlink()
    run(tmp_path, settings)
    again = load_file(resumed / "tower" / "model.safetensors")
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert losses(resumed) == losses(finished)


def test_finished_run_prints_results_and_is_not_overwritten(finished: Path, settings: dict):
    folder = finished.parents[1]
    before = (finished / "tower" / "model.safetensors").stat().st_mtime_ns
    argv, environment = command(folder, settings)
    again = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "run=NAME" in again.stdout and "tower" in again.stdout
    other = subprocess.run([*argv, "tau=0.2"], env=environment, capture_output=True, text=True, check=False)
    assert other.returncode == 2 and "tau" in other.stderr and "run=" in other.stderr
    assert (finished / "tower" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("key", ["lr=1", "tower_step=3"])
def test_unknown_key_names_the_nearest(settings: dict, tmp_path: Path, key: str):
    argv, environment = command(tmp_path, settings)
    done = subprocess.run([*argv, key], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and key.split("=")[0] in done.stderr
    if key.startswith("tower"):
        assert "tower_steps" in done.stderr


def test_print_config_and_dry_run(settings: dict, tmp_path: Path):
    argv, environment = command(tmp_path, settings, tower="no/where", denoiser="no/where", data=None)
    printed = subprocess.run([*argv, "--print-config"], env=environment, capture_output=True, text=True, check=False)
    assert printed.returncode == 0 and yaml.safe_load(printed.stdout)["tower"] == "no/where"
    argv, environment = command(tmp_path, settings)
    dry = subprocess.run([*argv, "--dry-run"], env=environment, capture_output=True, text=True, check=False)
    assert dry.returncode == 0, dry.stderr
    assert "LoRA" in dry.stdout and "projector" in dry.stdout and "effective batch 6" in dry.stdout
    assert not (tmp_path / "runs").exists()


def interleaved(settings: dict, folder: Path) -> dict[str, torch.Tensor]:
    """The judge: one process, without DeepSpeed, that accumulates the batches of both ranks."""
    from unittest import mock

    import stage1_dcr.train as train
    from dcr_mllm.config import load_config
    from dcr_mllm.launch import Launch
    from dcr_mllm.runs import open_run
    from stage1_dcr.config import Stage1Config

    command(folder, settings, accumulation=2)
    config = load_config(Stage1Config, folder / "config.yaml", [])
    real = train.make_loader

    class Both:
        dataset = None

        def __init__(self, **arguments):
            del arguments["position"]  # each loader keeps its own
            ranks = [{**arguments, "rank": rank, "world_size": 2} for rank in range(2)]
            self.loaders = [real(config.data, **rank) for rank in ranks]

        def __iter__(self):
            for pair in zip(*self.loaders, strict=True):
                yield from pair

    launch = Launch(device="cpu", num_processes=1, precision="fp32", deepspeed=None)
    with (
        mock.patch.object(train, "make_loader", lambda data, **arguments: Both(**arguments)),
        mock.patch.object(train.StreamPosition, "update", lambda self, batch: None),
    ):
        train.run_stage1(config, launch, open_run(config.runs_dir, config), config.data)
    return load_file(folder / "runs" / "test" / "tower" / "model.safetensors")


def check_validation_of(directory: Path, split: Path) -> None:
    """What two processes have measured is what the evaluation says of the tower that they exported."""
    from dcr_mllm.evaluation.tower import evaluate_towers
    from stage1_dcr.selection import read_measurements

    found = read_measurements(directory)
    assert [measurement.step for measurement in found] == [0, 2, 3]
    places = {"mmvp_vlm": split / "mmvp_vlm", "labelled": split / "labelled"}
    report = evaluate_towers({"new": directory / "tower"}, **places)["towers"]["new"]
    assert found[-1].pairs == pytest.approx(100 * report["mmvp_vlm"]["num_correct"] / 36)
    assert found[-1].zero_shot == pytest.approx(report["zero_shot"]["accuracy"])


@pytest.mark.parametrize("stages", [("zero2", "zero3")])
def test_two_processes_equal_one_that_accumulates(settings: dict, tmp_path: Path, tiny_clip: Path, stages):
    few = {**settings, "projector_steps": 3, "tower_steps": 3, "lora_dropout": 0.0, "num_workers": 0, "save_every": 2}
    judge = interleaved(few, tmp_path / "judge")
    base = load_file(tiny_clip / "model.safetensors")
    towers = {}
    write_mmvp_vlm(tmp_path / "split" / "mmvp_vlm", "validation", 4)
    write_labelled(tmp_path / "split" / "labelled", "validation", num_train=2, num_test=40)
    watched = {**few, "validation": str(tmp_path / "split"), "validate_every": 2}
    for stage in stages:
        directory = run(tmp_path / stage, watched, processes=2, accumulation=1, deepspeed=stage)
        check_validation_of(directory, tmp_path / "split")
        towers[stage] = load_file(directory / "tower" / "model.safetensors")
    trained = [name for name in base if name.endswith("fc1.weight") and name.startswith("vision_model")]
    for name in trained:
        moved = judge[name] - base[name]
        assert moved.abs().max() > 1e-5, "the judge has not moved"
        for tower in towers.values():
            assert (tower[name] - judge[name]).norm() < 1e-2 * moved.norm()
        assert torch.allclose(towers["zero2"][name], towers["zero3"][name], atol=1e-7)
