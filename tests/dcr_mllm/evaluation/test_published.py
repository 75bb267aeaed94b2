"""Published numbers appear only beside what was measured on the same backbone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dcr_mllm.evaluation import published
from dcr_mllm.evaluation.published import backbone_of, published_rows


def directory(path: Path, provenance: dict | None = None) -> Path:
    path.mkdir(parents=True)
    if provenance is not None:
        (path / "provenance.json").write_text(json.dumps(provenance))
    return path


def test_backbone_is_followed_through_provenance(tmp_path: Path):
    original = directory(tmp_path / "hub" / "models--openai--clip-vit-large-patch14-336" / "snapshots" / "abc")
    first = directory(tmp_path / "runs" / "a" / "tower", {"base_tower": {"path": str(original), "sha256": "0"}})
    second = directory(tmp_path / "runs" / "b" / "tower", {"base_tower": {"path": str(first), "sha256": "0"}})
    config = {"towers": {"baseline": "openai/clip-vit-large-patch14-336", "enhanced": str(second)}}
    llavas = {
        arm: directory(tmp_path / "stage2" / arm / "llava", {"config": {**config, "llm": "lmsys/vicuna-7b-v1.5"}})
        for arm in ("baseline", "enhanced")
    }
    for llava in llavas.values():
        assert backbone_of(llava) == ("openai-l14-336", "vicuna-7b")
    assert backbone_of(second) == ("openai-l14-336", None)
    assert backbone_of(directory(tmp_path / "clip-vit-large-patch14")) == ("openai-l14-224", None)
    assert backbone_of(directory(tmp_path / "mini")) == (None, None)


def test_rows_are_those_of_the_source():
    measured = {"mmvp": {"pair_accuracy": 20.0, "accuracy": 55.0}, "pope": {"f1": 80.0, "f1_random": 81.0}}
    rows = published_rows(("openai-l14-336", "vicuna-7b"), measured)
    found = {(row["task"], row["measure"], row["method"]): row["value"] for row in rows}
    assert found[("mmvp", "pair_accuracy", "genhancer")] == 30.7
    assert found[("mmvp", "pair_accuracy", "dcr")] == 31.3
    assert found[("mmvp", "accuracy", "original")] == 60.0
    assert found[("pope", "f1_random", "original")] == 87.3
    assert found[("pope", "f1", "LLaVA-1.5 7b full")] == 85.9
    assert ("pope", "f1", "LLaVA-1.5 13b full") not in found and all(row["source"] for row in rows)
    assert {row["ours"] for row in rows if row["measure"] == "f1"} == {80.0}
    tower = published_rows(("siglip-so400m-224", None), {"mmvp_vlm": {"pair_accuracy": 30.0}})
    assert {row["method"]: row["value"] for row in tower}["dcr"] == 43.0
    assert not published_rows((None, "vicuna-7b"), measured)
    assert not published_rows(("openai-l14-224", "vicuna-7b"), measured)  # not the tower of LLaVA-1.5


def test_the_package_has_the_numbers():
    content = yaml.safe_load((Path(published.__file__).parent / "published.yaml").read_text())
    assert content["schema_version"] == 1
    columns = {column for entry in content["mllm_llava15"] for column in entry.get("columns", ())}
    assert set(published._COLUMNS) & columns >= {"mmvp", "pope_random", "scienceqa_img", "cvbench3d"}


@pytest.mark.parametrize("path", ["/a/vicuna-13b-v1.5", "lmsys/vicuna-13b-v1.5"])
def test_llm_by_name(path: str):
    assert published._published_llm(path) == "vicuna-13b"
    assert published._published_llm("HuggingFaceTB/SmolLM2") is None
