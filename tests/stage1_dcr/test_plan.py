"""The plan of stage 1: the memory of its step against the step itself, and what the command prints."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dcr_mllm import plan
from dcr_mllm.launch import DEEPSPEED_DIR, Launch
from dcr_mllm.memory import step_memory
from scripts.benchmark_plan import LIMIT, SETTINGS, run_child
from stage1_dcr import plan_step
from stage1_dcr.config import Stage1Config
from stage1_dcr.estimate import conditions_per_row
from stage1_dcr.plan import measured_images_per_second, rows_that_fit
from stage1_dcr.plan_step import REST, PlannedStep, planned_memory, unet_flops

CPU = Launch(device="cpu", num_processes=1, precision="fp32", deepspeed=None)


@pytest.fixture(scope="module")
def config(tiny_clip: Path, tiny_denoiser: Path) -> Stage1Config:
    return Stage1Config(
        tower=str(tiny_clip),
        denoiser=str(tiny_denoiser),
        data="mini",
        batch_size=4,
        rows_per_chunk=1,
        projector_width=16,
        lora_rank=2,
    )


def test_the_estimate_is_that_of_the_step_with_real_tensors(config: Stage1Config):
    """All rows, on tensors that exist: neither the fake ones nor the rows that are left out change the count."""
    torch.manual_seed(0)
    step = PlannedStep.build(config, CPU, "tower")
    expected = step_memory(step.run, step.components(), step.held(), rest=REST)
    _, found = planned_memory(config, CPU, "tower")
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=0.01)
    assert found["denoiser"] == expected["denoiser"]
    assert found["tower"] == expected["tower"]


def test_memory_grows_with_rows_and_halves_in_bf16(config: Stage1Config):
    plans = [planned_memory(replace(config, rows_per_chunk=rows), CPU, "projector") for rows in (1, 3, 4)]
    one, three, four = (step["denoiser"] for _, step in plans)
    assert 3.5 * one < four < 4.5 * one
    assert one < three < four, "the last chunk, of one row, is not the one that counts"
    engine = Launch(device="cuda", num_processes=8, precision="bf16", deepspeed=DEEPSPEED_DIR / "zero2.json")
    resident, half = planned_memory(config, engine, "projector")
    assert 0.35 * one < half["denoiser"] < 0.6 * one, "SDPA keeps no attention weights, and numbers take half"
    assert plans[0][0]["denoiser weights"] == 2 * resident["denoiser weights"]


def test_negatives_of_other_processes_take_memory(config: Stage1Config):
    two = Launch(device="cpu", num_processes=2, precision="fp32", deepspeed=None)
    local, joint = (
        planned_memory(replace(config, negatives=negatives), two, "tower")[1]["denoiser"]
        for negatives in ("local", "global")
    )
    assert 1.5 * local < joint < 2 * local, "rows of 9 conditions instead of 5"
    assert measured_images_per_second(replace(config, negatives=7), num_processes=2) > 0


def test_the_plain_grid_takes_more_than_the_shared_prompt(config: Stage1Config):
    gpu = Launch(device="cuda", num_processes=1, precision="fp32", deepspeed=None)
    shared, plain = (planned_memory(config, gpu, "tower", shared_prompt=s)[1]["denoiser"] for s in (True, False))
    assert plain > shared


def test_flops_are_those_of_the_layers(config: Stage1Config):
    """Counted once more by hooks on every layer of the real UNet: twice a forward pass, less what no gradient needs."""
    forward = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal forward
        per_output = module.weight[0].numel()
        forward += 2 * per_output * output.numel()

    stage = plan_step.EmptyStage(config, CPU)
    unet = stage.denoiser.modules()["unet"]
    for module in unet.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(count)
    assert conditions_per_row(config, "tower", 1) == conditions_per_row(config, "tower", 8) == 5
    assert conditions_per_row(replace(config, negatives="global"), "tower", 8) == 33
    assert conditions_per_row(replace(config, negatives=2), "tower", 8) == 4
    conditions = torch.randn(1, 5, stage.denoiser.cross_attention_dim)
    with torch.no_grad():
        stage.denoiser.predict(torch.randn(1, *stage.latent_shape), torch.zeros(1, dtype=torch.long), conditions)
    found = unet_flops(config, CPU, 5) / config.batch_size
    assert 1.8 * forward < found < 2.6 * forward, found / forward


def test_the_command_prints_every_part_and_what_fits(
    config: Stage1Config, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def memory(config: Stage1Config, launch: Launch, phase: str) -> tuple[dict[str, int], dict[str, int]]:
        assert (launch.device, launch.num_processes, launch.precision) == ("cuda", 2, "bf16")
        held = {"denoiser weights": 2 * plan.GIB, "optimizer state": plan.GIB // 10}
        return held, {phase: config.batch_size * config.rows_per_chunk * plan.GIB}

    monkeypatch.setattr(plan_step, "planned_memory", memory)  # a sum, in place of a step that takes seconds
    arguments = [
        "mini",
        "--stage=1",
        f"tower={config.tower}",
        f"denoiser={config.denoiser}",
        f"runs_dir={tmp_path}",
        "batch_size=4",
        "rows_per_chunk=2",
        "projector_steps=100",
        "tower_steps=7",
        "projector_objective=reconstruction",
        "accumulation=3",
        "--gpus=2",
        "--throughput=50",
    ]
    assert plan.main([*arguments, "--gpu-memory=20"]) == 0
    text = capsys.readouterr().out
    assert "tower phase: 7 steps of 24 = 168 images" in text
    assert "time at 50 images per second (given): projector 48 s, tower 3 s" in text
    assert "projector phase: 4 samples" in text and "tower phase: 20 samples" in text
    table = {line.split("  ")[1]: line.split()[-1] for line in text.splitlines() if line.startswith("  ")}
    assert table["denoiser weights"] == "2.00" and table["step: tower"] == "8.00" and table["optimizer state"] == "0.10"
    assert table["peak, with what is too small to show"] == "10.10"
    assert "fits: 50% of 20 GiB" in text
    for setting, peak in (("batch_size=4 rows_per_chunk=1", "6.1"), ("batch_size=8 rows_per_chunk=2", "18.1")):
        assert f"{setting:<38}{peak:>8}" in text
    assert "largest rows_per_chunk that fits: 3 of 4 (14.1 GiB)" in text
    assert "disk: " in text

    assert plan.main([*arguments, "--gpu-memory=6"]) == 1
    text = capsys.readouterr().out
    assert "PROBLEM: does not fit: 168% of 6 GiB" in text and "PROBLEM: no rows_per_chunk fits" in text
    assert "2 problems" in text


def test_throughput_is_measured_on_random_weights(config: Stage1Config, monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 9.0, 10.0, 12.0, 20.0, 24.0])  # three steps of 9, 2 and 4 seconds
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert measured_images_per_second(config) == config.batch_size / 2


class Linear:
    """A `Memory` of 2 GiB and 1 more per row."""

    config = Stage1Config(tower="mini", denoiser="mini", batch_size=8)

    def peak(self, rows_per_chunk: int) -> int:
        return (2 + rows_per_chunk) * plan.GIB


@pytest.mark.parametrize(
    ("usable", "sentence"),
    [(20, "rows_per_chunk that fits: 8 of 8 (10 GiB)"), (7.5, "fits: 5 of 8 (7 GiB)"), (3, "fits: 1 of 8 (3 GiB)")],
)
def test_the_largest_rows_are_named(usable: float, sentence: str):
    found = rows_that_fit(Linear(), int(usable * plan.GIB))  # type: ignore[arg-type]
    assert sentence in found and not isinstance(found, plan.Problem)


def test_that_no_rows_fit_is_a_problem():
    found = rows_that_fit(Linear(), int(2.9 * plan.GIB))  # type: ignore[arg-type]
    assert isinstance(found, plan.Problem)
    assert found.startswith("no rows_per_chunk fits: a single row needs 3 GiB of the 2.9 that may be planned")


def test_the_mini_estimate_is_within_limits_of_the_measured_one(tmp_path: Path):
    assert run_child(1, tmp_path)["ratio"] == pytest.approx(1, abs=LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize("index", [k for k, (group, _, _) in enumerate(SETTINGS) if group == "mid"])
def test_the_mid_size_estimates_are_within_limits_of_the_measured_ones(index: int, tmp_path: Path):
    assert run_child(index, tmp_path)["ratio"] == pytest.approx(1, abs=LIMIT), SETTINGS[index]


@pytest.mark.slow
def test_published_models_are_planned_without_their_weights(tmp_path: Path):
    """CLIP L/14 and Stable Diffusion 2.1-base from files without contents, in a process that never holds 2 GB."""
    import subprocess
    import sys

    from tests.published_models import save_hollow_clip, save_hollow_denoiser

    models = [f"tower={save_hollow_clip(tmp_path / 'clip')}", f"denoiser={save_hollow_denoiser(tmp_path / 'sd')}"]
    program = (
        "import resource, sys; from dcr_mllm.plan import main; status = main(sys.argv[1:]);"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10); sys.exit(status)"
    )
    arguments = ["openai-l14-224", *models, "data=mini", f"runs_dir={tmp_path}", "--gpus=8", "--gpu-memory=80"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "never      UNet                 865,910,724" in done.stdout
    assert int(done.stdout.split()[-1]) < 2e9
