"""Directories with pickled weights: converted tensor by tensor, and read by the libraries without them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from dcr_mllm.errors import UserError
from dcr_mllm.headers import read_weights, tower_summary
from dcr_mllm.to_safetensors import convert, main


def as_pickles(source: Path, target: Path, num_shards: int) -> dict[str, torch.Tensor]:
    """The directory as older repositories have it; returns its tensors."""
    from safetensors.torch import load_file

    target.mkdir()
    state = load_file(source / "model.safetensors")
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    names = sorted(state)
    if num_shards == 1:
        torch.save(state, target / "pytorch_model.bin")
        return state
    weight_map = {}
    for shard in range(num_shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{num_shards:05d}.bin"
        chosen = names[shard::num_shards]
        weight_map.update(dict.fromkeys(chosen, file))
        torch.save({name: state[name] for name in chosen}, target / file)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return state


@pytest.mark.parametrize("num_shards", [1, 3])
def test_transformers_reads_the_same_tensors(tiny_clip: Path, tmp_path: Path, num_shards: int):
    from transformers import AutoTokenizer, CLIPModel

    state = as_pickles(tiny_clip, tmp_path / "old", num_shards)
    with pytest.raises(UserError, match="to-safetensors"):
        tower_summary(tmp_path / "old")
    assert main([str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    assert not list((tmp_path / "new").glob("*.bin*"))
    assert set(read_weights(tmp_path / "new")) == set(state)
    loaded = CLIPModel.from_pretrained(tmp_path / "new").state_dict()
    for name, value in state.items():
        assert torch.equal(loaded[name], value), name
    assert tower_summary(tmp_path / "new").has_text_side
    assert len(AutoTokenizer.from_pretrained(tmp_path / "new")) == len(AutoTokenizer.from_pretrained(tiny_clip))


def test_sub_folders_shared_memory_and_strides(tmp_path: Path):
    unet = tmp_path / "old" / "unet"
    unet.mkdir(parents=True)
    weight = torch.randn(4, 3)
    state = {"a": weight, "tied": weight, "turned": weight.t(), "part": weight[1:3]}
    torch.save(state, unet / "diffusion_pytorch_model.bin")
    assert convert(tmp_path / "old", tmp_path / "new") == [Path("unet/diffusion_pytorch_model.bin")]
    from safetensors.torch import load_file

    found = load_file(tmp_path / "new" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in state.items()) and len(found) == 4


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def test_nothing_is_run_and_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights as .bin"):
        convert(tmp_path / "old", tmp_path / "new")
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Hostile()}))
    with pytest.raises(UserError, match="cannot be read as plain tensors"):
        convert(tmp_path / "old", tmp_path / "new")
    torch.save({"model": {"a": torch.ones(1)}, "step": 3}, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(UserError, match="more than named tensors"):
        convert(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists() and not (tmp_path / "pwned").exists()
