"""The projector on disk: a round trip, and the ways in which a directory can be wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dcr_mllm.errors import UserError
from stage1_dcr.projector import Projector


def make() -> Projector:
    torch.manual_seed(0)
    return Projector(12, 20, hidden_width=16, denoiser_hash="abc")


def test_is_the_published_stack():
    projector = make()
    stack = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 20))
    for ours, theirs in zip(projector.parameters(), stack.parameters(), strict=True):
        theirs.data.copy_(ours)
    x = torch.randn(3, 12)
    assert torch.equal(projector(x), stack(x))
    assert Projector(8, 4).up.out_features == 1024


def test_round_trip(tmp_path):
    projector = make()
    projector.save(tmp_path / "projector")
    assert json.loads((tmp_path / "projector" / "config.json").read_text()) == {
        "input_width": 12,
        "hidden_width": 16,
        "output_width": 20,
        "denoiser_hash": "abc",
    }
    loaded = Projector.load(tmp_path / "projector")
    assert loaded.config() == projector.config()
    for name, value in projector.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_saves_fp32_whatever_it_was_trained_in(tmp_path):
    make().bfloat16().save(tmp_path)
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "model.safetensors").values())


def test_gathered_weights_can_be_given_and_emptied_ones_are_refused(tmp_path):
    source, shell = make(), make()
    gathered = {name: value.clone() for name, value in source.state_dict().items()}
    for parameter in shell.parameters():
        parameter.data = torch.empty(0)
    with pytest.raises(ValueError, match="up.weight"):
        shell.save(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    shell.save(tmp_path, state_dict=gathered)
    assert torch.equal(Projector.load(tmp_path).up.weight, source.up.weight)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(tmp_path, name):
    make().save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=name):
        Projector.load(tmp_path)


def test_loading_is_strict(tmp_path):
    make().save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for change in ({"extra": torch.zeros(1)}, {"up.bias": None}, {"out.bias": torch.zeros(3)}):
        changed = {name: value for name, value in {**weights, **change}.items() if value is not None}
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=next(iter(change))):
            Projector.load(tmp_path)


def test_config_of_something_else(tmp_path):
    make().save(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="input_width"):
        Projector.load(tmp_path)
