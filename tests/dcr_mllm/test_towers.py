"""Towers: what trains, what is exported, and that nothing else moves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcr_mllm.errors import UserError
from dcr_mllm.headers import tower_summary
from dcr_mllm.towers import (
    add_lora,
    export_tower,
    image_statistics,
    load_full_model,
    lora_config,
    merged_tensors,
    vision_tower,
)


@pytest.fixture(params=["tiny_clip", "tiny_siglip"])
def directory(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_class_embedding_is_what_the_contrastive_logits_use(directory: Path):
    model = load_full_model(directory)
    tower = vision_tower(model)
    size = image_statistics(directory).size
    pixels = torch.randn(2, 3, size, size)
    expected = model.get_image_features(pixel_values=pixels).pooler_output
    assert torch.equal(tower(pixels), expected)
    assert tower(pixels).shape == (2, tower.width) and tower.width == tower_summary(directory).width


def test_lora_trains_exactly_the_vision_blocks(directory: Path):
    tower = add_lora(vision_tower(load_full_model(directory)), lora_config(2, 2, 0.0))
    trained = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    linears = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    layers = tower_summary(directory).num_layers
    assert trained == {
        f"vision_model.encoder.layers.{layer}.{linear}.lora_{side}.default.weight"
        for layer in range(layers)
        for linear in linears
        for side in "AB"
    }


def test_every_trainable_parameter_gets_a_gradient(directory: Path):
    tower = add_lora(vision_tower(load_full_model(directory)), lora_config(2, 2, 0.0))
    for name, parameter in tower.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)  # at zero, lora_A would have a zero gradient
    size = image_statistics(directory).size
    tower(torch.randn(3, 3, size, size)).square().sum().backward()
    for name, parameter in tower.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def trained_weights(directory: Path) -> dict[str, torch.Tensor]:
    tower = add_lora(vision_tower(load_full_model(directory)), lora_config(2, 4, 0.0))
    torch.manual_seed(0)
    return {name: torch.randn_like(p) * 0.1 for name, p in tower.named_parameters() if p.requires_grad}


def test_export_equals_the_adapted_tower_and_keeps_every_other_byte(directory: Path, tmp_path: Path):
    weights = trained_weights(directory)
    tower = add_lora(vision_tower(load_full_model(directory)), lora_config(2, 4, 0.0))
    tower.load_state_dict(weights, strict=False)

    # As many released towers: fp16 on disk, where a small update would be lost.
    base = tmp_path / "base"
    shutil.copytree(directory, base)
    half = {
        name: value.half() for name, value in load_file(base / "model.safetensors").items() if value.is_floating_point()
    }
    save_file(half, base / "model.safetensors", metadata={"format": "pt"})

    out = tmp_path / "tower"
    out.mkdir()
    export_tower(base, merged_tensors(base, lora_config(2, 4, 0.0), weights, tmp_path / "adapter"), out)
    size = image_statistics(directory).size
    pixels = torch.randn(2, 3, size, size)
    reference = add_lora(vision_tower(load_full_model(base)), lora_config(2, 4, 0.0))
    reference.load_state_dict(weights, strict=False)
    reference.eval()
    exported = vision_tower(load_full_model(out))
    assert torch.allclose(exported(pixels), reference(pixels), atol=1e-5)

    old, new = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    linears = ("proj.weight", "fc1.weight", "fc2.weight")
    for name in old:
        if name.startswith("vision_model.encoder.layers.") and name.endswith(linears):
            assert new[name].dtype == torch.float32 and not torch.equal(new[name], old[name].float())
        else:
            assert new[name].dtype == torch.float16 and torch.equal(new[name], old[name])
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    for file in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        assert (out / file).is_file() == (base / file).is_file()


def test_adapter_loads_with_peft(tiny_clip: Path, tmp_path: Path):
    from peft import PeftModel

    weights = trained_weights(tiny_clip)
    changed = merged_tensors(tiny_clip, lora_config(2, 4, 0.0), weights, tmp_path / "adapter")
    merged = PeftModel.from_pretrained(load_full_model(tiny_clip), tmp_path / "adapter").merge_and_unload()
    state = merged.state_dict()
    assert changed and all(torch.allclose(state[name], value, atol=1e-6) for name, value in changed.items())


def test_adapter_of_another_rank_or_tower_is_refused(tiny_clip: Path, tmp_path: Path):
    weights = trained_weights(tiny_clip)
    weights.pop(next(iter(weights)))
    with pytest.raises(UserError, match="does not fit the base tower"):
        merged_tensors(tiny_clip, lora_config(2, 4, 0.0), weights, tmp_path / "adapter")
