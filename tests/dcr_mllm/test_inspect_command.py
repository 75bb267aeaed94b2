"""`inspect` says what directories hold and what of several does not fit, from headers alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dcr_mllm.errors import UserError
from dcr_mllm.fits import pairs
from dcr_mllm.headers import read_json
from dcr_mllm.inspect_command import main, render
from dcr_mllm.inspection import inspect, kind_of
from tests.fake_models import write_denoiser, write_json, write_projector, write_safetensors, write_tower


def fit(*directories: Path) -> list[dict[str, Any]]:
    return list(pairs({path: kind_of(path) for path in directories}))


def change(source: Path, out: Path, file: str, **changes: Any) -> Path:
    shutil.copytree(source, out)
    write_json(out / file, {**read_json(out / file), **changes})
    return out


def test_a_tower(tmp_path: Path):
    tower = write_tower(tmp_path / "tower")
    tokens = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "<e>", "id": 2}]}
    write_json(tower / "tokenizer.json", tokens)
    image = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    write_json(
        tower / "preprocessor_config.json", {**read_json(tower / "preprocessor_config.json"), **image, "resample": 3}
    )
    hashed = {"path": "/somewhere/base-tower", "sha256": "0123456789abcdef" * 4}
    write_json(
        tower / "provenance.json", {"base_tower": hashed, "steps": {"tower": 7}, "data": "f" * 64, "packages": {}}
    )
    facts = inspect(tower)
    assert (facts["kind"], facts["model_type"], facts["image_tokens"], facts["class_token"]) == (
        "tower",
        "clip",
        16,
        True,
    )
    assert (facts["layers"], facts["width"], facts["embedding_width"]) == (2, 8, 6)
    sizes = 8 * 3 * 8 * 8 + 17 * 8 + 10 * 8 + 2 * 5 * 64 + 6 * 8
    stored = (tower / "model.safetensors").stat().st_size
    assert facts["weights"] == {"parameters": sizes, "types": {"float16": sizes}, "files": 1, "bytes": stored}
    assert facts["processor"]["size"] == 32 and facts["processor"]["resample"] == "bicubic"
    assert facts["tokenizer"]["tokens"] == 3 and facts["text_side"]["vocabulary"] == 10
    provenance = facts["provenance"]
    assert provenance == {"base_tower": "base-tower (0123456789ab)", "data": "f" * 12, "steps": {"tower": 7}}
    assert facts["problems"] == []
    assert "image tokens          16" in render(facts)


def test_what_contradicts_itself_is_a_problem(tmp_path: Path):
    tower = write_tower(tmp_path / "tower")
    write_json(tower / "tokenizer.json", {"model": {"vocab": {"a": 0, "b": 10}}})
    assert inspect(tower)["problems"] == ["the tokenizer goes up to id 10, the embedding has 10 rows"]
    # A full tower of this kind is refused outright.
    config = read_json(tower / "config.json")
    write_json(tower / "config.json", {**config["vision_config"], "model_type": "clip_vision_model"})
    write_json(tower / "preprocessor_config.json", {**read_json(tower / "preprocessor_config.json"), "size": 64})
    assert inspect(tower)["problems"][0] == "preprocessor_config.json makes images of 64 px, the tower takes 32"
    denoiser = write_denoiser(tmp_path / "denoiser")
    write_json(denoiser / "text_encoder/config.json", {"hidden_size": 16})
    assert "width 12, the text encoder gives 16" in inspect(denoiser)["problems"][0]


def test_a_sharded_model_counts_its_files(tmp_path: Path):
    tower = write_tower(tmp_path / "tower")
    from dcr_mllm.headers import read_safetensors_header

    shapes = {name: header.shape for name, header in read_safetensors_header(tower / "model.safetensors").items()}
    (tower / "model.safetensors").unlink()
    names = sorted(shapes)
    index = {}
    for number, part in enumerate((names[:5], names[5:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        write_safetensors(tower / file, {name: shapes[name] for name in part})
        index.update(dict.fromkeys(part, file))
    write_json(tower / "model.safetensors.index.json", {"weight_map": index})
    weights = inspect(tower)["weights"]
    total = sum(file.stat().st_size for file in tower.glob("*.safetensors"))
    assert (weights["files"], weights["bytes"]) == (2, total)


def test_a_denoiser_and_a_projector(tmp_path: Path):
    facts = inspect(write_denoiser(tmp_path / "denoiser", prediction_type="v_prediction"))
    assert (facts["cross_attention_width"], facts["vae_factor"], facts["unet_factor"]) == (12, 4, 2)
    assert facts["prediction_type"] == "v_prediction" and facts["weights"]["unet"]["parameters"] == 96
    facts = inspect(write_projector(tmp_path / "projector"))
    assert (facts["kind"], facts["input_width"], facts["output_width"]) == ("projector", 6, 12)


def test_what_of_several_does_not_fit(tmp_path: Path):
    tower, denoiser = write_tower(tmp_path / "tower"), write_denoiser(tmp_path / "denoiser")
    good, narrow = write_projector(tmp_path / "good"), write_projector(tmp_path / "narrow", 5, 11)
    odd = write_tower(tmp_path / "odd", image=30, patch=6)
    verdicts = {
        tuple(Path(name).name for name in pair["directories"]): (pair["fits"], " ".join(pair["notes"]))
        for pair in fit(tower, denoiser, good, narrow, odd)
    }
    assert verdicts["tower", "denoiser"][0] and "latents 8 x 8" in verdicts["tower", "denoiser"][1]
    assert verdicts["tower", "good"][0] and verdicts["denoiser", "good"][0]
    assert not verdicts["tower", "narrow"][0] and "input_width 5" in verdicts["tower", "narrow"][1]
    assert not verdicts["denoiser", "narrow"][0] and "output_width 11" in verdicts["denoiser", "narrow"][1]
    assert not verdicts["odd", "denoiser"][0] and "multiple of 4" in verdicts["odd", "denoiser"][1]
    assert ("tower", "odd") not in verdicts and ("good", "narrow") not in verdicts


def test_llavas_towers_language_models_and_adapters(
    tiny_llava: Path, tiny_clip: Path, tiny_siglip: Path, tiny_llama: Path, tiny_qwen: Path, tmp_path: Path
):
    facts = inspect(tiny_llava)
    assert (
        facts["problems"] == []
        and facts["image_tokens"] == 16
        and facts["projector"] == {"input_width": 32, "output_width": 32}
    )
    assert facts["language_model"]["vocabulary"] == 704 and facts["language_model"]["layers"] == 2
    assert facts["tower"]["layers"] == 3 and facts["processor"]["pads"] and facts["chat_template"]
    inner = sum(facts[part]["weights"]["parameters"] for part in ("tower", "language_model"))
    assert facts["weights"]["parameters"] == inner + 2 * (32 * 32 + 32)
    assert [pair["fits"] for pair in fit(tiny_llava, tiny_clip)] == [True]
    (siglip,) = fit(tiny_llava, tiny_siglip)
    assert not siglip["fits"] and "projector needs retraining" in siglip["notes"][0]
    assert [pair["fits"] for pair in fit(tiny_llava, tiny_llama)] == [True]

    adapter = tmp_path / "adapter"
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": str(tiny_llava), "r": 4})
    stem = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_"
    shapes = {f"{stem}A.weight": (4, 32), f"{stem}B.weight": (64, 4)}
    write_safetensors(adapter / "adapter_model.safetensors", shapes)
    assert [(pair["fits"], pair["notes"]) for pair in fit(adapter, tiny_llava)] == [(True, [])]
    assert fit(adapter, tiny_clip) == []
    write_safetensors(adapter / "adapter_model.safetensors", shapes | {f"{stem}B.weight": (65, 4)})
    assert not fit(tiny_llava, adapter)[0]["fits"]


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"image_token_index": 5}, "<image> is token 699, config.json has image_token_index 5"),
        ("processor_config.json", {"patch_size": 4}, "has patch_size 4, the model 8"),
        ("processor_config.json", {"vision_feature_select_strategy": "full"}, "'full', the model 'default'"),
    ],
)
def test_a_llava_whose_image_tokens_disagree(
    tiny_llava: Path, tmp_path: Path, file: str, changes: dict[str, Any], words: str
):
    problems = inspect(change(tiny_llava, tmp_path / "llava", file, **changes))["problems"]
    assert len(problems) == 1 and words in problems[0]


def test_the_command_imports_nothing_heavy_and_speaks_json(tmp_path: Path):
    tower, denoiser = write_tower(tmp_path / "tower"), write_denoiser(tmp_path / "denoiser")
    code = (
        "import sys; from dcr_mllm.inspect_command import main; code = main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tower), str(denoiser), "--json"], capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    assert [facts["kind"] for facts in told["directories"]] == ["tower", "denoiser"] and told["pairs"][0]["fits"]


def test_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tower, projector = write_tower(tmp_path / "tower"), write_projector(tmp_path / "projector", 5)
    assert main([str(tower)]) == 0
    assert main([str(tower), str(projector)]) == 1
    assert "do not fit" in capsys.readouterr().out
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("")
    assert main([str(tmp_path / "run")]) == 2
    assert "it is a run" in capsys.readouterr().err
    with pytest.raises(UserError, match="is no directory"):
        kind_of(tmp_path / "nowhere")
