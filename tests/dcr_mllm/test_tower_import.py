"""Released weights become towers: same outputs as the model that they were saved from, and nothing runs on loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcr_mllm.errors import UserError
from dcr_mllm.headers import tower_summary
from dcr_mllm.tower_import import import_tower, main
from dcr_mllm.towers import load_full_model
from tests.standins import clip_state, save_sharded, save_tower, write_json

OPENAI = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 56, "layers": 2, "width": 32, "patch_size": 14, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 514, "width": 24, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tower("openai/clip-vit-large-patch14", tmp_path_factory.mktemp("base") / "clip")


@pytest.fixture(scope="module")
def openai(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The base's shape as open_clip builds it, with its own code for OpenAI's layout."""
    import open_clip

    path = tmp_path_factory.mktemp("config") / "standin-openai.json"
    write_json(path, OPENAI)
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    model = open_clip.create_model("standin-openai", pretrained=None).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter)).copy_(parameter.half())  # as half precision keeps it
    return model


def assert_same_outputs(tower: Path, source: Any, highest: int) -> None:
    model, generator = load_full_model(tower).eval(), torch.Generator().manual_seed(1)
    size = model.config.vision_config.image_size
    length = model.config.text_config.max_position_embeddings
    pixels = torch.randn(3, 3, size, size, generator=generator)
    ids = torch.randint(1, highest - 1, (3, length), generator=generator)
    ids[:, length // 2 :] = highest  # CLIP reads the first of its end tokens, which has the highest number
    with torch.no_grad():
        image, text = model.get_image_features(pixels).pooler_output, model.get_text_features(ids).pooler_output
        torch.testing.assert_close(image, source.encode_image(pixels), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(text, source.encode_text(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrapping", ["plain", "state_dict", "whole model"])
def test_openai_layout_gives_the_models_outputs(base: Path, openai: Any, wrapping: str, tmp_path: Path):
    state = {name: value.half() for name, value in openai.state_dict().items()}
    weights: dict[str, Any] = {**state, "input_resolution": torch.tensor(56), "vocab_size": torch.tensor(514)}
    prefix = ""
    if wrapping == "state_dict":
        weights, prefix = {"epoch": 3, "state_dict": {f"module.{name}": v for name, v in weights.items()}}, "module."
    elif wrapping == "whole model":
        prefix = "class_model.model."
        weights = {f"{prefix}{name}": value for name, value in state.items()}
        weights |= {"unet.conv_in.weight": torch.zeros(2), "class_model.final_fc.weight": torch.zeros(2)}
    torch.save(weights, tmp_path / "weights.pth")
    found = import_tower(tmp_path / "weights.pth", tmp_path / "out", base)
    assert (found.layout, found.prefix) == ("OpenAI", prefix)
    assert found.num_left_out == (2 if wrapping == "whole model" else 0)
    assert found.num_different == found.num_tensors and found.from_base == []
    assert_same_outputs(tmp_path / "out", openai, 513)


def test_the_result_is_a_whole_tower(base: Path, openai: Any, tmp_path: Path):
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    torch.save(openai.state_dict(), tmp_path / "weights.pt")
    assert main([str(tmp_path / "weights.pt"), str(tmp_path / "out"), "--base", str(base)]) == 0
    summary = tower_summary(tmp_path / "out")
    assert summary.has_text_side and summary.image_mean == tower_summary(base).image_mean
    _, info = CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    old, new = (AutoTokenizer.from_pretrained(path) for path in (base, tmp_path / "out"))
    assert old("it's a Red dog")["input_ids"] == new("it's a Red dog")["input_ids"]
    AutoImageProcessor.from_pretrained(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert record["imported"]["layout"] == "OpenAI" and list(record["imported"]["sha256"]) == ["weights.pt"]
    assert record["base_tower"]["path"] == str(base)


def test_directory_with_weights_alone(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What `save_pretrained(safe_serialization=False)` of an older transformers leaves: a config and a pickle."""
    release = tmp_path / "release"
    release.mkdir()
    shutil.copyfile(base / "config.json", release / "config.json")
    state = load_file(base / "model.safetensors")
    name = "vision_model.encoder.layers.1.mlp.fc2.weight"
    state[name] = state[name] + 1
    torch.save(state, release / "pytorch_model.bin")
    with pytest.raises(UserError, match="no image processor.*--base"):
        import_tower(release, tmp_path / "out", release)
    assert import_tower(release, tmp_path / "out", base).num_different == 1
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(new[key], state[key]) for key in new)
    assert main([str(release), str(tmp_path / "out"), "--base", str(base)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_release_in_shards_and_one_whose_config_says_otherwise(base: Path, tmp_path: Path):
    release = tmp_path / "release"
    release.mkdir()
    config = json.loads((base / "config.json").read_text())
    save_sharded(release, load_file(base / "model.safetensors"))
    config["vision_config_dict"]["num_attention_heads"] = 4
    write_json(release / "config.json", config)
    with pytest.raises(UserError, match="vision_config.num_attention_heads 4, .* 2: name another --base"):
        import_tower(release, tmp_path / "out", base)
    (release / "config.json").unlink()
    assert import_tower(release, tmp_path / "out", base).num_different == 0
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert len(record["imported"]["sha256"]) == 2


def test_the_base_may_be_a_pickled_hub_repository(tmp_path: Path):
    """OpenAI's 336 px repository: a pickle whose projections are transposed views, which safetensors refuses."""
    source = save_tower("openai/clip-vit-large-patch14-336", tmp_path / "hub")
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    assert not state["visual_projection.weight"].is_contiguous()
    found = import_tower(source, tmp_path / "out", source)
    assert found.num_different == 0 and tower_summary(tmp_path / "out").image_size == 112
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(new[name], state[name]) for name in new)
    assert {name for name in state if "position_ids" not in name} == set(new)


def test_vision_only_weights_take_the_text_side_of_the_base(base: Path, tmp_path: Path):
    other = clip_state(32, 2, 56, 14, 24, 24, 514, seed=7)
    vision = {name: value for name, value in other.items() if name.startswith("vision_model.")}
    save_file(vision, tmp_path / "vision.safetensors")
    found = import_tower(tmp_path / "vision.safetensors", tmp_path / "out", base)
    assert "visual_projection.weight" in found.from_base and "text_model.final_layer_norm.bias" in found.from_base
    assert found.num_different == len(vision)
    new, old = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    assert all(torch.equal(new[name], (vision if name in vision else old)[name]) for name in new)
    del other["text_model.final_layer_norm.bias"]
    save_file(other, tmp_path / "torn.safetensors")
    with pytest.raises(UserError, match=r"lacks text_model.final_layer_norm.bias"):
        import_tower(tmp_path / "torn.safetensors", tmp_path / "out-2", base)


class Harmful:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_nothing_but_tensors_is_loaded(base: Path, tmp_path: Path):
    marker = tmp_path / "ran"
    torch.save({"state_dict": Harmful(marker)}, tmp_path / "harmful.pt")
    with pytest.raises(UserError, match="cannot be read as plain tensors"):
        import_tower(tmp_path / "harmful.pt", tmp_path / "out", base)
    assert not marker.exists()
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "program.pt")
    with pytest.raises(UserError, match="cannot be read as plain tensors"):
        import_tower(tmp_path / "program.pt", tmp_path / "out", base)
    (tmp_path / "broken.bin").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as plain tensors"):
        import_tower(tmp_path / "broken.bin", tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {**s, "text_model.embeddings.token_embedding.weight": torch.zeros(515, 24)},
            "vocabulary of 515.*514",
        ),
        (
            lambda s: {**s, "visual_projection.weight": torch.zeros(24, 33)},
            r"visual_projection.weight of shape \[24, 33\]",
        ),
        (lambda s: {**s, "vision_model.extra.weight": torch.zeros(1)}, "has vision_model.extra.weight"),
        (lambda s: {f"a.{k}": v for k, v in s.items()} | {f"b.{k}": v for k, v in s.items()}, "2 towers"),
        (lambda s: {"unet.conv.weight": torch.zeros(1)}, "holds no tower"),
        (lambda s: {**s, "vision_model.x.lora_A.default.weight": torch.zeros(1)}, "LoRA that is not merged"),
        (lambda s: {k: v for k, v in s.items() if "vision_model.encoder.layers.1" not in k}, "lacks vision_model.enc"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(base: Path, change: Any, message: str, tmp_path: Path):
    torch.save(change(load_file(base / "model.safetensors")), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=message):
        import_tower(tmp_path / "weights.pt", tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


def test_several_weight_files_have_to_be_told_apart(base: Path, tmp_path: Path):
    for name in ("a.pt", "b.pt"):
        torch.save({}, tmp_path / name)
    with pytest.raises(UserError, match="found a.pt, b.pt; name the file itself"):
        import_tower(tmp_path, tmp_path / "out", base)
