"""`dcr-mllm reconstruct` against pipelines of diffusers, and what it refuses; on tiny random models."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dcr_mllm.errors import UserError
from dcr_mllm.runs import hash_directory
from stage1_dcr import reconstruct as module
from stage1_dcr.denoiser import Denoiser
from stage1_dcr.projector import Projector
from stage1_dcr.reconstruct import Parts, conditions_of, find_parts, main, read_images, reconstruct
from stage1_dcr.sampling import decode, denoising_losses, generate, load_decoder, load_sampler
from tests.tiny_models import OPENAI_MEAN, OPENAI_STD, save_tiny_clip, save_tiny_denoiser

WIDTH, HIDDEN, STEPS, NUM_TIMES = 24, 32, 4, 3
CONFIG = {"tower": "CLIP", "diffusion_size": None, "condition": "class", "normalisation": "tower", "projector": None}


def save_projector(path, input_width=WIDTH, denoiser=None, scale=30.0):
    """A random projector whose conditions are as large as a text encoder's output."""
    torch.manual_seed(3)
    hash_ = None if denoiser is None else hash_directory(denoiser)
    projector = Projector(input_width, 32, hidden_width=16, denoiser_hash=hash_)
    with torch.no_grad():
        projector.out.weight.mul_(scale)
    projector.save(path)
    return path


@pytest.fixture(autouse=True)
def few_times(monkeypatch):
    monkeypatch.setattr(module, "NUM_TIMES", NUM_TIMES)


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    return save_tiny_denoiser(tmp_path_factory.mktemp("velocity") / "sd", prediction_type="v_prediction")


@pytest.fixture(scope="module")
def run(tmp_path_factory, denoiser):
    """A finished run: its tower is not the base."""
    path = tmp_path_factory.mktemp("runs") / "a"
    path.mkdir()
    config = CONFIG | {"denoiser": str(denoiser)}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    save_tiny_clip(path / "tower", seed=5)
    (path / "tower" / "provenance.json").write_text(json.dumps({"config": config}))
    save_projector(path / "projector", denoiser=denoiser)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four images in different shapes and a broken one."""
    path = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index, shape in enumerate([(40, 48), (32, 32), (64, 33), (50, 50)]):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize(shape, Image.Resampling.BICUBIC).save(path / f"{index}.png")
    (path / "0a.png").write_bytes((path / "0.png").read_bytes()[:200])
    return path


@pytest.fixture(scope="module")
def frozen(denoiser):
    model = Denoiser.load(denoiser)
    return model, load_sampler(denoiser, model.prediction_type), load_decoder(denoiser)


def test_command_draws_and_counts(run, folder, tiny_clip, tmp_path, capsys):
    """The base tower is drawn through the projector of the run; the broken image is counted."""
    out = tmp_path / "seen.png"
    options = ["--images", str(folder), "--limit", "3", "--steps", "2", "--out", str(out)]
    assert main([str(tiny_clip), str(run / "tower"), *options]) == 0
    printed = capsys.readouterr().out
    assert "images: 3 of" in printed and "1 broken" in printed
    assert f"projector, for every tower: {run / 'projector'} (of a)" in printed
    with Image.open(out) as image:
        assert image.height == 5 * 100 + 4 and image.width > 300
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["images"]["keys"] and report["images"]["skipped"][0].endswith("0a.png")
    assert set(report["towers"]) == {"clip", "a"} and report["projector"]["of"] == "a"
    for name in ("clip", "a"):
        for kind in ("own", "other", "none"):
            assert report["loss"]["mean"][name][kind] == pytest.approx(np.mean(report["loss"]["per_image"][name][kind]))
    assert main([str(tiny_clip), str(run / "tower"), *options]) == 2, "nothing is overwritten"


def test_same_noise_everywhere(run, folder, tiny_clip, tmp_path):
    """A seed decides the pictures, and what is drawn differs by tower alone."""
    shutil.copytree(run / "tower", tmp_path / "twin")
    towers = {"a": run / "tower", "twin": tmp_path / "twin", "base": tiny_clip}
    parts = find_parts(towers)
    images, _, _ = read_images(folder, limit=3, size=32)
    rows, losses = reconstruct(parts, images, steps=STEPS)
    again, _ = reconstruct(parts, images, steps=STEPS)
    other, _ = reconstruct(parts, images, steps=STEPS, seed=1)
    assert list(rows) == ["original", "autoencoder", "no condition", "a", "twin", "base"]
    assert torch.equal(rows["a"], rows["twin"]) and losses["a"] == losses["twin"]
    assert all(torch.equal(rows[name], again[name]) for name in rows)
    assert not torch.allclose(rows["a"], rows["base"], atol=0.01)
    assert not torch.allclose(rows["a"], other["a"], atol=0.01)
    assert torch.equal(rows["original"], other["original"])
    torch.testing.assert_close(rows["no condition"], rows["no condition"][:1].expand(3, -1, -1, -1))
    assert losses["a"]["none"] == losses["base"]["none"] and losses["a"]["own"] != losses["base"]["own"]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_as_the_pipeline_of_diffusers(kind, guidance, tiny_denoiser, denoiser):
    """`StableDiffusionPipeline` with the prompt plus the condition as its prompt, from the same latents."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    path = tiny_denoiser if kind == "epsilon" else denoiser
    model = Denoiser.load(path)
    pipeline = StableDiffusionPipeline.from_pretrained(path, safety_checker=None, feature_extractor=None)
    # Given afterwards, as it is: the pipeline would set `steps_offset` to 1, which Stable Diffusion's own files have.
    pipeline.scheduler = DDIMScheduler.from_pretrained(path, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    conditions = 2 * torch.randn(3, 32, generator=generator)
    noise = torch.randn(4, 8, 8, generator=generator)
    empty, _ = pipeline.encode_prompt("", "cpu", 1, False)
    expected = pipeline(
        prompt_embeds=empty + conditions[:, None],
        negative_prompt_embeds=empty.expand(3, -1, -1) if guidance > 1 else None,
        latents=noise.expand(3, -1, -1, -1),
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        output_type="pt",
    ).images
    sampler = load_sampler(path, model.prediction_type)
    drawn = generate(model, sampler, conditions, noise, steps=STEPS, guidance=guidance)
    torch.testing.assert_close(decode(load_decoder(path), drawn), expected, atol=2e-4, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 0.01, "the condition must be seen in what is compared"


def test_start_as_image_to_image(denoiser, frozen):
    """Beginning with noised originals is the image-to-image pipeline of diffusers."""
    from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

    model, sampler, decoder = frozen
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(denoiser, safety_checker=None, feature_extractor=None)
    # Given afterwards, as it is: the pipeline would set `steps_offset` to 1, which Stable Diffusion's own files have.
    pipeline.scheduler = DDIMScheduler.from_pretrained(denoiser, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    condition = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    expected = pipeline(
        prompt_embeds=pipeline.encode_prompt("", "cpu", 1, False)[0] + condition[:, None],
        image=latents,
        strength=0.5,
        num_inference_steps=10,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))
    drawn = generate(model, sampler, condition, noise, steps=10, latents=latents, start=500)
    torch.testing.assert_close(decode(decoder, drawn), expected, atol=2e-4, rtol=0)


def test_sampler_of_other_schedulers(denoiser, tmp_path):
    """Whatever sampler the files name, latents are not clipped and the noise schedule is theirs."""
    shutil.copytree(denoiser / "scheduler", tmp_path / "scheduler")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    stored = json.loads(file.read_text())
    del stored["clip_sample"], stored["prediction_type"]
    file.write_text(json.dumps(stored | {"_class_name": "EulerDiscreteScheduler", "beta_end": 0.02}))
    sampler = load_sampler(tmp_path, "velocity")
    assert not sampler.config.clip_sample and sampler.config.prediction_type == "v_prediction"
    betas = torch.linspace(0.00085**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(sampler.alphas_cumprod.double(), (1 - betas).cumprod(0), atol=1e-5, rtol=1e-4)


def test_losses_by_hand(denoiser, frozen):
    """The loss from parts of diffusers, image by image and time by time; more images than run at a time."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    model, _, _ = frozen
    generator = torch.Generator().manual_seed(4)
    latents, conditions = torch.randn(9, 4, 8, 8, generator=generator), torch.randn(9, 2, 32, generator=generator)
    noise = torch.randn(9, 2, 4, 8, 8, generator=generator)
    unet = UNet2DConditionModel.from_pretrained(denoiser, subfolder="unet")
    scheduler = DDPMScheduler.from_pretrained(denoiser, subfolder="scheduler")
    expected = torch.zeros(9, 2)
    with torch.no_grad():
        for image in range(9):
            for which in range(2):
                for index, time in enumerate((250, 750)):
                    drawn, t = noise[image, index][None], torch.tensor([time])
                    tokens = model.prompt[None] + conditions[image, which]
                    noisy = scheduler.add_noise(latents[image][None], drawn, t)
                    difference = unet(noisy, t, tokens).sample - scheduler.get_velocity(latents[image][None], drawn, t)
                    expected[image, which] += difference.square().mean() / 2
    torch.testing.assert_close(denoising_losses(model, latents, conditions, noise), expected, atol=1e-5, rtol=1e-5)


def test_other_is_the_next_image(run, folder):
    """`other` is the loss under the next image's condition, and there is none for a single image."""
    parts = find_parts({"a": run / "tower"})
    images, _, _ = read_images(folder, limit=2, size=32)
    _, losses = reconstruct(parts, images, steps=1)
    model = Denoiser.load(parts.denoiser)
    pixels = images.float() / 255
    conditions = conditions_of(run / "tower", Projector.load(parts.projector), pixels, parts)
    generator = torch.Generator().manual_seed(0)
    torch.randn(4, 8, 8, generator=generator)
    noise = torch.randn(2, NUM_TIMES, 4, 8, 8, generator=generator)
    swapped = denoising_losses(model, model.encode(pixels), conditions.flip(0)[:, None], noise)
    assert losses["a"]["other"] == pytest.approx(swapped[:, 0].tolist(), abs=1e-5)
    assert losses["a"]["other"] != pytest.approx(losses["a"]["own"], abs=1e-3)
    _, alone = reconstruct(parts, images[:1], steps=1)
    assert set(alone["a"]) == {"none", "own"}


@pytest.mark.parametrize("normalisation", ["tower", "openai"])
@pytest.mark.parametrize("condition", ["class", "class+pooled-patches", "pooled-patches@-2"])
def test_conditions_as_trained(condition, normalisation, tiny_clip, tmp_path):
    """What the projector reads, from transformers' own outputs, normalised as in training."""
    from transformers import CLIPModel

    shutil.copytree(tiny_clip, tmp_path / "tower")
    file = tmp_path / "tower" / "preprocessor_config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    width = {"class": WIDTH, "class+pooled-patches": WIDTH + HIDDEN, "pooled-patches@-2": HIDDEN}[condition]
    projector = Projector.load(save_projector(tmp_path / "projector", width)).eval()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (OPENAI_MEAN, OPENAI_STD) if normalisation == "openai" else ([0.5] * 3, [0.25] * 3)
    values = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    model = CLIPModel.from_pretrained(tiny_clip)
    with torch.no_grad():
        output = model.vision_model(values, output_hidden_states=True)
        embedding, pooled = model.visual_projection(output.pooler_output), output.hidden_states[-2][:, 1:].mean(1)
        read = {"class": embedding, "pooled-patches@-2": pooled}.get(condition, torch.cat([embedding, pooled], 1))
        expected = projector(read)
    parts = Parts(
        towers={},
        projector=tmp_path,
        origin=None,
        denoiser=tmp_path,
        denoiser_hash="",
        size=32,
        condition=condition,
        normalisation=normalisation,
    )
    found = conditions_of(tmp_path / "tower", projector, pixels, parts)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_a_run_says(run, denoiser, tiny_clip, tmp_path, caplog):
    """Projector, denoiser and condition are those of the run that trained the projector."""
    assert find_parts({"base": tiny_clip, "a": run / "tower"}).origin == "a"
    given = find_parts({"base": tiny_clip}, projector=str(run / "projector"))
    assert given.denoiser == denoiser and given.origin is None, "the projector's run names its denoiser"
    other = tmp_path / "b"
    config = CONFIG | {"denoiser": str(denoiser), "condition": "pooled-patches@-2", "diffusion_size": 64}
    other.mkdir()
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    save_projector(other / "projector", HIDDEN, denoiser)
    parts = find_parts({"a": run / "tower"}, projector=str(other / "projector"))
    assert (parts.condition, parts.size) == ("pooled-patches@-2", 64)
    (other / "config.yaml").write_text(yaml.safe_dump(config | {"prediction_type": "epsilon"}))
    with caplog.at_level("WARNING"):
        find_parts({"a": run / "tower"}, projector=str(other / "projector"))
    assert "as if the denoiser predicted epsilon" in caplog.text
    moved = tmp_path / "moved"
    shutil.copytree(run / "tower", moved)
    record = {"config": CONFIG | {"denoiser": str(denoiser), "projector": str(run / "projector")}}
    (moved / "provenance.json").write_text(json.dumps(record))
    assert find_parts({"moved": moved}).projector == run / "projector"


def test_refusals(run, denoiser, tiny_clip, tiny_denoiser, folder, tmp_path, capsys):
    """What cannot be known or does not fit is refused in a sentence, before a model is loaded."""
    bare = save_projector(tmp_path / "bare" / "projector", denoiser=denoiser)
    narrow = save_projector(tmp_path / "narrow" / "projector", input_width=WIDTH + 1)
    own = str(run / "tower")
    images = ["--images", str(folder), "--out", str(tmp_path / "x.png")]
    for arguments, words in (
        ([str(tiny_clip)], "give one with --projector DIR"),
        ([str(tiny_clip), "--projector", str(bare)], "give it with --denoiser DIR"),
        ([own, "--projector", str(narrow), "--denoiser", str(denoiser)], f"input_width {WIDTH + 1}"),
        ([own, "--denoiser", str(tiny_denoiser)], "was trained for another denoiser"),
        ([own, own], "given twice"),
        ([own, "--steps", "0"], "--steps is 0"),
        ([own, "--steps", "2000"], "--steps is 2000"),
        ([own, "--limit", "0"], "--limit is 0"),
        ([own, "--guidance", "0.5"], "--guidance is 0.5"),
        ([own, "--start", "1001"], "--start is 1001"),
        ([own, "--start", "20", "--steps", "10"], "--start is 20"),
        ([own, "--out", str(tmp_path / "x.jpg")], ".png"),
        ([own, "--out", str(tmp_path / "nowhere" / "x.png")], "does not exist"),
    ):
        assert main([*images, *arguments]) == 2, arguments
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1, message
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="no image that can be read: 1"):
        read_images(broken, limit=2, size=32)
