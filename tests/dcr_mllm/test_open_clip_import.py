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


SIGLIP = {
    "embed_dim": 36,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 56,
        "timm_model_name": "vit_standin_siglip",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 64,
        "vocab_size": 298,
        "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": 36,
        "heads": 2,
        "layers": 2,
        "mlp_ratio": 3.7362,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A SigLIP of open_clip with a tiny timm image side: its checkpoint, and the tower whose tokenizer fits."""
    import open_clip
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    from tests.standins import save_tower

    def vit_standin_siglip(pretrained: bool = False, **options: object) -> VisionTransformer:
        shape = {"img_size": 56, "patch_size": 14, "embed_dim": 36, "depth": 2, "num_heads": 2, "mlp_ratio": 3.7362}
        known = {key: options[key] for key in ("num_classes", "global_pool") if key in options}
        return VisionTransformer(**shape, class_token=False, **known)

    vit_standin_siglip.__module__ = "timm.models.vision_transformer"
    register_model(vit_standin_siglip)
    folder = tmp_path_factory.mktemp("siglip")
    approximate = {**SIGLIP["text_cfg"], "act_kwargs": {"approximate": "tanh"}}
    for name, config in (("standin-SigLIP", SIGLIP), ("standin-SigLIP2", {**SIGLIP, "text_cfg": approximate})):
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
    return folder, save_tower("google/siglip-so400m-patch14-224", folder / "base")


@pytest.mark.parametrize("architecture", ["standin-SigLIP", "standin-SigLIP2"])
def test_siglip_of_timm_becomes_a_siglip_with_its_outputs(siglip: tuple[Path, Path], architecture: str, tmp_path: Path):
    from transformers import AutoImageProcessor, AutoTokenizer, SiglipModel

    source, weights = checkpoint(architecture, tmp_path / "weights.safetensors")
    arguments = [architecture, str(weights), str(tmp_path / "out"), "--base", str(siglip[1])]
    assert main(arguments) == 0
    model = SiglipModel.from_pretrained(tmp_path / "out").eval()
    pixels, ids = torch.randn(3, 3, 56, 56), torch.randint(298, (3, 64))
    with torch.no_grad():
        image, text = model.get_image_features(pixels).pooler_output, model.get_text_features(ids).pooler_output
        torch.testing.assert_close(image, source.encode_image(pixels), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(text, source.encode_text(ids), atol=1e-5, rtol=1e-5)
        assert float(model.logit_bias) == float(source.logit_bias) and image.std() > 1e-2
    # open_clip gives OpenAI's statistics for a file; a SigLIP was never trained with them.
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "out").image_mean) == [0.5] * 3
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 298


def test_siglip_weights_that_a_peer_released_inside_a_diffusion_model(siglip: tuple[Path, Path], tmp_path: Path):
    """In half precision, below the names of the model that trained them; the activation is the base's."""
    from transformers import SiglipModel

    from dcr_mllm.tower_import import import_tower

    source, weights = checkpoint("standin-SigLIP", tmp_path / "weights.safetensors")
    base = import_open_clip("standin-SigLIP", weights, tmp_path / "base", siglip[1])
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_((parameter * 1.01).half())
    state = {f"class_model.model.{name}": value.half() for name, value in source.state_dict().items()}
    torch.save(state | {"vae.encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "released.pth")
    found = import_tower(tmp_path / "released.pth", tmp_path / "out", base)
    assert (found.layout, found.num_left_out, found.from_base) == ("open_clip with timm", 1, [])
    model, pixels = SiglipModel.from_pretrained(tmp_path / "out").eval(), torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        image = model.get_image_features(pixels).pooler_output
        torch.testing.assert_close(image, source.encode_image(pixels), atol=1e-5, rtol=1e-5)


def test_statistics_come_from_the_config_beside_the_checkpoint(
    architectures: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from transformers import AutoImageProcessor

    _, weights = checkpoint("tiny", tmp_path / "weights.safetensors")
    import_open_clip("tiny", weights, tmp_path / "assumed")
    assert "taken to be OpenAI's" in capsys.readouterr().err
    preprocess = {"preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(preprocess))
    import_open_clip("tiny", weights, tmp_path / "out")
    assert "taken to be" not in capsys.readouterr().err
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "out").image_std) == [0.5] * 3


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"vision_cfg": {**SIGLIP["vision_cfg"], "timm_proj": "linear"}}, "vision_cfg.timm_proj 'linear'"),
        ({"text_cfg": {**SIGLIP["text_cfg"], "no_causal_mask": False}}, "text_cfg.no_causal_mask False"),
        (
            {"text_cfg": {**SIGLIP["text_cfg"], "hf_model_name": "roberta-base"}},
            "text_cfg.hf_model_name 'roberta-base'",
        ),
    ],
)
def test_siglips_of_another_kind_are_refused_by_their_part(
    siglip: tuple[Path, Path], change: dict, part: str, tmp_path: Path
):
    import open_clip

    (tmp_path / "odd-SigLIP.json").write_text(json.dumps({**SIGLIP, **change}))
    open_clip.add_model_config(tmp_path / "odd-SigLIP.json")
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(UserError, match=part):
        import_open_clip("odd-SigLIP", tmp_path / "x", tmp_path / "out", siglip[1])
    with pytest.raises(UserError, match="--base"):
        import_open_clip("standin-SigLIP", tmp_path / "x", tmp_path / "out")


def test_what_does_not_fit_is_refused(architectures: dict[str, str], tmp_path: Path):
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(UserError, match="vision_cfg.timm_model_name"):
        import_open_clip("tiny-timm", tmp_path / "x", tmp_path / "out")
    with pytest.raises(UserError, match="knows no architecture 'ViT-Q'"):
        import_open_clip("ViT-Q", tmp_path / "x", tmp_path / "out")
    with pytest.raises(UserError, match="checkpoint .* does not exist"):
        import_open_clip("tiny", tmp_path / "no", tmp_path / "out")
