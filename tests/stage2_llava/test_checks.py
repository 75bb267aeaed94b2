"""Bad input is refused before anything is loaded, in one sentence; shipped configs hold the recipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dcr_mllm.config import load_config
from dcr_mllm.errors import UserError
from stage2_llava.__main__ import CONFIGS, main
from stage2_llava.checks import accumulation, preflight, tower_to_make
from stage2_llava.config import InstructConfig, Stage2Config
from tests.tiny_models import save_tiny_clip

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def settings(tiny_clip: Path, tiny_llama: Path, llava_data: Path, tmp_path: Path) -> dict[str, Any]:
    """A sound config on tiny models."""
    return {
        "runs_dir": str(tmp_path / "runs"),
        "towers": {"baseline": str(tiny_clip)},
        "llm": str(tiny_llama),
        "template": "vicuna_v1",
        "max_length": 256,
        "align": {"data": str(llava_data / "align.json"), "images": str(llava_data)},
        "instruct": {"data": str(llava_data / "instruct.json"), "images": str(llava_data)},
    }


def refusal(settings: dict[str, Any], **changes: Any) -> str:
    merged = {**settings, **changes}
    with pytest.raises(UserError) as error:
        preflight(load_config(Stage2Config, base={k: v for k, v in merged.items() if v is not None}))
    return str(error.value)


def test_a_sound_config_passes(settings: dict[str, Any]):
    notes = "\n".join(preflight(load_config(Stage2Config, base=settings)))
    assert "16 tokens an image" in notes and "30 samples, 6 of them text-only" in notes


def test_llm_without_chat_template_and_none_chosen(settings: dict[str, Any]):
    assert "has no chat template; choose one with template=vicuna_v1" in refusal(settings, template="auto")


def test_unknown_template(settings: dict[str, Any]):
    assert "template 'vicuna' is unknown, did you mean 'vicuna_v1'" in refusal(settings, template="vicuna")
    assert "alignment only" in refusal(settings, template="plain")


def test_tower_against_existing_projector(
    settings: dict[str, Any], tiny_llava: Path, tiny_siglip: Path, tmp_path: Path
):
    wide = save_tiny_clip(tmp_path / "wide", hidden_size=48, num_heads=3)
    large = save_tiny_clip(tmp_path / "large", image_size=64)
    common = {"protocol": "instruct-only", "llava": str(tiny_llava), "llm": None}
    for tower, words in ((wide, "width"), (large, "image size"), (tiny_siglip, "siglip")):
        found = refusal(settings, towers={"new": str(tower)}, **common)
        assert words in found and "projector needs retraining" in found


def test_llava_whose_projector_contradicts_its_config(
    settings: dict[str, Any], tiny_clip: Path, tiny_llava: Path, tmp_path: Path
):
    llava = tmp_path / "llava"
    shutil.copytree(tiny_llava, llava)
    config = json.loads((llava / "config.json").read_text())
    width = config["text_config"]["hidden_size"]
    config["text_config"]["hidden_size"] = 2 * width
    (llava / "config.json").write_text(json.dumps(config))
    found = refusal(settings, protocol="instruct-only", llava=str(llava), llm=None)
    assert f"to {width}, but its config.json says tower" in found and f"language model {2 * width}" in found


def test_heldout_questions_of_several_turns(settings: dict[str, Any], llava_data: Path):
    found = refusal(settings, heldout=str(llava_data / "instruct.json"), heldout_images=str(llava_data))
    assert "has several turns, expected one question and its answer" in found


def test_layer_that_the_tower_does_not_have(settings: dict[str, Any]):
    assert "vision_feature_layer is -9" in refusal(settings, vision_feature_layer=-9)


def test_image_longer_than_a_sample_may_be(settings: dict[str, Any]):
    assert "max_length is 20" in refusal(settings, max_length=20)


def test_conversation_that_begins_with_the_assistant(settings: dict[str, Any], llava_data: Path, tmp_path: Path):
    sample = {"id": "x", "conversations": [{"from": "gpt", "value": "Hi"}, {"from": "human", "value": "Hello"}]}
    (tmp_path / "bad.json").write_text(json.dumps([sample]))
    found = refusal(settings, instruct={"data": str(tmp_path / "bad.json")})
    assert "bad.json[0]" in found and "begins with gpt" in found


def test_image_marks_against_images(settings: dict[str, Any], llava_data: Path, tmp_path: Path):
    sample = {
        "id": "x",
        "image": "images/0.png",
        "conversations": [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "two"}],
    }
    (tmp_path / "bad.json").write_text(json.dumps([sample]))
    found = refusal(settings, instruct={"data": str(tmp_path / "bad.json"), "images": str(llava_data)})
    assert "bad.json[0]" in found and "<image>" in found


def test_unreadable_json_names_file_and_line(settings: dict[str, Any], tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "conversations": []}\n{"id": \n')
    found = refusal(settings, instruct={"data": str(tmp_path / "bad.jsonl")})
    assert "bad.jsonl" in found and "1" in found


def test_qlora_without_cuda(settings: dict[str, Any]):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    instruct = {**settings["instruct"], "tuning": "qlora"}
    assert "needs a CUDA GPU" in refusal(settings, instruct=instruct)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"towers": {}}, "towers is empty"),
        ({"llm": None}, "llm is not set"),
        ({"llava": "x"}, "protocol recipe starts from llm"),
        ({"towers": {"a": "keep"}}, "keep"),
        ({"towers": {"a/b": "x"}}, "a/b"),
        ({"protocol": "swap"}, "llava is not set"),
        ({"align": {"batch_size": 0}}, "batch_size"),
        ({"instruct": {"lora_dropout": 1.5}}, "lora_dropout"),
        ({"instruct": {"lora_r": 8}}, "lora_r"),
    ],
)
def test_contradictions_in_the_config(settings: dict[str, Any], changes: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        load_config(Stage2Config, base={k: v for k, v in {**settings, **changes}.items() if v is not None})


def test_global_batch_is_kept_or_refused():
    """128 samples a step: 8 x 16, 4 x 16 x 2, one device 16 x 8; not with three processes of 16."""
    phase = InstructConfig()
    assert [accumulation(phase, count, "instruct") for count in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(
        UserError, match=r"instruct.batch_size is 128, which 16 processes .* set instruct.micro_batch_size=8"
    ):
        accumulation(phase, 16, "instruct")
    with pytest.raises(UserError, match="a number of processes that divides 128"):
        accumulation(phase, 3, "instruct")


def test_stage1_is_called_for_a_missing_tower_only(settings: dict[str, Any], tmp_path: Path):
    config = load_config(Stage2Config, base={**settings, "stage1": "mini"})
    assert tower_to_make(config, str(tmp_path / "runs" / "x" / "tower")) == (tmp_path / "runs", "x")
    assert tower_to_make(config, settings["towers"]["baseline"]) is None
    assert tower_to_make(config, "openai/clip-vit-large-patch14") is None


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.yaml"))])
def test_shipped_configs_resolve(name: str, capsys: pytest.CaptureFixture[str]):
    assert main([name, "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["towers"]


def test_llava_config_is_the_recipe(capsys: pytest.CaptureFixture[str]):
    """LLaVA-1.5's scripts (v1_5/pretrain.sh, finetune_lora.sh), not its code's defaults."""
    assert main(["llava-1.5-7b", "towers.enhanced=my/tower", "--print-config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    shared = {"epochs": 1.0, "warmup_ratio": 0.03, "schedule": "cosine", "weight_decay": 0.0}
    align = {
        **shared,
        "learning_rate": 1e-3,
        "batch_size": 256,
        "image_aspect_ratio": "square",
        "group_by_modality": False,
    }
    instruct = {
        **shared,
        "learning_rate": 2e-4,
        "projector_learning_rate": 2e-5,
        "batch_size": 128,
        "image_aspect_ratio": "pad",
        "group_by_modality": True,
        "lora_rank": 128,
        "lora_alpha": 256,
        "lora_dropout": 0.05,
    }
    assert {key: config["align"][key] for key in align} == align
    assert {key: config["instruct"][key] for key in instruct} == instruct
    assert (config["vision_feature_layer"], config["max_length"], config["template"]) == (-2, 2048, "vicuna_v1")
    assert config["towers"] == {"baseline": "openai/clip-vit-large-patch14-336", "enhanced": "my/tower"}


def test_refusals_load_no_heavy_library():
    """A wrong path answers in a moment: neither torch nor transformers has been imported."""
    code = (
        "import sys\nfrom stage2_llava.__main__ import main\n"
        "status = main(['mini', 'llm=/no/where'])\n"
        "heavy = {'torch', 'transformers', 'peft', 'deepspeed'} & set(sys.modules)\n"
        "print(status, sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip() == "2 []"
    assert "/no/where" in done.stderr
