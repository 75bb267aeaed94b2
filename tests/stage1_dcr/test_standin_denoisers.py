"""Stable Diffusion 1.4 to 2.1 in the layouts of their repositories: loaded as the pipeline loads them, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dcr_mllm.denoiser_headers import denoiser_summary
from stage1_dcr.checks import check_denoiser
from stage1_dcr.denoiser import Denoiser
from tests.standin_denoisers import MODELS, save_denoiser

WIDTHS = {hub_id: model["cross"] for hub_id, model in MODELS.items()}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("denoisers")
    return {hub_id: save_denoiser(hub_id, root / hub_id) for hub_id in MODELS}


def outputs(denoiser: Denoiser) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of a picture, and predictions for them."""
    generator = torch.Generator().manual_seed(0)
    latents = denoiser.encode(torch.rand(2, 3, 56, 56, generator=generator))
    vectors = torch.randn(2, 3, denoiser.cross_attention_dim, generator=generator)
    return latents, denoiser.predict(latents, torch.tensor([10, 700]), vectors)


@pytest.mark.parametrize("hub_id", list(MODELS))
def test_headers_and_loader_agree(directories: dict[str, Path], hub_id: str):
    summary = denoiser_summary(directories[hub_id])
    denoiser = Denoiser.load(directories[hub_id])
    assert summary.cross_attention_dim == denoiser.cross_attention_dim == WIDTHS[hub_id]
    expected = ("v_prediction", "velocity") if hub_id.endswith("2-1") else ("epsilon", "epsilon")
    assert (summary.prediction_type, denoiser.prediction_type) == expected
    assert denoiser.latent_shape(56)[1:] == (56 // summary.vae_scale,) * 2
    assert check_denoiser(summary) == []


@pytest.mark.parametrize("hub_id", list(MODELS))
def test_it_is_the_model_that_the_pipeline_runs(directories: dict[str, Path], hub_id: str):
    """Prompt, latents and predictions of diffusers' own pipeline on the same directory."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        directories[hub_id], safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    denoiser = Denoiser.load(directories[hub_id])
    prompt = pipeline.encode_prompt("", "cpu", 1, False)[0]
    torch.testing.assert_close(denoiser.prompt[None], prompt)
    latents, predictions = outputs(denoiser)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 56, 56, generator=generator)
    vectors = torch.randn(2, 3, denoiser.cross_attention_dim, generator=generator)
    with torch.no_grad():
        expected_latents = pipeline.vae.encode(pixels * 2 - 1).latent_dist.mean * 0.18215
        torch.testing.assert_close(latents, expected_latents)
        for row, time in enumerate((10, 700)):
            for column in range(3):
                states = prompt + vectors[row, column]
                expected = pipeline.unet(latents[row : row + 1], time, encoder_hidden_states=states).sample[0]
                torch.testing.assert_close(predictions[row, column], expected, atol=2e-5, rtol=1e-4)
    abar = pipeline.scheduler.alphas_cumprod
    noisy = denoiser.add_noise(latents, torch.zeros_like(latents), torch.tensor([10, 700]))
    torch.testing.assert_close(noisy, abar[[10, 700]].sqrt()[:, None, None, None] * latents)


@pytest.mark.parametrize("layout", ["sharded", "fp16", "fp16-sharded"])
@pytest.mark.parametrize("hub_id", ["CompVis/stable-diffusion-v1-4", "Manojb/stable-diffusion-2-1"])
def test_other_layouts_are_the_same_model(
    directories: dict[str, Path], hub_id: str, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = save_denoiser(hub_id, tmp_path / "sd", layout)
    assert len(list((path / "unet").glob("*.safetensors"))) == (2 if layout.endswith("sharded") else 1)
    expected = outputs(Denoiser.load(directories[hub_id]))
    capsys.readouterr()
    for ours, theirs in zip(outputs(Denoiser.load(path)), expected, strict=True):
        # Half precision moves a weight by up to 2^-11 of itself.
        tolerance = 1e-6 if layout == "sharded" else 2e-2
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    said = capsys.readouterr().err.count("fp16 weights only")
    notes = check_denoiser(denoiser_summary(path))
    assert (said, len(notes)) == ((3, 1) if layout.startswith("fp16") else (0, 0))


def test_variant_beside_the_plain_files_is_not_taken(tmp_path: Path):
    path = save_denoiser("CompVis/stable-diffusion-v1-4", tmp_path / "sd")
    half = save_denoiser("CompVis/stable-diffusion-v1-4", tmp_path / "half", "fp16")
    file = half / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    (path / "unet" / file.name).write_bytes(file.read_bytes())
    assert denoiser_summary(path).variant is None
    weight = load_file(path / "unet" / "diffusion_pytorch_model.safetensors")["conv_out.weight"]
    assert torch.equal(Denoiser.load(path).modules()["unet"].conv_out.weight, weight)
