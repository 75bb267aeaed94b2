"""The image side of every stand-in tower in a LLaVA: the same hidden states as inside its own full model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcr_mllm.llava_headers import llava_summary, vision_summary
from dcr_mllm.towers import load_full_model, vision_tensors
from stage2_llava.assemble import _load_vision
from tests.standins import save_tower

HUB_IDS = [
    "openai/clip-vit-large-patch14",
    "apple/DFN5B-CLIP-ViT-H-14-378",
    "facebook/metaclip-2-worldwide-huge-quickgelu",
    "google/siglip-so400m-patch14-384",
    "google/siglip2-base-patch16-224",
]


@pytest.mark.parametrize("hub_id", HUB_IDS)
def test_hidden_states_are_the_full_models(hub_id: str, tmp_path: Path):
    tower = save_tower(hub_id, tmp_path / "tower")
    summary, full = vision_summary(tower), load_full_model(tower).eval()
    vision = _load_vision(tower, summary.model_type, torch.float32).eval()
    pixels = torch.randn(2, 3, summary.image_size, summary.image_size)
    with torch.no_grad():
        ours = vision(pixels, output_hidden_states=True).hidden_states
        theirs = full.vision_model(pixels, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == summary.num_layers + 1
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert ours[0].shape[1] == summary.image_tokens + summary.num_additional_image_tokens
    assert vision.config.model_type in ("clip_vision_model", "siglip_vision_model")
    assert vision.config.to_dict()["model_type"] == vision.config.model_type
    # What a swap would copy is what the full model holds.
    state = full.vision_model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in vision_tensors(tower).items() if name in state)


def test_metaclip_2_is_saved_as_the_clip_that_its_image_side_is(tiny_llama: Path, tmp_path: Path):
    from transformers import LlavaForConditionalGeneration

    from stage2_llava.assemble import assemble
    from stage2_llava.export import save_llava

    tower = save_tower("facebook/metaclip-2-worldwide-huge-quickgelu", tmp_path / "tower")
    model, processor, _ = assemble(tower, tiny_llama, template="vicuna_v1")
    (tmp_path / "llava").mkdir()
    save_llava(model, processor, tmp_path / "llava", {"phase": "test"})
    summary = llava_summary(tmp_path / "llava")
    assert (summary.vision_type, summary.select_strategy) == ("clip_vision_model", "default")
    reloaded, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    own, saved = model.model.vision_tower.state_dict(), reloaded.model.vision_tower.state_dict()
    assert all(torch.equal(own[name], saved[name]) for name in own)
