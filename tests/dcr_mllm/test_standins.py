"""Every tower that users bring, in the layout of its hub repository: headers and loader agree, nothing is made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dcr_mllm.errors import UserError
from dcr_mllm.headers import read_weights, tower_summary
from dcr_mllm.llava_headers import vision_summary
from dcr_mllm.to_safetensors import convert
from dcr_mllm.towers import (
    add_lora,
    export_tower,
    image_statistics,
    load_full_model,
    lora_config,
    merged_tensors,
    vision_tensors,
    vision_tower,
)
from tests.standins import TOWERS, save_naflex, save_tower, write_json

PICKLED = "openai/clip-vit-large-patch14-336"


@pytest.fixture(scope="module")
def standins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("standins")
    return {hub_id: save_tower(hub_id, root / hub_id) for hub_id in TOWERS if hub_id != PICKLED}


@pytest.fixture(params=[hub_id for hub_id in TOWERS if hub_id != PICKLED])
def tower(request: pytest.FixtureRequest, standins: dict[str, Path]) -> Path:
    return standins[request.param]


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files, without the indices that once were stored with them."""
    state: dict[str, torch.Tensor] = {}
    for file in directory.glob("model*.safetensors"):
        state |= load_file(file)
    return {name: value for name, value in state.items() if not name.endswith("position_ids")}


def test_headers_and_loader_agree(tower: Path):
    from transformers import AutoImageProcessor, AutoTokenizer

    summary, model = tower_summary(tower), load_full_model(tower)
    config = model.config
    assert (summary.model_type, summary.has_text_side) == (config.model_type, True)
    vision = config.vision_config
    read = (summary.image_size, summary.patch_size, summary.num_layers, summary.hidden_size)
    assert read == (vision.image_size, vision.patch_size, vision.num_hidden_layers, vision.hidden_size)
    processor = AutoImageProcessor.from_pretrained(tower, backend="pil")
    assert (summary.image_mean, summary.image_std) == (tuple(processor.image_mean), tuple(processor.image_std))
    pixels = processor(Image.new("RGB", (90, 60)), return_tensors="pt").pixel_values
    assert pixels.shape[-2:] == (summary.image_size, summary.image_size)
    assert vision_tower(model)(pixels).shape == (1, summary.width)
    assert len(AutoTokenizer.from_pretrained(tower)) == config.text_config.vocab_size


def test_every_stored_number_arrives(tower: Path):
    state = {name: value for name, value in load_full_model(tower).state_dict().items() if "position_ids" not in name}
    file = stored(tower)
    assert set(state) == set(file)
    assert all(torch.equal(state[name], file[name]) for name in file)


def test_texts_are_told_apart(tower: Path):
    """A wrong end token would read the same position of every text: one embedding for all of them."""
    from dcr_mllm.evaluation.features import DualEncoder

    encoder = DualEncoder(tower_summary(tower), device="cpu")
    first, second, again = encoder.embed_texts(["a photo of a cat", "a photo of a dog", "a photo of a cat"])
    assert abs(first - second).max() > 1e-3 and (first == again).all()
    if encoder.kind.lower_case:  # whatever the tokenizer does
        assert abs(encoder.embed_texts(["A photo of a CAT"])[0] - first).max() < 1e-6


def test_lora_reaches_the_blocks_and_only_them(tower: Path):
    statistics = image_statistics(tower)
    module = add_lora(vision_tower(load_full_model(tower)), lora_config(2, 2, 0.0))
    for name, parameter in module.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    module(torch.randn(2, 3, statistics.size, statistics.size)).square().sum().backward()
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 6 * 2
    assert all(name.startswith("vision_model.encoder.layers.") for name in trained)
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_export_keeps_layout_and_bytes(tower: Path, tmp_path: Path):
    """Same files, same tensors in the same shards; whatever was not trained is the base's, indices included."""
    import dataclasses

    module = add_lora(vision_tower(load_full_model(tower)), lora_config(2, 2, 0.0))
    torch.manual_seed(0)
    weights = {name: torch.randn_like(p) for name, p in module.named_parameters() if p.requires_grad}
    out = tmp_path / "out"
    out.mkdir()
    changed = merged_tensors(tower, lora_config(2, 2, 0.0), weights, tmp_path / "adapter")
    export_tower(tower, changed, out)
    for source in tower.glob("model*.safetensors"):
        old, new = load_file(source), load_file(out / source.name)
        assert set(old) == set(new)
        same = {name for name in old if old[name].dtype == new[name].dtype and torch.equal(old[name], new[name])}
        assert set(old) - same == set(changed) & set(old)
    copied = {file.name for file in tower.iterdir()} - {"config.json"}
    for name in copied:
        if not name.endswith((".safetensors", ".bin")):
            assert (out / name).read_bytes() == (tower / name).read_bytes()
    assert not list(out.glob("*.bin")) and not (out / "open_clip_model.safetensors").exists()
    exported = vision_tensors(out)
    assert torch.equal(exported["post_layernorm.weight"], vision_tensors(tower)["post_layernorm.weight"])
    assert torch.equal(
        exported["encoder.layers.0.mlp.fc1.weight"], changed["vision_model.encoder.layers.0.mlp.fc1.weight"]
    )
    assert tower_summary(out) == dataclasses.replace(tower_summary(tower), path=out)
    assert vision_summary(out).tensors.keys() == vision_summary(tower).tensors.keys()


def test_sharded_towers_are_read_over_all_shards(standins: dict[str, Path]):
    tower = standins["apple/DFN5B-CLIP-ViT-H-14-378"]
    assert (tower / "model.safetensors.index.json").is_file() and not (tower / "model.safetensors").exists()
    assert len(read_weights(tower)) == len(stored(tower))


def test_the_pickled_repository_is_refused_with_the_command_that_converts_it(tmp_path: Path):
    tower = save_tower(PICKLED, tmp_path / "clip")
    with pytest.raises(UserError, match=r"only as pytorch_model.bin.*dcr-mllm to-safetensors .*clip OUT"):
        tower_summary(tower)
    convert(tower, tmp_path / "out")
    old, new = torch.load(tower / "pytorch_model.bin", weights_only=True), stored(tmp_path / "out")
    assert tower_summary(tmp_path / "out").image_size == 112
    assert not old["visual_projection.weight"].is_contiguous()
    assert all(torch.equal(old[name], value) for name, value in new.items())


def test_a_tower_of_the_fp16_variant_alone_is_refused(tmp_path: Path):
    tower = save_tower("google/siglip2-base-patch16-224", tmp_path / "tower")
    (tower / "model.safetensors").rename(tower / "model.fp16.safetensors")
    with pytest.raises(UserError, match=r"rename model.fp16.safetensors to model.safetensors"):
        tower_summary(tower)


def test_naflex_is_refused_in_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="NaFlex.*take SigLIP 2 of a fixed resolution") as caught:
        tower_summary(save_naflex(tmp_path))
    assert "\n" not in str(caught.value)


def test_open_clip_layout_is_refused_with_the_command_that_converts_it(tmp_path: Path):
    write_json(tmp_path / "open_clip_config.json", {"model_cfg": {}})
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="dcr-mllm import-open-clip"):
        tower_summary(tmp_path)


@pytest.mark.parametrize("hub_id", ["openai/clip-vit-large-patch14", "google/siglip-so400m-patch14-384"])
def test_processor_of_another_size_is_refused(hub_id: str, tmp_path: Path):
    tower = save_tower(hub_id, tmp_path / "tower")
    file = tower / "preprocessor_config.json"
    data = json.loads(file.read_text())
    key = "crop_size" if "crop_size" in data else "size"
    data[key] = 64 if isinstance(data[key], int) else {"height": 64, "width": 64}
    write_json(file, data)
    with pytest.raises(UserError, match="makes pictures of 64 pixels.*image_size"):
        tower_summary(tower)


def test_siglip_without_its_pooling_head_is_refused(tmp_path: Path):
    """Some published copies drop the head; `pooler_output` would be None in the first step."""
    from safetensors.torch import save_file

    tower = save_tower("google/siglip-so400m-patch14-224", tmp_path / "tower")
    state = load_file(tower / "model.safetensors")
    save_file({name: value for name, value in state.items() if ".head." not in name}, tower / "model.safetensors")
    with pytest.raises(UserError, match="lacks tensor vision_model.head"):
        tower_summary(tower)
