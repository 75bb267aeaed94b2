"""An open_clip ViT becomes a CLIPModel with the same outputs, tokens and pixels; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dcr_mllm.errors import UserError
from dcr_mllm.open_clip_import import import_open_clip, main

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture
def architectures(tmp_path: Path) -> dict[str, str]:
    """Names of tiny architectures that are registered with open_clip for the test."""
    import open_clip

    timm = {**TINY, "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "image_size": 32}}
    for name, config in (("tiny", TINY), ("tiny-quick", {**TINY, "quick_gelu": True}), ("tiny-timm", timm)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    return {"plain": "tiny", "quick": "tiny-quick", "timm": "tiny-timm"}


def checkpoint(architecture: str, path: Path) -> tuple[object, Path]:
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model(architecture, pretrained=None).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # biases and positions begin as zeros
    save_file(model.state_dict(), path)
    return model, path


@pytest.mark.parametrize("kind", ["plain", "quick"])
def test_embeddings_tokens_and_pixels_are_open_clips(architectures: dict[str, str], kind: str, tmp_path: Path):
    import open_clip
    from PIL import Image
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    source, weights = checkpoint(architectures[kind], tmp_path / "weights.safetensors")
    assert main([architectures[kind], str(weights), str(tmp_path / "out")]) == 0
    model = CLIPModel.from_pretrained(tmp_path / "out").eval()
    pixels = torch.randn(3, 3, 32, 32)
    texts = ["a photo of a red fish", "it's 2 dogs!", "naïve café"]
    tokens = open_clip.get_tokenizer(architectures[kind], context_length=20)(texts)
    mine = AutoTokenizer.from_pretrained(tmp_path / "out")(
        texts, padding="max_length", max_length=20, return_tensors="pt"
    )
    for ours, theirs in zip(mine.input_ids.tolist(), tokens.tolist(), strict=True):
        end = theirs.index(49407)
        assert ours[: end + 1] == theirs[: end + 1]
    with torch.no_grad():
        torch.testing.assert_close(
            model.get_image_features(pixels).pooler_output, source.encode_image(pixels), atol=1e-5, rtol=1e-5
        )
        text = model.get_text_features(**mine).pooler_output
        torch.testing.assert_close(text, source.encode_text(tokens), atol=1e-5, rtol=1e-5)
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    preprocess = open_clip.image_transform(
        32, is_train=False, mean=tuple(processor.image_mean), std=tuple(processor.image_std)
    )
    torch.testing.assert_close(
        processor(image, return_tensors="pt").pixel_values[0], preprocess(image), atol=0.02, rtol=0
    )


def test_the_result_serves_as_tower_of_a_llava(architectures: dict[str, str], tmp_path: Path):
    from dcr_mllm.headers import tower_summary
    from dcr_mllm.llava_headers import vision_summary

    _, weights = checkpoint("tiny", tmp_path / "weights.safetensors")
    out = import_open_clip("tiny", weights, tmp_path / "out")
    assert vision_summary(out).image_tokens == 16 and tower_summary(out).has_text_side


def test_a_wrong_activation_is_noticed(architectures: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import dcr_mllm.open_clip_import as module

    _, weights = checkpoint("tiny", tmp_path / "weights.safetensors")
    original = module._empty_clip
    monkeypatch.setattr(module, "_empty_clip", lambda config, tok: original({**config, "quick_gelu": True}, tok))
    with pytest.raises(UserError, match="differs from open_clip's"):
        import_open_clip("tiny", weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused(architectures: dict[str, str], tmp_path: Path):
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(UserError, match="vision_cfg.timm_model_name"):
        import_open_clip("tiny-timm", tmp_path / "x", tmp_path / "out")
    with pytest.raises(UserError, match="knows no architecture 'ViT-Q'"):
        import_open_clip("ViT-Q", tmp_path / "x", tmp_path / "out")
    with pytest.raises(UserError, match="checkpoint .* does not exist"):
        import_open_clip("tiny", tmp_path / "no", tmp_path / "out")
