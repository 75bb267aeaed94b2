"""Embeddings equal what the models themselves compute, for CLIP and SigLIP."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.features import DualEncoder, pick_device
from dcr_mllm.headers import tower_summary
from tests.tiny_models import save_tiny_clip, save_tiny_siglip

TEXTS = ["a photo of a red wall", "two dogs, one cat?", "x"]
SAVERS = {"clip": save_tiny_clip, "siglip": save_tiny_siglip}


@pytest.fixture(scope="module", params=list(SAVERS))
def tower(request, tmp_path_factory):
    return SAVERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = []
    for index, (mode, shape) in enumerate((("RGB", (40, 50, 3)), ("L", (33, 20)), ("RGBA", (32, 32, 4))) * 2):
        path = directory / f"{index}.png"
        Image.fromarray(rng.integers(0, 256, size=shape, dtype=np.uint8), mode).save(path)
        paths.append(path)
    return paths


def test_embeddings_equal_the_models_own_logits(tower, files):
    encoder = DualEncoder(tower_summary(tower), device="cpu", batch_size=4)
    images, texts = encoder.embed_images(files), encoder.embed_texts(TEXTS)
    model, tokenizer = AutoModel.from_pretrained(tower).eval(), AutoTokenizer.from_pretrained(tower)
    is_clip = model.config.model_type == "clip"
    ids = tokenizer(TEXTS, padding=True if is_clip else "max_length", return_tensors="pt")
    with torch.inference_mode():
        pixels = torch.cat(list(encoder.pixel_batches(files)))
        mask = {"attention_mask": ids["attention_mask"]} if is_clip else {}
        logits = model(input_ids=ids["input_ids"], pixel_values=pixels, **mask).logits_per_text
    scale, shift = model.logit_scale.exp().item(), 0.0 if is_clip else model.logit_bias.item()
    normalised = images.projected / np.linalg.norm(images.projected, axis=1, keepdims=True)
    assert scale * texts @ normalised.T + shift == pytest.approx(logits.numpy(), abs=1e-4)
    assert images.projected.dtype == images.pooled.dtype == texts.dtype == np.float32
    assert (images.pooled.shape == images.projected.shape) == (not is_clip)


def test_batch_size_does_not_matter(tower, files):
    small, large = (DualEncoder(tower_summary(tower), device="cpu", batch_size=size) for size in (1, 64))
    for first, second in zip(
        (small.embed_texts(TEXTS * 2), small.embed_images(files).projected),
        (large.embed_texts(TEXTS * 2), large.embed_images(files).projected),
        strict=True,
    ):
        assert first == pytest.approx(second, abs=1e-5)


def test_token_sample(tower, files):
    encoder = DualEncoder(tower_summary(tower), device="cpu", batch_size=2)
    tokens = encoder.embed_images(files, num_token_images=5, num_patches=6).tokens
    assert tokens is not None
    assert tokens.patch_tokens.shape == (4, 5, 6, 32)
    pixels = torch.cat(list(encoder.pixel_batches(files)))[:5]
    with torch.inference_mode():
        states = encoder._model.vision_model(pixels, output_hidden_states=True).hidden_states
    first = int(encoder.kind.has_class_token)
    for layer, state in enumerate(states):
        if encoder.kind.has_class_token:
            assert tokens.class_tokens is not None
            assert tokens.class_tokens[layer] == pytest.approx(state[:, 0].numpy(), abs=1e-5)
        # Every sampled patch is one of the image's own, and all are different ones.
        gaps = np.abs(tokens.patch_tokens[layer][:, :, None] - state[:, None, first:].numpy()).max(axis=-1)
        assert gaps.min(axis=2).max() < 1e-5
        assert all(len(set(row)) == 6 for row in gaps.argmin(axis=2).tolist())
    if not encoder.kind.has_class_token:
        assert tokens.class_tokens is None


def test_images_are_preprocessed_by_pillow(tower):
    assert DualEncoder(tower_summary(tower), device="cpu").description["image_processor"].endswith("Pil")


def test_long_texts_are_cut_with_a_warning(tower, capsys):
    encoder = DualEncoder(tower_summary(tower), device="cpu")
    assert encoder.embed_texts(["word " * 200]).shape[0] == 1
    assert "1 of 1 texts are cut" in capsys.readouterr().err


def _edit_json(path, **changes):
    content = json.loads(path.read_text())
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (content[section] if section else content)[name] = value
    path.write_text(json.dumps(content))


def _made_up_tokenizer(path):
    # What transformers makes of a directory whose tokenizer files were forgotten.
    from transformers import CLIPTokenizer

    CLIPTokenizer().save_pretrained(path)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (_made_up_tokenizer, "its tokenizer has"),
        (
            lambda path: _edit_json(path / "preprocessor_config.json", crop_size={"height": 24, "width": 24}),
            "makes pictures of 24 pixels",
        ),
        (
            lambda path: _edit_json(path / "preprocessor_config.json", do_center_crop=False),
            r"makes images of \(\d+, \d+\) pixels",
        ),
    ],
)
def test_wrong_parts_are_refused(tmp_path, break_it, said):
    tower = save_tiny_clip(tmp_path / "tower")
    break_it(tower)
    with pytest.raises(UserError, match=said):
        DualEncoder(tower_summary(tower), device="cpu")


def test_unreadable_image_is_named(tower, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken\.jpg is not a readable image"):
        DualEncoder(tower_summary(tower), device="cpu").embed_images([tmp_path / "broken.jpg"])


def test_pick_device():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="use auto, cpu or cuda"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        assert pick_device("auto").type == "cpu"
        with pytest.raises(UserError, match="no CUDA"):
            pick_device("cuda")


def test_overwritten_weights_change_images_only(tower, files):
    encoder, judge = (DualEncoder(tower_summary(tower), device="cpu") for _ in range(2))
    before, texts = encoder.embed_images(files).projected, encoder.embed_texts(TEXTS)
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    encoder.overwrite({name: judge._model.get_parameter(name) * 2})
    assert not np.allclose(encoder.embed_images(files).projected, before)
    assert np.array_equal(encoder.embed_texts(TEXTS), texts)
    encoder.overwrite({name: judge._model.get_parameter(name)})
    encoder.drop_text_side()
    batches = list(encoder.pixel_batches(files))
    assert np.array_equal(encoder.embed_pixels(batches).projected, before)
    with pytest.raises(KeyError):
        encoder.overwrite({"no.such.weight": torch.zeros(1)})
