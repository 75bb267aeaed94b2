"""Swapping a tower changes the tower and nothing else; merging an adapter equals running it; both refuse misuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcr_mllm.errors import UserError
from dcr_mllm.llava import load_llava, load_processor
from stage2_llava.config import InstructConfig
from stage2_llava.export import main as merge_main
from stage2_llava.export import merge
from stage2_llava.swap import main as swap_main
from stage2_llava.swap import swap
from stage2_llava.tuning import LORA_TARGETS, add_adapter, freeze_for_alignment, parameter_groups
from tests.tiny_models import save_tiny_clip


@pytest.fixture(scope="module")
def other_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Same shape as `tiny_clip`, other weights."""
    return save_tiny_clip(tmp_path_factory.mktemp("models") / "other", seed=7)


def inputs_for(path: Path) -> Any:
    from PIL import Image

    processor = load_processor(path)
    image = Image.new("RGB", (40, 30), (200, 30, 90))
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it red?"}]}],
        add_generation_prompt=True,
    )
    return processor(images=image, text=text, return_tensors="pt")


@torch.inference_mode()
def logits(model: Any, path: Path) -> torch.Tensor:
    return model(**inputs_for(path)).logits


def test_swap_puts_the_tower_in_and_keeps_every_other_byte(tiny_llava: Path, other_clip: Path, tmp_path: Path):
    out = swap(tiny_llava, other_clip, tmp_path / "out")
    before, after = load_file(tiny_llava / "model.safetensors"), load_file(out / "model.safetensors")
    tower = load_file(other_clip / "model.safetensors")
    assert set(before) == set(after)
    for name, value in after.items():
        if name.startswith("vision_tower."):
            own = name.removeprefix("vision_tower.").removeprefix("vision_model.")
            assert torch.equal(value, tower[f"vision_model.{own}"]), name
        else:
            assert torch.equal(value, before[name]), name
    assert not torch.equal(logits(load_llava(out), out), logits(load_llava(tiny_llava), tiny_llava))
    assert json.loads((out / "provenance.json").read_text())["swapped"]["tower"]["path"] == str(other_clip)


def test_swapping_back_gives_the_same_answers(tiny_llava: Path, tiny_clip: Path, other_clip: Path, tmp_path: Path):
    back = swap(swap(tiny_llava, other_clip, tmp_path / "there"), tiny_clip, tmp_path / "back")
    assert torch.equal(logits(load_llava(back), back), logits(load_llava(tiny_llava), tiny_llava))


def test_swap_takes_over_the_new_towers_statistics(tiny_llava: Path, other_clip: Path, tmp_path: Path):
    shutil.copytree(other_clip, tmp_path / "clip")
    file = tmp_path / "clip" / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": [0.1, 0.2, 0.3]}))
    out = swap(tiny_llava, tmp_path / "clip", tmp_path / "out")
    processor = load_processor(out).image_processor
    assert list(processor.image_mean) == [0.1, 0.2, 0.3] and processor.do_pad


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 48, "num_heads": 3}, "has width 32"),
        ({"image_size": 64}, "has image size 32"),
        ({"patch_size": 16}, "has patch size 8"),
        ({"num_layers": 2}, "lacks tensor encoder.layers.2"),
    ],
)
def test_swap_of_unequal_shapes_says_which(tiny_llava: Path, tmp_path: Path, change: dict, words: str):
    tower = save_tiny_clip(tmp_path / "clip", **change)
    with pytest.raises(UserError) as error:
        swap(tiny_llava, tower, tmp_path / "out")
    assert words in str(error.value) and "projector needs retraining" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_swap_of_a_tensor_of_another_shape_names_it(tiny_llava: Path, tmp_path: Path):
    """Equal in all that the configs tell of width, image and patches, but with wider feed-forward layers."""
    tower = save_tiny_clip(tmp_path / "clip")
    weights = load_file(tower / "model.safetensors")
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    weights[name] = torch.zeros(2 * weights[name].shape[0], 32)
    save_file(weights, tower / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"tensor encoder\.layers\.1\.mlp\.fc1\.weight is \[.*; the projector needs"):
        swap(tiny_llava, tower, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_siglip_into_a_clip_llava_is_refused(tiny_llava: Path, tiny_siglip: Path, tmp_path: Path):
    with pytest.raises(UserError, match="clip_vision_model .* siglip; the projector needs retraining"):
        swap(tiny_llava, tiny_siglip, tmp_path / "out")


def test_swap_command(tiny_llava: Path, other_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert swap_main([str(tiny_llava), str(other_clip), str(tmp_path / "out"), "--legacy-keys"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert all(".vision_model." in name for name in names if name.startswith("vision_tower"))
    legacy = load_llava(tmp_path / "out")
    assert torch.equal(
        logits(legacy, tmp_path / "out"), logits(load_llava(swap(tiny_llava, other_clip, tmp_path / "new")), tiny_llava)
    )
    assert swap_main([str(tiny_llava), str(other_clip), str(tmp_path / "out")]) == 2
    assert "not overwritten" in capsys.readouterr().err


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> Path:
    """An adapter with weights that change something, and a changed projector."""
    path = tmp_path_factory.mktemp("models") / "adapter"
    model = add_adapter(load_llava(tiny_llava), InstructConfig(lora_rank=4, lora_alpha=8), str(tiny_llava))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
                assert ".lora_" in name or "multi_modal_projector" in name
    model.save_pretrained(path)
    return path


def test_merged_is_the_adapter(tiny_llava: Path, adapter: Path, tmp_path: Path):
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(load_llava(tiny_llava), adapter).eval()
    merged = merge(tiny_llava, adapter, tmp_path / "out")
    with_adapter, without = logits(loaded, tiny_llava), logits(load_llava(tiny_llava), tiny_llava)
    torch.testing.assert_close(logits(load_llava(merged), merged), with_adapter, rtol=1e-4, atol=1e-5)
    assert (with_adapter - without).abs().max() > 1e-2
    before, after = load_file(tiny_llava / "model.safetensors"), load_file(merged / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("vision_tower."))


def test_merging_twice_is_refused(tiny_llava: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    merged = tmp_path / "out"
    assert merge_main([str(tiny_llava), str(adapter), str(merged)]) == 0
    assert merge_main([str(merged), str(adapter), str(tmp_path / "twice")]) == 2
    error = capsys.readouterr().err
    assert "merged in already" in error and str(tiny_llava) in error and not (tmp_path / "twice").exists()
    assert merge_main([str(tiny_llava), str(tiny_llava), str(tmp_path / "no")]) == 2
    assert "no PEFT adapter" in capsys.readouterr().err


def test_adapter_of_another_model_is_refused(tiny_clip: Path, tiny_qwen: Path, adapter: Path, tmp_path: Path):
    from stage2_llava.assemble import assemble
    from stage2_llava.export import save_llava

    model, processor, _ = assemble(tiny_clip, tiny_qwen)
    (tmp_path / "qwen").mkdir()
    save_llava(model, processor, tmp_path / "qwen", {})
    with pytest.raises(UserError, match="does not fit"):
        merge(tmp_path / "qwen", adapter, tmp_path / "out")


def test_lora_matches_the_language_models_linears_and_nothing_else(tiny_llava: Path):
    model = add_adapter(load_llava(tiny_llava), InstructConfig(lora_rank=4), str(tiny_llava))
    touched = {
        name.split(".lora_")[0].removeprefix("base_model.model.")
        for name, _ in model.named_parameters()
        if ".lora_" in name
    }
    expected = {
        f"model.language_model.layers.{layer}.{part}"
        for layer in range(2)
        for part in [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    }
    assert touched == expected
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("vision_tower" in name for name in trained)
    assert sum("multi_modal_projector" in name for name in trained) == 4
    assert "vision" not in LORA_TARGETS


def test_projector_has_its_own_learning_rate(tiny_llava: Path):
    model = add_adapter(load_llava(tiny_llava), InstructConfig(lora_rank=4), str(tiny_llava))
    groups = parameter_groups(model, learning_rate=2e-4, projector_learning_rate=2e-5, weight_decay=0.1)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(rates) == len(trained)
    for name, parameter in trained:
        rate, decay = rates[id(parameter)]
        assert rate == (2e-5 if "multi_modal_projector" in name else 2e-4)
        assert decay == (0.1 if parameter.ndim > 1 else 0.0)


def test_alignment_trains_the_projector_alone(tiny_llava: Path):
    model = freeze_for_alignment(load_llava(tiny_llava))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"model.multi_modal_projector.linear_{k}.{part}" for k in (1, 2) for part in ("weight", "bias")
    }
