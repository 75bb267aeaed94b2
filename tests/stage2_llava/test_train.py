"""Stage 2 as a user starts it, on tiny random models: outputs, kill and resume, several processes, protocols."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dcr_mllm.llava import load_llava, load_processor
from tests.processes import clean_environment, kill_when_there, run_to_end
from tests.stage2_llava.data import write_data

REPOSITORY = Path(__file__).parents[2]
NUM_STEPS = 6


@pytest.fixture(scope="module")
def settings(tiny_clip: Path, tiny_llama: Path, llava_data: Path) -> dict[str, Any]:
    """A config on tiny models; every step is saved so that a kill can come anywhere."""
    phase = {"images": str(llava_data), "batch_size": 8, "micro_batch_size": 4, "max_steps": NUM_STEPS}
    return {
        "run": "test",
        "towers": {"base": str(tiny_clip)},
        "llm": str(tiny_llama),
        "template": "vicuna_v1",
        "max_length": 256,
        "align": {**phase, "data": str(llava_data / "align.json"), "learning_rate": 1e-2},
        "instruct": {
            **phase,
            "data": str(llava_data / "instruct.json"),
            "learning_rate": 1e-2,
            "projector_learning_rate": 1e-2,
            "lora_rank": 4,
            "lora_alpha": 8,
        },
        "num_workers": 0,
        "save_every": 1,
        "log_every": 1,
        "report_to": "none",
    }


def command(folder: Path, settings: dict[str, Any], **changes: Any) -> tuple[list[str], dict[str, str]]:
    folder.mkdir(exist_ok=True)
    merged = {**settings, "runs_dir": str(folder / "runs")}
    for key, value in changes.items():
        merged[key] = {**merged[key], **value} if key in ("align", "instruct") else value
    (folder / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in merged.items() if v is not None}))
    return [sys.executable, "-m", "stage2_llava", str(folder / "config.yaml")], clean_environment()


def run(folder: Path, settings: dict[str, Any], processes: int = 1, **changes: Any) -> Path:
    """Run to the end; returns the run directory."""
    argv, environment = command(folder, settings, **changes)
    run_to_end(argv, {**environment, "NPROC": str(processes)})
    return folder / "runs" / "test"


def kill_after(folder: Path, settings: dict[str, Any], checkpoint: str) -> None:
    """Start, and kill -9 as soon as a checkpoint is complete."""
    argv, environment = command(folder, settings)
    marker = folder / "runs" / "test" / "base" / "checkpoints" / checkpoint / "COMPLETE"
    kill_when_there(argv, environment, marker, folder / "log.txt")


def losses(directory: Path) -> list[tuple[str, int, float]]:
    lines = (directory / "base" / "metrics.jsonl").read_text().splitlines()
    return [(record["phase"], record["step"], record["loss"]) for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Path:
    """The uninterrupted run."""
    return run(tmp_path_factory.mktemp("whole"), settings)


def test_run_directory_holds_everything(finished: Path, tiny_clip: Path):
    arm = finished / "base"
    for name in ("aligned", "llava"):
        for file in ("config.json", "model.safetensors", "processor_config.json", "chat_template.jinja"):
            assert (arm / name / file).is_file()
        for file in ("generation_config.json", "provenance.json", "README.md", "tokenizer.json"):
            assert (arm / name / file).is_file()
    assert [phase for phase, _, _ in losses(finished)] == ["align"] * NUM_STEPS + ["instruct"] * NUM_STEPS
    first, last = losses(finished)[0][2], losses(finished)[-1][2]
    assert last < first - 0.2
    record = json.loads((arm / "llava" / "provenance.json").read_text())
    for key in ("config", "seeds", "packages", "merged_adapter", "base", "data", "template", "tower_parameters_sha256"):
        assert key in record

    tower = load_file(tiny_clip / "model.safetensors")
    llava = load_file(arm / "llava" / "model.safetensors")
    names = [name for name in llava if name.startswith("vision_tower.")]
    assert names
    for name in names:
        own = name.removeprefix("vision_tower.").removeprefix("vision_model.")
        assert torch.equal(llava[name], tower[f"vision_model.{own}"]), name


def test_each_phase_changes_what_it_trains_and_nothing_else(finished: Path):
    aligned = load_file(finished / "base" / "aligned" / "model.safetensors")
    llava = load_file(finished / "base" / "llava" / "model.safetensors")
    changed = {name for name in llava if not torch.equal(aligned[name], llava[name])}
    linears = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    expected = {f"language_model.model.layers.{layer}.{part}.weight" for layer in range(2) for part in linears}
    expected |= {f"multi_modal_projector.linear_{k}.{part}" for k in (1, 2) for part in ("weight", "bias")}
    assert changed == expected


def test_adapter_loads_on_its_base(finished: Path):
    from peft import PeftModel

    arm = finished / "base"
    record = json.loads((arm / "adapter" / "adapter_config.json").read_text())
    model = PeftModel.from_pretrained(load_llava(record["base_model_name_or_path"]), arm / "adapter").eval()
    processor = load_processor(arm / "llava")
    inputs = processor(text="USER: Is it red? ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(
            load_llava(arm / "llava")(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5
        )


def test_a_checkpoint_merges(finished: Path, tmp_path: Path):
    """Mid-run checkpoints are adapters; the one of the last step is the adapter itself."""
    from stage2_llava.export import merge

    arm = finished / "base"
    merged = merge(arm / "aligned", arm / "checkpoints" / "instruct" / f"checkpoint-{NUM_STEPS}", tmp_path / "out")
    mine, theirs = load_file(merged / "model.safetensors"), load_file(arm / "llava" / "model.safetensors")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_same_command_again_prints_results_and_another_config_is_refused(finished: Path, settings: dict[str, Any]):
    folder = finished.parents[1]
    argv, environment = command(folder, settings)
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "is finished" in done.stdout and str(finished / "base" / "llava") in done.stdout
    done = subprocess.run([*argv, "seed=5"], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "seed: 0 -> 5" in done.stderr and "run=test-2" in done.stderr


@pytest.mark.parametrize("checkpoint", ["align/checkpoint-3", "instruct/checkpoint-2"])
def test_kill_and_resume_changes_nothing(tmp_path: Path, settings: dict[str, Any], finished: Path, checkpoint: str):
    kill_after(tmp_path / "killed", settings, checkpoint)
    assert not (tmp_path / "killed" / "runs" / "test" / "finished.json").exists()
    resumed = run(tmp_path / "killed", settings)
    assert losses(resumed) == losses(finished)
    mine, theirs = (load_file(path / "base" / "llava" / "model.safetensors") for path in (resumed, finished))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.timeout(900)  # DeepSpeed compiles its shared-memory operator, once per machine
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_processes_with_a_text_only_batch_on_one(tmp_path: Path, settings: dict[str, Any], stage: str):
    """No hang, and the result of one process that accumulates both processes' samples."""
    folder = write_data(tmp_path / "data", num_images=6, num_text=6)
    few = {"data": str(folder / "instruct.json"), "images": str(folder), "max_steps": 3, "group_by_modality": False}
    align = {"batch_size": 2, "micro_batch_size": 1, "max_steps": 2}
    instruct = {**few, "batch_size": 2, "micro_batch_size": 1, "lora_dropout": 0.0}
    results = {}
    for name, processes, deepspeed in (("one", 1, "none"), ("two", 2, stage)):
        directory = run(
            tmp_path / name, settings, processes, align=align, instruct=instruct, deepspeed=deepspeed, save_every=100
        )
        results[name] = load_file(directory / "base" / "llava" / "model.safetensors")
    base = load_file(tmp_path / "one" / "runs" / "test" / "base" / "aligned" / "model.safetensors")
    for key, value in results["one"].items():
        difference, moved = (results["two"][key] - value).norm(), (value - base[key]).norm()
        assert difference <= 0.02 * max(moved, 1e-3), (key, difference, moved)
    assert any(not torch.equal(results["two"][key], base[key]) for key in base if "layers" in key)


def test_instruct_only_and_swap_start_from_a_llava(
    tmp_path: Path, settings: dict[str, Any], finished: Path, tiny_clip: Path
):
    from tests.tiny_models import save_tiny_clip

    other = save_tiny_clip(tmp_path / "other", seed=9)
    start = {"llm": None, "llava": str(finished / "base" / "aligned"), "towers": {"base": "keep", "new": str(other)}}
    directory = run(tmp_path / "instruct", settings, protocol="instruct-only", template="auto", **start)
    assert not (directory / "base" / "aligned").exists()
    assert (directory / "new" / "swapped" / "config.json").is_file()
    again = load_file(directory / "base" / "llava" / "model.safetensors")
    before = load_file(finished / "base" / "llava" / "model.safetensors")
    assert all(torch.equal(again[name], before[name]) for name in before)

    start["towers"] = {"new": str(other)}
    directory = run(tmp_path / "swap", settings, protocol="swap", template="auto", **start)
    new = load_file(directory / "new" / "llava" / "model.safetensors")
    tower = load_file(other / "model.safetensors")
    assert any(
        torch.equal(new[name], tower[f"vision_model.{name.removeprefix('vision_tower.')}"])
        for name in new
        if name.startswith("vision_tower.encoder")
    )


def test_cached_features_train_the_same_and_towers_share_data(tmp_path: Path, settings: dict[str, Any], finished: Path):
    directory = run(
        tmp_path, settings, align={"cache_features": True}, instruct={"cache_features": True}, save_every=100
    )
    for (phase, step, mine), (_, _, theirs) in zip(losses(directory), losses(finished), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5), (phase, step)


def test_a_trained_llava_answers_its_training_questions(tmp_path: Path, settings: dict[str, Any]):
    """Twenty images, one question, answers that only the image tells: learned by heart."""
    from stage2_llava.chat import load_chatter

    folder = tmp_path / "data"
    folder.mkdir()
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    answers = ["Yes.", "No.", "left", "right", "three"]
    samples = []
    for k in range(20):
        colour = [int(c) for c in rng.integers(0, 256, 3)]
        Image.new("RGB", (32, 32), tuple(colour)).save(folder / f"{k}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answers[k % 5]}]
        samples.append({"id": str(k), "image": f"{k}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(samples))
    data = {"data": str(folder / "data.json"), "images": str(folder), "batch_size": 20, "micro_batch_size": 20}
    directory = run(
        tmp_path / "run",
        settings,
        align={**data, "max_steps": 5},
        instruct={**data, "max_steps": 250, "tuning": "full", "learning_rate": 3e-3, "projector_learning_rate": 1e-2},
        save_every=1000,
        log_every=50,
        gradient_checkpointing=False,
    )
    chatter = load_chatter(directory / "base" / "llava", device="cpu", max_new_tokens=8)
    given = [
        chatter(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
            Image.open(folder / f"{k}.png").convert("RGB"),
        )
        for k in range(20)
    ]
    assert sum(answer == answers[k % 5] for k, answer in enumerate(given)) == 20, given
