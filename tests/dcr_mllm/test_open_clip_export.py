"""A tower exported to open_clip has the same features, texts and pixels there, and comes back bit-equal."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcr_mllm.errors import UserError
from dcr_mllm.open_clip_config import _ratio, tower_config
from dcr_mllm.open_clip_export import CONFIG_FILE, WEIGHT_FILE, export_open_clip, main
from dcr_mllm.open_clip_names import to_hugging_face, to_open_clip
from tests.tiny_models import save_tiny_clip

TEXTS = ["a photo of a red circle", "It's two dogs!", "left"]
SIGLIP = {"timm": "vit_tinytanh_patch8_siglip_32", "exact": "vit_tinyexact_patch8_siglip_32"}


@pytest.fixture(scope="module")
def tiny_timm() -> Any:
    """Tiny SigLIPs of timm with either GELU, registered for this module's tests."""
    import timm
    from timm.models import _registry
    from timm.models.vision_transformer import VisionTransformer

    def register(name: str, activation: str | None) -> None:
        def build(pretrained: bool = False, pretrained_cfg: Any = None, **options: Any) -> VisionTransformer:
            options = {key: value for key, value in options.items() if key in ("num_classes", "global_pool")}
            return VisionTransformer(
                img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2, class_token=False,
                act_layer=activation, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), **options,
            )  # fmt: skip

        build.__name__, build.__module__ = name, __name__
        timm.models.register_model(build)
        _registry._model_pretrained_cfgs[name] = timm.models.PretrainedCfg(input_size=(3, 32, 32), architecture=name)

    for name, activation in ((SIGLIP["timm"], "gelu_tanh"), (SIGLIP["exact"], None)):
        register(name, activation)
    yield
    for name in SIGLIP.values():
        for registry in (_registry._model_entrypoints, _registry._model_pretrained_cfgs):
            registry.pop(name, None)


def edited(source: Path, out: Path, **changes: Any) -> Path:
    """A copy of a tower whose config.json differs; `vision_config={...}` adds to that part."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (out / "config.json").write_text(json.dumps(config))
    return out


def strengthened(source: Path, out: Path) -> Path:
    """A copy whose biases, norms and positions are no longer zeros and ones, so that none can be mixed up unnoticed."""
    shutil.copytree(source, out)
    generator = torch.Generator().manual_seed(3)
    state = load_file(out / "model.safetensors")
    state = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in sorted(state.items())}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


@torch.no_grad()
def assert_same_features(tower: Path, exported: Path) -> None:
    import open_clip
    from transformers import AutoModel, AutoTokenizer

    ours = AutoModel.from_pretrained(tower).eval()
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{exported}")
    theirs.eval()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        ours.get_image_features(pixels).pooler_output, theirs.encode_image(pixels), atol=1e-5, rtol=1e-5
    )
    length = ours.config.text_config.max_position_embeddings
    mine = AutoTokenizer.from_pretrained(tower)(
        TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    tokens = open_clip.get_tokenizer(f"local-dir:{exported}")(TEXTS)
    assert tokens.shape[1] == length
    inputs = {"input_ids": mine.input_ids}
    torch.testing.assert_close(
        ours.get_text_features(**inputs).pooler_output, theirs.encode_text(tokens), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(ours.logit_scale.reshape(()), theirs.logit_scale, atol=0, rtol=0)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_clip_gives_open_clip_the_same_features_and_comes_back(tiny_clip: Path, tmp_path: Path, activation: str):
    change = {"hidden_act": activation}
    strong = strengthened(tiny_clip, tmp_path / "strong")
    tower = edited(strong, tmp_path / "tower", vision_config=change, text_config={**change, "layer_norm_eps": 1e-4})
    if activation == "gelu":  # as configs of OpenAI's towers say, whatever the end token is
        tower = edited(tower, tmp_path / "old", text_config={"bos_token_id": 0, "eos_token_id": 2})
    assert main([str(tower), str(tmp_path / "out")]) == 0
    assert_same_features(tower, tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert config["model_cfg"].get("quick_gelu", False) == (activation == "quick_gelu")
    back, own = to_hugging_face(load_file(tmp_path / "out" / WEIGHT_FILE)), load_file(tower / "model.safetensors")
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name], own[name]) and back[name].dtype == own[name].dtype for name in own)


def test_siglip_gives_open_clip_the_same_features_and_comes_back(tiny_timm: None, tiny_siglip: Path, tmp_path: Path):
    tower = strengthened(tiny_siglip, tmp_path / "tower")
    out = export_open_clip(tower, tmp_path / "out")
    config = json.loads((out / CONFIG_FILE).read_text())
    assert config["model_cfg"]["vision_cfg"]["timm_model_name"] == SIGLIP["timm"]  # the one with SigLIP's activation
    assert_same_features(tower, out)
    back, own = to_hugging_face(load_file(out / WEIGHT_FILE)), load_file(tower / "model.safetensors")
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)


def test_other_weights_beside_a_tower_are_not_exported(tiny_clip: Path, tmp_path: Path):
    tower = shutil.copytree(tiny_clip, tmp_path / "tower")
    save_file({"visual.proj": torch.zeros(2, 2)}, tower / "open_clip_model.safetensors")
    out = export_open_clip(tower, tmp_path / "out")
    back, own = to_hugging_face(load_file(out / WEIGHT_FILE)), load_file(tiny_clip / "model.safetensors")
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)


def test_siglip_in_an_architecture_of_another_gelu_is_said(
    tiny_timm: None, tiny_siglip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import open_clip

    tower = strengthened(tiny_siglip, tmp_path / "tower")
    found = json.loads((export_open_clip(tower, tmp_path / "out") / CONFIG_FILE).read_text())["model_cfg"]
    found["vision_cfg"]["timm_model_name"] = SIGLIP["exact"]
    (tmp_path / "tiny-exact-siglip.json").write_text(json.dumps(found))
    open_clip.add_model_config(tmp_path / "tiny-exact-siglip.json")
    with pytest.raises(UserError, match=f"{SIGLIP['exact']} computes the exact GELU.*--allow-activation"):
        export_open_clip(tower, tmp_path / "other", "tiny-exact-siglip")
    assert not (tmp_path / "other").exists()
    out = export_open_clip(tower, tmp_path / "other", "tiny-exact-siglip", allow_activation=True)
    record = json.loads((out / "provenance.json").read_text())
    assert record["output_difference"] > 1e-5 and "GELU" in record["activation"]


def test_pixels_are_those_of_the_towers_processor(tiny_timm: None, tiny_clip: Path, tiny_siglip: Path, tmp_path: Path):
    import open_clip
    from PIL import Image
    from transformers import AutoImageProcessor

    image = Image.effect_noise((50, 40), 90).convert("RGB")
    for tower in (tiny_clip, tiny_siglip):
        out = export_open_clip(tower, tmp_path / tower.name)
        _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
        ours = AutoImageProcessor.from_pretrained(tower, backend="pil")(image, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(preprocess(image), ours, atol=0.02, rtol=0)


def test_an_imported_checkpoint_goes_back_to_the_same_bytes(tmp_path: Path):
    """open_clip -> Hugging Face -> open_clip, under open_clip's own name and with its own tokenizer."""
    import open_clip

    from dcr_mllm.open_clip_import import import_open_clip

    config = {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    for name, value in (("there-and-back", config), ("there-and-not-back", {**config, "quick_gelu": False})):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    torch.manual_seed(0)
    state = {k: v + 0.05 for k, v in open_clip.create_model("there-and-back").state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    tower = import_open_clip("there-and-back", tmp_path / "weights.safetensors", tmp_path / "tower")
    out = export_open_clip(tower, tmp_path / "out", "there-and-back")
    back = load_file(out / WEIGHT_FILE)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    open_clip.create_model("there-and-back", pretrained=str(out / WEIGHT_FILE))
    assert "hf_tokenizer_name" not in json.loads((out / CONFIG_FILE).read_text())["model_cfg"]["text_cfg"]
    derived = json.loads((export_open_clip(tower, tmp_path / "free") / CONFIG_FILE).read_text())
    assert derived["model_cfg"] == config
    with pytest.raises(UserError, match="differs from .*with -quickgelu or without"):
        export_open_clip(tower, tmp_path / "no", "there-and-not-back")


def test_what_open_clip_has_not_is_named(tiny_timm: None, tiny_clip: Path, tiny_siglip: Path, tmp_path: Path):
    silu, gelu = {"hidden_act": "silu"}, {"hidden_act": "gelu"}
    shapes = "does not fit open_clip's ViT-B-32: ln_final.bias is (32,) in the tower and (512,) there"
    cases = [
        (edited(tiny_clip, tmp_path / "a", vision_config=silu), None, "vision_config.hidden_act 'silu'"),
        (edited(tiny_clip, tmp_path / "b", text_config=gelu), None, "quick_gelu on both sides or on none"),
        (
            edited(tiny_siglip, tmp_path / "c", vision_config={"num_attention_heads": 4}),
            None,
            "timm has no SigLIP of 32",
        ),
        (edited(tiny_siglip, tmp_path / "d", vision_config={"layer_norm_eps": 1e-5}), None, "layer_norm_eps"),
        (tiny_clip, "ViT-Q", "knows no architecture 'ViT-Q'"),
        (tiny_clip, "ViT-B-32", shapes),
    ]
    for tower, architecture, words in cases:
        with pytest.raises(UserError) as error:
            export_open_clip(tower, tmp_path / "out", architecture)
        assert words in str(error.value)
        assert not (tmp_path / "out").exists()
    odd = shutil.copytree(tiny_clip, tmp_path / "odd")
    state = load_file(odd / "model.safetensors")
    state["vision_model.encoder.layers.0.layer_scale1.weight"] = torch.zeros(3)
    save_file(state, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.0\.layer_scale1\.weight, which open_clip's towers have not"):
        export_open_clip(odd, tmp_path / "out")


def test_a_tower_in_several_types_keeps_them(tmp_path: Path):
    """As stage 1 exports it: trained layers in fp32, all others in the base's fp16."""
    tower = save_tiny_clip(tmp_path / "tower")
    state = load_file(tower / "model.safetensors")
    state = {name: value if ".layers." in name else value.half() for name, value in state.items()}
    save_file(state, tower / "model.safetensors", metadata={"format": "pt"})
    stored = load_file(export_open_clip(tower, tmp_path / "out") / WEIGHT_FILE)
    assert stored["visual.proj"].dtype == torch.float16
    assert stored["visual.transformer.resblocks.0.attn.in_proj_weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("image", "patch", "width", "layers", "heads", "inner", "expected"),
    [
        (224, 14, 1152, 27, 16, 4304, "vit_so400m_patch14_siglip_224"),
        (384, 14, 1152, 27, 16, 4304, "vit_so400m_patch14_siglip_384"),
        (384, 16, 1152, 27, 16, 4304, "vit_so400m_patch16_siglip_384"),
        (224, 16, 768, 12, 12, 3072, "vit_base_patch16_siglip_224"),
        (256, 32, 768, 12, 12, 3072, "vit_base_patch32_siglip_256"),
        (384, 16, 1024, 24, 16, 4096, "vit_large_patch16_siglip_384"),
    ],
)
def test_real_siglips_are_found_in_timm_by_their_shapes(
    tmp_path: Path, image: int, patch: int, width: int, layers: int, heads: int, inner: int, expected: str
):
    from transformers import SiglipConfig, SiglipModel

    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }
    config = SiglipConfig(text_config=sizes, vision_config={**sizes, "image_size": image, "patch_size": patch})
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        state = to_open_clip(SiglipModel(config).state_dict(), "siglip")
    found = tower_config(tmp_path, {name: tuple(value.shape) for name, value in state.items()})
    assert found["vision_cfg"]["timm_model_name"] == expected


@pytest.mark.parametrize("name", ["ViT-L-14-336-quickgelu", "ViT-L-14", "ViT-H-14-quickgelu", "ViT-B-32-quickgelu"])
def test_real_clips_are_described_as_open_clip_does(tmp_path: Path, name: str):
    """The OpenAI and MetaCLIP towers, from the config that their Hugging Face repositories have."""
    import open_clip
    from transformers import CLIPConfig

    theirs = open_clip.get_model_config(name)
    vision, text = theirs["vision_cfg"], theirs["text_cfg"]
    activation = {"hidden_act": "quick_gelu" if theirs.get("quick_gelu") else "gelu"}
    head = vision.get("head_width", 64)
    CLIPConfig(
        projection_dim=theirs["embed_dim"],
        vision_config={
            **activation, "hidden_size": vision["width"], "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"], "num_attention_heads": vision["width"] // head,
            "image_size": vision["image_size"], "patch_size": vision["patch_size"],
        },
        text_config={
            **activation, "hidden_size": text["width"], "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"], "num_attention_heads": text["heads"], "eos_token_id": 2,
        },
    ).save_pretrained(tmp_path)  # fmt: skip
    vision["head_width"] = head
    assert tower_config(tmp_path, {}) == theirs


@pytest.mark.parametrize(("width", "inner"), [(1152, 4304), (1664, 8192), (768, 3072), (32, 64), (1280, 5120)])
def test_the_ratio_gives_the_inner_width_back(width: int, inner: int):
    assert int(width * _ratio(width, inner)) == inner
