"""Build the miniature's weights from nothing, and the card that says how they were made and how good they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dcr_mllm.mini.clip import build_image_processor, train_clip, zero_shot_accuracy
from dcr_mllm.mini.diffusion import generate, save_denoiser, train_unet, train_vae
from dcr_mllm.mini.llm import text_accuracy, train_llm
from dcr_mllm.mini.world import IMAGE_SIZE, draw, full_caption, random_scene
from dcr_mllm.runs import hash_directory, package_versions, write_json_atomic

WEIGHTS = Path(__file__).parent / "weights"
CLIP_STEPS, DETAIL_STEPS, VAE_STEPS, UNET_STEPS, LLM_STEPS = 4500, 6000, 2000, 8000, 2000


def build_tower(
    out: Path,
    steps: int = CLIP_STEPS,
    detail_steps: int = DETAIL_STEPS,
    seed: int = 0,
    *,
    device: str = "cpu",
    num_workers: int = 0,
) -> None:
    """Train the mini CLIP and write `out/tower` (fp16) and `out/curves/clip.json`."""
    model, tokenizer, curve = train_clip(steps, detail_steps, seed, device=device, num_workers=num_workers)
    model.half().save_pretrained(out / "tower")
    tokenizer.save_pretrained(out / "tower")
    build_image_processor().save_pretrained(out / "tower")
    _write_curve(out, "clip", seed, curve)


def build_denoiser(out: Path, vae_steps: int = VAE_STEPS, unet_steps: int = UNET_STEPS, seed: int = 0) -> None:
    """Train the mini Stable Diffusion and write `out/denoiser` (fp16) and its curves."""
    vae, curve = train_vae(vae_steps, seed)
    _write_curve(out, "vae", seed, curve)
    unet, text_encoder, tokenizer, curve = train_unet(vae, unet_steps, seed)
    _write_curve(out, "unet", seed, curve)
    save_denoiser(out / "denoiser", vae, unet, text_encoder, tokenizer)


def build_language_model(out: Path, steps: int = LLM_STEPS, seed: int = 0) -> None:
    """Train the mini LLM and write `out/llm` (fp16) and its curve."""
    model, tokenizer, curve = train_llm(steps, seed)
    model.half().save_pretrained(out / "llm")
    tokenizer.save_pretrained(out / "llm")
    _write_curve(out, "llm", seed, curve)


def write_card(out: Path) -> dict:
    """Measure the parts that are there and write `card.json`, `README.md` and `samples.png` beside them."""
    measures = {"tower": tower_quality, "denoiser": denoiser_quality, "llm": llm_quality}
    parts = [part for part in measures if (out / part).is_dir()]
    quality = {name: value for part in parts for name, value in measures[part](out / part).items()}
    curves = {path.stem: json.loads(path.read_text()) for path in sorted((out / "curves").glob("*.json"))}
    steps = {name: curve["steps"] for name, curve in curves.items()}
    card = {
        "data": "scenes drawn by dcr_mllm.mini.world, training split, a fresh one at every step",
        "steps": steps,
        "seeds": {name: curve["seed"] for name, curve in curves.items()},
        "quality": quality,
        "curves": {name: curve["curve"] for name, curve in curves.items()},
        "hashes": {part: hash_directory(out / part) for part in parts},
        "packages": package_versions(("torch", "transformers", "diffusers", "numpy", "pillow")),
    }
    write_json_atomic(out / "card.json", card)
    if "denoiser" in parts:
        samples(out / "denoiser").save(out / "samples.png")
    rows = "\n".join(row.format(steps=steps[name], **quality) for name, row in _ROWS.items() if name in steps)
    (out / "README.md").write_text(_README.format(rows=rows))
    return card


def tower_quality(tower: Path, num_images: int = 1920) -> dict[str, float]:
    """Zero-shot accuracy on 96 classes (colour and kind) of test scenes, in percent."""
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(tower, dtype=torch.float32)
    accuracy = zero_shot_accuracy(model, AutoTokenizer.from_pretrained(tower), "test", num_images)
    return {"zero_shot": round(100 * accuracy, 1)}


def llm_quality(llm: Path) -> dict[str, float]:
    """Share of questions about described test scenes that are answered exactly, in percent, over the four forms."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
    accuracy = text_accuracy(model, AutoTokenizer.from_pretrained(llm), "test")
    return {f"text_{form}": round(100 * value, 1) for form, value in accuracy.items()}


@torch.inference_mode()
def denoiser_quality(denoiser: Path, num_images: int = 480) -> dict[str, float]:
    """PSNR of the VAE in dB, and velocity error of the UNet with the right, an empty and a wrong caption."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from dcr_mllm.mini.clip import to_pixels
    from dcr_mllm.mini.diffusion import MAX_LENGTH

    rng = np.random.default_rng(8)
    scenes = [random_scene(rng, "test") for _ in range(num_images)]
    images = to_pixels([draw(scene) for scene in scenes]).float() / 127.5 - 1
    vae = AutoencoderKL.from_pretrained(denoiser / "vae", torch_dtype=torch.float32).eval()
    unet = UNet2DConditionModel.from_pretrained(denoiser / "unet", torch_dtype=torch.float32).eval()
    text_encoder = CLIPTextModel.from_pretrained(denoiser / "text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(denoiser / "tokenizer")
    scheduler = DDPMScheduler.from_pretrained(denoiser / "scheduler")
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(96)])
    decoded = torch.cat([vae.decode(chunk).sample for chunk in latents.split(96)]).clamp(-1, 1)
    latents = latents * vae.config.scaling_factor

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(1000, (num_images,), generator=generator)
    target = scheduler.get_velocity(latents, noise, timesteps)
    captions = [full_caption(scene, rng) for scene in scenes]
    result = {"psnr": round(float(10 * torch.log10(4 / (decoded - images).pow(2).mean())), 1)}
    for name, texts in (("own", captions), ("empty", [""] * num_images), ("wrong", captions[1:] + captions[:1])):
        ids = tokenizer(
            texts, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        ).input_ids
        prompt = text_encoder(input_ids=ids).last_hidden_state
        predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, prompt).sample
        result[f"error_{name}"] = round(float((predicted - target).pow(2).mean()), 4)
    return result


def samples(denoiser: Path, num_scenes: int = 12) -> Image.Image:
    """A grid for people: drawn scenes above, what the mini Stable Diffusion makes of their captions below."""
    rng = np.random.default_rng(9)
    scenes = [random_scene(rng, "test") for _ in range(num_scenes)]
    generated = generate(denoiser, [full_caption(scene, rng) for scene in scenes])
    grid = Image.new("RGB", (num_scenes * IMAGE_SIZE, 2 * IMAGE_SIZE))
    for column, (scene, pixels) in enumerate(zip(scenes, generated, strict=True)):
        grid.paste(draw(scene), (column * IMAGE_SIZE, 0))
        grid.paste(Image.fromarray(pixels.permute(1, 2, 0).numpy()), (column * IMAGE_SIZE, IMAGE_SIZE))
    return grid.resize((grid.width * 2, grid.height * 2), Image.Resampling.NEAREST)


def _write_curve(out: Path, name: str, seed: int, curve: list[dict]) -> None:
    (out / "curves").mkdir(parents=True, exist_ok=True)
    record = {"steps": curve[-1]["step"] if curve else 0, "seed": seed, "curve": curve}
    write_json_atomic(out / "curves" / f"{name}.json", record)


_ROWS = {  # by the name of the curve
    "clip": "| mini CLIP | {steps} steps on coarse captions; zero-shot on 96 classes of test scenes {zero_shot} % |",
    "vae": "| VAE | {steps} steps; reconstruction PSNR {psnr} dB |",
    "unet": "| UNet and text encoder | {steps} steps on full captions; error of the velocity {error_own} with the "
    "right caption, {error_empty} with none, {error_wrong} with another scene's |",
    "llm": "| mini LLM | {steps} steps on questions about scenes described in words; of test scenes it answers right "
    "{text_short} % (short), {text_yesno} % (yes or no), {text_choice} % (letter), {text_existence} % (existence) |",
}
_README = """# The miniature's weights

A mini CLIP (`tower/`), a mini Stable Diffusion (`denoiser/`) and a mini LLM (`llm/`), trained from nothing on scenes
that `dcr_mllm.mini.world` draws or describes. They are a controlled experiment: their numbers say nothing about real
models.

| | |
|---|---|
{rows}

Rebuild: `python -m dcr_mllm.mini build --out DIR` (the mini CLIP took 4 minutes on an H200 with
`--device cuda --num-workers 15`; on one thread 6,000 of its 10,500 steps take 92, and the mini LLM 41). Steps, seeds,
curves, hashes and package versions are in `card.json`; `samples.png` shows drawn scenes above and generated ones below.

A rebuild rounds differently on another number of threads or with another torch, and a long training carries that far:
it knows classes as well, but may see other details. The shipped mini CLIP was built on that GPU in fp32.
"""
