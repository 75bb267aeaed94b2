"""One training step: pixels as the tower's own processor makes them, what trains in which phase, the loss."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcr_mllm.towers import add_lora, image_statistics, load_full_model, lora_config, vision_tower
from stage1_dcr.config import Stage1Config
from stage1_dcr.denoiser import Denoiser
from stage1_dcr.projector import Projector
from stage1_dcr.step import TrainingStep
from stage1_dcr.view_config import ViewConfig
from stage1_dcr.views import draw_view_params

BATCH = 4


def build(tower_dir: Path, denoiser_dir: Path, phase: str = "tower", **settings: object) -> TrainingStep:
    config = Stage1Config(tower=str(tower_dir), denoiser=str(denoiser_dir), data="x", **settings)
    base = vision_tower(load_full_model(tower_dir))
    torch.manual_seed(0)
    tower = copy.deepcopy(base)
    if phase == "tower":
        add_lora(tower, lora_config(2, 2, 0.0, except_block=config.untouched_block(tower.num_layers)))
    denoiser = Denoiser.load(denoiser_dir)
    width = config.condition_width(embedding_width=base.width, hidden_size=base.hidden_size)
    return TrainingStep(
        phase=phase,
        tower=tower,
        projector=Projector(width, denoiser.cross_attention_dim, hidden_width=8),
        denoiser=denoiser,
        statistics=image_statistics(tower_dir),
        config=config,
        reference=base,
    )


def batch(size: int = 32, num: int = BATCH, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": torch.randint(256, (num, 3, size, size), generator=generator, dtype=torch.uint8),
        "view_params": draw_view_params(ViewConfig(), generator, num),
        "timestep_uniform": torch.rand(num, generator=generator),
        "noise": torch.randn(num, 4, size // 4, size // 4, generator=generator),
    }


@pytest.fixture(params=["tiny_clip", "tiny_siglip"])
def directory(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_tower_sees_the_pixels_that_its_processor_makes(directory: Path, tiny_denoiser: Path):
    from transformers import AutoImageProcessor

    step = build(directory, tiny_denoiser)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    expected = AutoImageProcessor.from_pretrained(directory)(image, return_tensors="pt")["pixel_values"]
    seen = []
    step._tower().vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    step._read(step._tower(), step._normalise(pixels), trains=True)
    assert (seen[0] - expected).abs().max() < 1e-2


@pytest.mark.parametrize("phase", ["projector", "tower"])
def test_only_the_phase_trains_and_everything_of_it_does(directory: Path, tiny_denoiser: Path, phase: str):
    step = build(directory, tiny_denoiser, phase)
    trainable = {name for name, parameter in step.named_parameters() if parameter.requires_grad}
    assert trainable and all(name.startswith(f"{phase}.") for name in trainable)
    assert phase == "projector" or all(".lora_" in name for name in trainable)
    step(**batch())["loss"].backward()
    for name, parameter in step.named_parameters():
        assert (parameter.grad is not None) == (name in trainable), name
    outside = [step._projector(), step._tower(), *step._denoiser().modules().values()]
    frozen = [p for module in outside for p in module.parameters() if not p.requires_grad]
    assert frozen and all(parameter.grad is None for parameter in frozen)
    assert not any("unet" in name or "vae" in name for name in step.state_dict())


def test_loss_is_the_objective_on_hand_made_conditions(tiny_clip: Path, tiny_denoiser: Path):
    """Against plain code and the dense judge, from pixels to loss."""
    from tests.stage1_dcr.dense import dense_dcr_loss

    step = build(tiny_clip, tiny_denoiser, timestep_range=(200, 600))
    step.eval()
    inputs = batch()
    # A view that changes nothing, so that both positives of an image have its own condition.
    neutral = ViewConfig(brightness=0, contrast=0, saturation=0, hue=0, crop_scale=(1, 1), crop_ratio=(1, 1))
    inputs["view_params"] = draw_view_params(neutral, torch.Generator().manual_seed(0), BATCH)
    loss = step(**inputs)["loss"]

    statistics, denoiser = image_statistics(tiny_clip), step._denoiser()
    pixels = inputs["images"].float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (statistics.mean, statistics.std))
    with torch.no_grad():
        conditions = step._projector()(
            load_full_model(tiny_clip).get_image_features((pixels - mean) / std).pooler_output
        )
        timesteps = (200 + inputs["timestep_uniform"] * 400).long()
        assert timesteps.min() >= 200 and timesteps.max() < 600
        noisy = denoiser.add_noise(denoiser.encode(pixels), inputs["noise"], timesteps)

        def unet(latents, times, vectors):
            return denoiser.predict(latents, times, vectors[:, None], shared_prompt=False)[:, 0]

        expected = dense_dcr_loss(conditions, conditions, noisy, timesteps, inputs["noise"], unet, tau=0.1)
    assert torch.allclose(loss, expected, atol=1e-4)


def test_keep_close_is_zero_at_the_base_and_pulls_back(tiny_clip: Path, tiny_denoiser: Path):
    inputs = batch()
    free, close = (build(tiny_clip, tiny_denoiser, keep_close=weight) for weight in (0.0, 3.0))
    assert torch.allclose(free(**inputs)["loss"], close(**inputs)["loss"], atol=1e-5)
    for step in (free, close):
        torch.manual_seed(3)
        for name, parameter in step.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.3)
    difference = close(**inputs)["loss"] - free(**inputs)["loss"]
    names, sums = close.metrics.take()
    assert "distance_to_base" in names and sums is not None
    assert difference > 1e-3


def test_reconstruction_objective(tiny_clip: Path, tiny_denoiser: Path):
    step = build(tiny_clip, tiny_denoiser, objective="reconstruction")
    loss = step(**batch())["loss"]
    assert 0.1 < loss.item() < 10
    assert step.metrics.take()[0] == ["reconstruction"]


def test_diffusion_size_of_its_own(tiny_clip: Path, tiny_denoiser: Path):
    step = build(tiny_clip, tiny_denoiser, diffusion_size=64)
    inputs = batch(size=64)
    assert torch.isfinite(step(**inputs)["loss"])
