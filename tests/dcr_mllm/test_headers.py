"""Model directories read from headers: right numbers, and one clear sentence for everything that is not whole."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from dcr_mllm.denoiser_headers import denoiser_summary
from dcr_mllm.errors import UserError
from dcr_mllm.headers import read_safetensors_header, read_weights, resolve_weights, tower_summary, weight_file
from tests.fake_models import (
    OPENAI_MEAN,
    tower_tensors,
    write_denoiser,
    write_json,
    write_safetensors,
    write_tower,
)


def edit(path: Path, **changes: object) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def test_reads_shapes_and_types(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"x": (2, 3), "scalar": ()})
    header = read_safetensors_header(tmp_path / "a.safetensors")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in header.items()} == {
        "x": ("F16", (2, 3)),
        "scalar": ("F16", ()),
    }


def test_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    numpy, library = pytest.importorskip("numpy"), pytest.importorskip("safetensors.numpy")
    arrays = {
        "a": numpy.zeros((3, 5), "float32"),
        "b": numpy.zeros(7, "int64"),
        "empty": numpy.zeros((0, 4), "float16"),
    }
    library.save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "pt"})
    header = read_safetensors_header(tmp_path / "a.safetensors")
    assert {name: tensor.shape for name, tensor in header.items()} == {
        name: array.shape for name, array in arrays.items()
    }
    assert {name: tensor.dtype for name, tensor in header.items()} == {"a": "F32", "b": "I64", "empty": "F16"}


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {"x": (20, 30)})
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match="model.safetensors is incomplete"):
        read_safetensors_header(file)


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\n", b"\x05\0\0\0\0\0\0\0[1,2]", b"\x02\0\0\0\0\0\0\0x{"]
)
def test_something_else_than_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a safetensors file"):
        read_safetensors_header(tmp_path / "model.safetensors")


def test_shape_that_contradicts_the_offsets(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {"x": (2, 3)})
    file.write_bytes(file.read_bytes().replace(b"[2, 3]", b"[2, 9]"))
    with pytest.raises(UserError, match="tensor x"):
        read_safetensors_header(file)


def test_shards(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model-1.safetensors", {"a": (2,)})
    write_safetensors(tmp_path / "model-2.safetensors", {"b": (3,)})
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    write_json(tmp_path / "model.safetensors.index.json", index)
    assert {name: tensor.shape for name, tensor in read_weights(tmp_path).items()} == {"a": (2,), "b": (3,)}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"c": "model-2.safetensors"}})
    with pytest.raises(UserError, match="model-2.safetensors lacks tensor c"):
        read_weights(tmp_path)
    write_json(tmp_path / "model.safetensors.index.json", index)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match="model-2.safetensors is missing"):
        read_weights(tmp_path)


def test_variants(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "diffusion_pytorch_model.fp16.safetensors", {"a": (2,)})
    assert weight_file(tmp_path).name == "diffusion_pytorch_model.fp16.safetensors"
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", {"a": (2,)})
    assert weight_file(tmp_path).name == "diffusion_pytorch_model.safetensors"
    assert weight_file(tmp_path, "fp16").name == "diffusion_pytorch_model.fp16.safetensors"


def test_pickled_weights_are_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pytorch_model.bin.*dcr-mllm to-safetensors"):
        weight_file(tmp_path)


def test_clip_tower(tmp_path: Path) -> None:
    summary = tower_summary(write_tower(tmp_path / "t"))
    assert (summary.model_type, summary.image_size, summary.patch_size, summary.num_layers) == ("clip", 32, 8, 2)
    assert (summary.hidden_size, summary.width, summary.has_text_side) == (8, 6, True)
    assert summary.image_mean == tuple(OPENAI_MEAN)


def test_siglip_tower_is_as_wide_as_its_vision_side(tmp_path: Path) -> None:
    # 384 is no multiple of 14: SO400M cuts off the rest, and so must the count of its positions.
    summary = tower_summary(write_tower(tmp_path / "t", "siglip", image=30, patch=14))
    assert (summary.width, summary.image_mean, summary.image_std) == (8, (0.5,) * 3, (0.5,) * 3)


def test_processor_in_the_newer_layout(tmp_path: Path) -> None:
    tower = write_tower(tmp_path / "t")
    inner = json.loads((tower / "preprocessor_config.json").read_text())
    write_json(tower / "processor_config.json", {"image_processor": inner})
    (tower / "preprocessor_config.json").unlink()
    assert tower_summary(tower).image_mean == tuple(OPENAI_MEAN)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors", "tokenizer.json"])
def test_partial_tower_names_the_missing_file(tmp_path: Path, name: str) -> None:
    tower = write_tower(tmp_path / "t")
    (tower / name).unlink()
    with pytest.raises(UserError, match=f"{re.escape(name)} is missing"):
        tower_summary(tower)


def test_tower_without_a_layer_or_of_another_shape(tmp_path: Path) -> None:
    tower = write_tower(tmp_path / "t")
    write_safetensors(tower / "model.safetensors", tower_tensors("clip", 32, 8, 8, 1, 6))
    with pytest.raises(UserError, match=r"lacks tensor vision_model\.encoder\.layers\.1"):
        tower_summary(tower)
    write_safetensors(tower / "model.safetensors", tower_tensors("clip", 48, 8, 8, 2, 6))
    with pytest.raises(UserError, match=r"position_embedding.weight of shape \[37, 8\].*\[17, 8\]"):
        tower_summary(tower)


@pytest.mark.parametrize("model_type", ["llama", "clip_vision_model", None])
def test_other_models_are_no_towers(tmp_path: Path, model_type: str | None) -> None:
    tower = write_tower(tmp_path / "t")
    edit(tower / "config.json", model_type=model_type)
    with pytest.raises(UserError, match="expected one of clip, metaclip_2, siglip"):
        tower_summary(tower)


def test_denoiser(tmp_path: Path) -> None:
    summary = denoiser_summary(write_denoiser(tmp_path / "d", prediction_type="v_prediction"))
    assert (summary.cross_attention_dim, summary.text_width, summary.prediction_type) == (12, 12, "v_prediction")
    assert (summary.latent_channels, summary.vae_scale, summary.unet_scale, summary.variant) == (4, 4, 2, None)


@pytest.mark.parametrize("part", ["vae", "unet", "scheduler", "text_encoder", "tokenizer"])
def test_partial_denoiser_names_the_missing_part(tmp_path: Path, part: str) -> None:
    denoiser = write_denoiser(tmp_path / "d")
    shutil.rmtree(denoiser / part)
    with pytest.raises(UserError, match=f"lacks its {part}/ folder"):
        denoiser_summary(denoiser)


@pytest.mark.parametrize(
    "name",
    [
        "vae/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "text_encoder/model.safetensors",
        "tokenizer/vocab.json",
    ],
)
def test_partial_denoiser_names_the_missing_file(tmp_path: Path, name: str) -> None:
    denoiser = write_denoiser(tmp_path / "d")
    (denoiser / name).unlink()
    wanted = "tokenizer/tokenizer.json" if name.startswith("tokenizer") else name
    with pytest.raises(UserError, match=f"{re.escape(wanted)} is missing"):
        denoiser_summary(denoiser)


def test_denoiser_whose_config_contradicts_its_weights(tmp_path: Path) -> None:
    denoiser = write_denoiser(tmp_path / "d")
    edit(denoiser / "unet" / "config.json", cross_attention_dim=16)
    with pytest.raises(UserError, match="says cross_attention_dim 16.*its weights take 12"):
        denoiser_summary(denoiser)


def test_inpainting_model_is_refused(tmp_path: Path) -> None:
    denoiser = write_denoiser(tmp_path / "d")
    edit(denoiser / "unet" / "config.json", in_channels=9)
    with pytest.raises(UserError, match="takes 9 channels.*have 4"):
        denoiser_summary(denoiser)


def test_resolving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_weights(tmp_path, "tower") == tmp_path
    with pytest.raises(UserError, match="does not exist"):
        resolve_weights(str(tmp_path / "nowhere"), "tower")
    with pytest.raises(UserError, match="does not exist"):
        resolve_weights("./some/where", "denoiser")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_weights("org/name", "tower") == Path("org/name")


def test_hub_ids_come_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for repo, probe in (("tower", "config.json"), ("denoiser", "unet/config.json")):
        with pytest.raises(UserError, match=f"hf download org/{repo}"):
            resolve_weights(f"org/{repo}", repo)  # type: ignore[arg-type]
        snapshot = tmp_path / f"models--org--{repo}" / "snapshots" / ("0" * 40)
        write_json(snapshot / probe, {})
        refs = tmp_path / f"models--org--{repo}" / "refs"
        refs.mkdir()
        (refs / "main").write_text("0" * 40)
        assert resolve_weights(f"org/{repo}", repo) == snapshot  # type: ignore[arg-type]
