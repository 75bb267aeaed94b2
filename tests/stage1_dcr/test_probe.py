"""Collapse and drift against NumPy, known cases and the evaluation's own definition."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dcr_mllm.evaluation.measures import token_drift
from dcr_mllm.towers import (
    ImageStatistics,
    VisionTower,
    add_lora,
    image_statistics,
    load_full_model,
    lora_config,
    vision_tower,
)
from stage1_dcr.images import make_loader
from stage1_dcr.probe import Probe, ProbeImages, alignment, drift, effective_rank, read_images, uniformity
from stage1_dcr.view_config import ViewConfig
from stage1_dcr.views import draw_view_params

WIDTH = 6


@pytest.fixture
def embeddings() -> torch.Tensor:
    return torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.arange(1, WIDTH + 1) + 2


def test_effective_rank_of_known_cases(embeddings: torch.Tensor):
    isotropic = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    assert effective_rank(isotropic) == pytest.approx(WIDTH)
    assert effective_rank(isotropic + 100) == pytest.approx(WIDTH), "a common offset is no direction"
    assert effective_rank(torch.arange(9.0)[:, None] * torch.ones(WIDTH) + 5) == pytest.approx(1)
    assert effective_rank(torch.ones(9, WIDTH)) == 0
    x = embeddings.double().numpy()
    p = np.sqrt(np.linalg.eigvalsh(np.cov(x.T)))  # the same singular values up to a factor
    p /= p.sum()
    assert effective_rank(embeddings) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_uniformity_and_alignment_by_loops(embeddings: torch.Tensor):
    z = embeddings.double().numpy() / np.linalg.norm(embeddings.double().numpy(), axis=1, keepdims=True)
    pairs = [math.exp(-2 * ((z[i] - z[j]) ** 2).sum()) for i in range(len(z)) for j in range(i)]
    assert uniformity(embeddings) == pytest.approx(math.log(sum(pairs) / len(pairs)))
    assert uniformity(torch.ones(5, WIDTH)) == pytest.approx(0)
    assert uniformity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])) == pytest.approx(-8)

    shifted = embeddings.roll(1, dims=0)
    cosines = [float(z[i] @ z[i - 1]) for i in range(len(z))]
    assert alignment(embeddings, shifted) == pytest.approx(2 - 2 * sum(cosines) / len(cosines))
    assert alignment(embeddings, 7 * embeddings) == pytest.approx(0)
    assert alignment(embeddings, -embeddings) == pytest.approx(4)


def test_drift_is_that_of_the_evaluation(embeddings: torch.Tensor):
    moved = embeddings + 0.3 * embeddings.roll(1, dims=0)
    expected = token_drift(embeddings.numpy(), moved.numpy())["cosine"]
    assert expected is not None and drift(embeddings, moved) == pytest.approx(1 - expected, rel=1e-4)
    assert drift(embeddings, embeddings.clone()) == 0
    tiny = embeddings + 1e-5 * embeddings.roll(1, dims=0)  # 1 - cosine in fp32 would be zero or negative
    assert 0 < drift(embeddings, tiny) < 1e-8


def images(num: int = 37) -> ProbeImages:
    """More than one batch, of no even size."""
    generator = torch.Generator().manual_seed(1)
    return ProbeImages(
        images=torch.randint(256, (num, 3, 32, 32), generator=generator, dtype=torch.uint8),
        view_params=draw_view_params(ViewConfig(), generator, num),
    )


def towers(directory: Path) -> tuple[VisionTower, VisionTower, ImageStatistics]:
    base = vision_tower(load_full_model(directory))
    tower = copy.deepcopy(base)
    torch.manual_seed(0)
    return base, add_lora(tower, lora_config(2, 2, 0.5)), image_statistics(directory)


def move(tower: VisionTower) -> None:
    torch.manual_seed(2)
    for name, parameter in tower.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("kind", ["tiny_clip", "tiny_siglip"])
def test_probe_against_the_full_model(kind: str, request: pytest.FixtureRequest):
    """Every number from hidden states and pooled outputs that the library itself gives."""
    base, tower, statistics = towers(request.getfixturevalue(kind))
    probe = Probe(images(), base, tower, statistics, ViewConfig())
    start = probe.measure(tower)
    for name in ("effective_rank", "uniformity", "alignment"):
        assert start[name]["base"] == start[name]["tower"]
    layers = len(base.vision_model.encoder.layers) + 1
    assert start["drift"]["patches"] == [0.0] * layers
    assert start["drift"]["class"] == (None if kind == "tiny_siglip" else [0.0] * layers)

    move(tower)
    tower.train()
    tower.vision_model.encoder.layers[1].eval()
    modes = {name: part.training for name, part in tower.named_modules()}
    before = torch.get_rng_state()
    found = probe.measure(tower)
    assert torch.equal(before, torch.get_rng_state())
    assert modes == {name: part.training for name, part in tower.named_modules()}
    assert all(parameter.grad is None for parameter in tower.parameters())
    assert probe.measure(tower) == found, "neither dropout nor chance"

    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (statistics.mean, statistics.std))
    pixels = (images().images.float() / 255 - mean) / std
    states, embedded = [], []
    for model in (base, tower.eval()):
        with torch.no_grad():
            output = model.vision_model(pixel_values=pixels, output_hidden_states=True)
            states.append([state.numpy() for state in output.hidden_states])
            embedded.append(model(pixels))
    assert found["effective_rank"]["base"] == pytest.approx(effective_rank(embedded[0]), rel=1e-4)
    assert found["effective_rank"]["tower"] == pytest.approx(effective_rank(embedded[1]), rel=1e-4)
    assert found["uniformity"]["tower"] == pytest.approx(uniformity(embedded[1]), rel=1e-4)
    assert found["alignment"]["base"] == start["alignment"]["base"] != found["alignment"]["tower"] > 0
    first = int(kind == "tiny_clip")
    for layer, (old, new) in enumerate(zip(*states, strict=True)):
        if first:
            expected = token_drift(old[:, 0], new[:, 0])["cosine"]
            assert found["drift"]["class"][layer] == pytest.approx(1 - (expected or 0), rel=1e-2, abs=1e-6)
        # Of a sample of the patches: within the spread over images and patches of the mean of all.
        unit = [x[:, first:] / np.linalg.norm(x[:, first:], axis=-1, keepdims=True) for x in (old, new)]
        distances = 1 - (unit[0] * unit[1]).sum(axis=-1)
        assert abs(found["drift"]["patches"][layer] - distances.mean()) <= 0.2 * distances.std() + 1e-6
    assert found["drift"]["patches"][0] == 0 and found["drift"]["patches"][-1] > 1e-4


def test_patches_are_no_class_token_and_the_same_at_every_look(tiny_clip: Path):
    base, tower, statistics = towers(tiny_clip)
    probe = Probe(images(), base, tower, statistics, ViewConfig())
    look = probe.look(base)
    assert look.class_tokens is not None and look.class_tokens.shape[1:] == (37, 32)
    assert look.patch_tokens.shape == (4, 37, 8, 32)
    states = base.vision_model(
        pixel_values=probe._inputs(slice(0, 37), look.embeddings)[0], output_hidden_states=True
    ).hidden_states
    for image in range(37):
        distances = torch.cdist(look.patch_tokens[0, image], states[0][image, 1:])
        nearest = distances.argmin(dim=1)
        assert distances.min(dim=1).values.max() < 1e-4 and len(set(nearest.tolist())) == 8
    assert torch.equal(probe.look(base).patch_tokens, look.patch_tokens)


@pytest.mark.parametrize("space", ["pixels", "normalised"])
def test_views_are_those_of_training(tiny_clip: Path, tiny_denoiser: Path, space: str):
    from tests.stage1_dcr.test_step import build

    base, tower, statistics = towers(tiny_clip)
    views = ViewConfig(brightness=0.4, space=space)  # type: ignore[arg-type]
    step = build(tiny_clip, tiny_denoiser, views=views)
    chosen = images(5)
    probe = Probe(chosen, base, tower, statistics, views)
    inputs, view = probe._inputs(slice(0, 5), torch.zeros(1))
    pixels = chosen.images.float() / 255
    assert torch.equal(inputs, step._normalise(pixels))
    assert torch.equal(view, step._view(pixels, inputs, chosen.view_params))


def test_each_image_once_and_the_same_ones_again(tiny_shards: str):
    def read(num: int) -> ProbeImages:
        loader = make_loader(tiny_shards, batch_size=2, size=16, latent_shape=(4, 2, 2), seed=5, shuffle_buffer=7)
        return read_images(loader, num)

    state = torch.get_rng_state()
    everything, some = read(1000), read(9)
    assert torch.equal(state, torch.get_rng_state())
    assert len(everything.images) == 64 == len(torch.unique(everything.images.flatten(1), dim=0))
    assert everything.view_params.shape[0] == 64
    assert torch.equal(some.images, everything.images[:9]) and torch.equal(some.view_params, everything.view_params[:9])
