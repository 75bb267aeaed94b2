"""The tower of a LLaVA is found by its provenance and accepted by its tensors only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.llava_tower import tower_of
from stage2_llava.swap import swap
from tests.tiny_models import save_tiny_clip


@pytest.fixture(autouse=True)
def no_runs_here(monkeypatch, tmp_path: Path):
    """A checkout may have a tower where these tests record one."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def llava(tiny_llava: Path, tmp_path: Path) -> Path:
    """A copy deep below the folder where its training ran."""
    return Path(shutil.copytree(tiny_llava, tmp_path / "work" / "runs" / "arm" / "llava"))


@pytest.fixture
def tower(tiny_clip: Path, tmp_path: Path) -> Path:
    """A copy of the tower in it."""
    return Path(shutil.copytree(tiny_clip, tmp_path / "work" / "runs" / "mini" / "tower"))


def record(directory: Path, **content: object) -> None:
    (directory / "provenance.json").write_text(json.dumps(content))


def test_a_tower_is_itself_and_has_to_be_whole(tiny_siglip: Path, tmp_path: Path):
    assert tower_of(tiny_siglip) == tiny_siglip
    vision = Path(shutil.copytree(tiny_siglip, tmp_path / "vision"))
    state = load_file(vision / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.startswith("text_model.")}
    save_file(kept, vision / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no text side"):
        tower_of(vision)


def test_recorded_towers_are_found(llava: Path, tower: Path, monkeypatch, tmp_path: Path):
    record(llava, tower={"path": str(tower)})
    assert tower_of(llava) == tower
    # Relative to a folder above the LLaVA, wherever the command runs, or to the working directory.
    record(llava, tower={"path": "runs/mini/tower"})
    assert tower_of(llava).samefile(tower)
    outside = Path(shutil.copytree(llava, tmp_path / "elsewhere" / "llava"))
    with pytest.raises(UserError, match="its tower is not on record; name the whole tower"):
        tower_of(outside)
    monkeypatch.chdir(tmp_path / "work")
    assert tower_of(outside).samefile(tower)


def test_a_merged_llava_leads_to_its_base_and_a_recipe_to_all_its_towers(llava: Path, tower: Path):
    aligned = llava.parent / "aligned"
    aligned.mkdir()
    shutil.copy(llava / "config.json", aligned)
    record(aligned, tower={"path": str(tower)})
    record(llava, base={"path": "runs/arm/aligned"}, merged_adapter={"path": "gone"})
    assert tower_of(llava) == tower
    shutil.rmtree(aligned)
    record(llava, base={"path": "runs/arm/aligned"}, config={"towers": {"a": "mini", "b": "runs/mini/tower"}})
    assert tower_of(llava).samefile(tower)  # and not the shipped one of the arm `a`


def test_a_swapped_tower_is_found(llava: Path, tmp_path: Path):
    other = save_tiny_clip(tmp_path / "other", seed=7)
    assert tower_of(swap(llava, other, tmp_path / "swapped")) == other
    assert tower_of(swap(llava, other, tmp_path / "legacy", legacy_keys=True)) == other


def test_a_cast_tower_is_the_same_and_a_changed_one_is_not(llava: Path, tower: Path):
    record(llava, tower={"path": str(tower)})
    state = load_file(llava / "model.safetensors")
    half = {name: value.bfloat16() for name, value in state.items()}
    save_file(half, llava / "model.safetensors", metadata={"format": "pt"})
    assert tower_of(llava) == tower
    trained = load_file(tower / "model.safetensors")
    name = "vision_model.encoder.layers.1.mlp.fc1.bias"
    save_file({**trained, name: trained[name] + 0.1}, tower / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"the tower in it differs from {tower}; name the whole tower"):
        tower_of(llava)


def test_a_tower_with_more_layers_is_another(llava: Path, tower: Path):
    record(llava, tower={"path": str(tower)})
    state = load_file(tower / "model.safetensors")
    more = {
        name.replace("layers.2.", "layers.3."): value.clone() for name, value in state.items() if "layers.2." in name
    }
    save_file({**state, **more}, tower / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the tower in it differs"):
        tower_of(llava)


def test_tensors_that_llava_never_reads_may_be_missing(llava: Path, tower: Path):
    record(llava, tower={"path": str(tower)})
    state = load_file(llava / "model.safetensors")
    kept = {name: value for name, value in state.items() if "post_layernorm" not in name}
    assert len(kept) < len(state)
    save_file(kept, llava / "model.safetensors", metadata={"format": "pt"})
    assert tower_of(llava) == tower
    first = next(name for name in kept if "vision_tower" in name and "layers.0" in name)
    kept[first] = torch.zeros(3)
    save_file(kept, llava / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the tower in it differs"):
        tower_of(llava)
