"""The command before anything is trained: shipped configs, and bad input refused without loading a library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stage1_dcr.__main__ import CONFIGS, main

REPOSITORY = Path(__file__).parents[2]
SHARED = Path(os.environ.get("DCR_MLLM_SHARED", REPOSITORY.parent / "shared"))
PHOTOS = SHARED / "data" / "photos"


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.yaml"))])
def test_shipped_configs_resolve(name: str, capsys: pytest.CaptureFixture[str]):
    assert main([name, "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["run"] == name


def test_every_tower_of_the_paper_has_a_config(capsys: pytest.CaptureFixture[str]):
    published = yaml.safe_load((REPOSITORY / "dcr_mllm" / "evaluation" / "published.yaml").read_text())
    for name, hub_id in published["backbones"]["hub_ids"].items():
        assert main([name, "--print-config"]) == 0
        config = yaml.safe_load(capsys.readouterr().out)
        assert (config["tower"], config["tower_steps"], config["prediction_type"]) == (hub_id, 4600, None)


def test_defaults_are_the_published_recipe(capsys: pytest.CaptureFixture[str]):
    """docs of the method, 'shipped configs': batch 16 x accumulation 2, 100,000 and 4,600 steps, LoRA 16/16/0.1."""
    assert main(["openai-l14-336", "--print-config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    expected = {
        "projector_steps": 100_000,
        "tower_steps": 4600,
        "projector_learning_rate": 1e-4,
        "tower_learning_rate": 1e-5,
        "lora_rank": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "batch_size": 16,
        "accumulation": 2,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "schedule": "constant",
        "projector_width": 1024,
        "tau": 0.1,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["views"]["horizontal_flip"] == config["views"]["vertical_flip"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mini", "tower=no/where"], ["tower", "no/where"]),
        (["mini", "data=/no/such/*.tar"], ["data", "/no/such/*.tar"]),
        (["mini", "batch_size=1"], ["batch_size", "negatives"]),
        (["mini", "tower_steps=x"], ["tower_steps", "x"]),
        (["mini", "learning_rate=1"], ["learning_rate"]),
        (["no-such-config"], ["no-such-config", "mini"]),
        (["mini", "image_size=40"], ["image_size", "40"]),
        (["mini", "timestep_range=[5, 5]"], ["timestep_range"]),
        (["mini", "projector_steps=0"], ["projector"]),
        (["mini-photos"], ["data"]),
    ],
)
def test_bad_input_is_one_sentence_and_loads_nothing(arguments: list[str], words: list[str], tmp_path: Path):
    code = (
        "import sys; from stage1_dcr.__main__ import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'diffusers', 'deepspeed'} & set(sys.modules);"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, f"runs_dir={tmp_path}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no folder of real photographs")
def test_mini_tower_trains_on_real_photographs(tmp_path: Path):
    arguments = ["projector_steps=2", "tower_steps=2", "evaluate=false", "log_every=1", "report_to=none"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "stage1_dcr", "mini-photos", f"data={PHOTOS}/{{00000..00003}}.tar", *arguments]
    done = subprocess.run(
        [*command, f"runs_dir={tmp_path}"], env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "mini-photos"
    assert (run / "tower" / "model.safetensors").is_file()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
