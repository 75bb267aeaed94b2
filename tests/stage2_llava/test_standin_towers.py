"""The image side of every stand-in tower in a LLaVA: the same hidden states as inside its own full model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcr_mllm.llava_headers import vision_summary
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
