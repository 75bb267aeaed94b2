"""The drawn world and its data sets, and that the miniature's weights can be built."""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dcr_mllm.mini import data, world

PACKAGED = Path(world.__file__).parent / "weights"


def test_same_scene_same_pixels():
    scene = world.random_scene(np.random.default_rng(3))
    assert np.array_equal(world.draw(scene), world.draw(scene))
    assert np.asarray(world.draw(scene)).shape == (48, 48, 3)


def test_splits_are_disjoint_and_have_their_shares():
    rng = np.random.default_rng(0)
    splits = [world.split_of(world.random_scene(rng)) for _ in range(3000)]
    assert 0.77 < splits.count("train") / 3000 < 0.83
    contents = {split: {world.random_scene(rng, split).content() for _ in range(2000)} for split in world.SPLITS}
    assert not contents["train"] & contents["test"]
    assert not contents["train"] & contents["validation"]
    assert not contents["validation"] & contents["test"]


@pytest.mark.parametrize("attribute", world.ATTRIBUTES)
def test_every_attribute_is_visible(attribute: str):
    """Two scenes that differ in one attribute differ in their pixels by more than jitter leaves unexplained."""
    rng = np.random.default_rng(5)
    for _ in range(10):
        scene = world.random_scene(rng)
        other = world.contrast_scene(scene, attribute, rng)
        same_jitter = world.Scene(**{**vars(other), "jitter": scene.jitter})
        difference = np.abs(np.asarray(world.draw(scene), float) - np.asarray(world.draw(same_jitter), float))
        assert (difference.max(axis=-1) > 40).sum() >= 4


def test_coarse_captions_are_blind_and_full_ones_are_not():
    rng = np.random.default_rng(1)
    scenes = [world.random_scene(rng) for _ in range(2000)]
    phrases = [phrase for values in world.ATTRIBUTES.values() for phrase in values.values()]
    coarse = [world.coarse_caption(scene, rng) for scene in scenes]
    named = np.mean([any(phrase in caption for phrase in phrases) for caption in coarse])
    assert 0.12 < named < 0.18
    for scene in scenes[:50]:
        caption = world.full_caption(scene, rng)
        assert all(world.detail_phrase(scene, attribute) in caption for attribute in world.ATTRIBUTES)


def test_pair_benchmarks_have_the_public_layouts(tmp_path: Path):
    data.write_mmvp_vlm(tmp_path / "vlm", "test", 15)
    with (tmp_path / "vlm" / "Questions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["Question ID", "Type", "Statement"] and len(rows) == 2 * 9 * 15
    for row in rows:
        assert (tmp_path / "vlm" / "MLLM_VLM Images" / row["Type"] / f"{row['Question ID']}.jpg").is_file()
    assert all(
        a["Type"] == b["Type"] and a["Statement"] != b["Statement"] for a, b in zip(rows[::2], rows[1::2], strict=True)
    )

    data.write_mmvp(tmp_path / "mllm", "test", 15)
    with (tmp_path / "mllm" / "Questions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["Index", "Question", "Options", "Correct Answer", "Pattern"] and len(rows) == 300 - 30
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["Options"] == second["Options"]
        assert {first["Correct Answer"], second["Correct Answer"]} == {"(a)", "(b)"}
    first_options = [row["Correct Answer"] for row in rows[::2]]
    assert 0.35 < first_options.count("(a)") / len(first_options) < 0.65


def test_labelled_set_takes_its_test_part_from_the_split(tmp_path: Path):
    data.write_labelled(tmp_path, "validation", num_train=30, num_test=30)
    with (tmp_path / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows].count("test") == 30
    classes = json.loads((tmp_path / "classes.json").read_text())["classes"]
    assert len(classes) == 96 and all(row["class"] in classes for row in rows)


def test_captioned_images_are_all_different_and_told_in_part_by_two_captions(tmp_path: Path):
    data.write_captioned(tmp_path / "first", "test", num_images=40)
    data.write_captioned(tmp_path / "again", "test", num_images=40)
    rows = json.loads((tmp_path / "first" / "captions.json").read_text())
    assert rows == json.loads((tmp_path / "again" / "captions.json").read_text())
    images = [(tmp_path / "first" / row["image"]).read_bytes() for row in rows]
    assert len(set(images)) == 40 and images[9] == (tmp_path / "again" / rows[9]["image"]).read_bytes()
    phrases = {phrase: name for name, values in world.ATTRIBUTES.items() for phrase in values.values()}
    for first, second in (row["captions"] for row in rows):
        told = [[name for phrase, name in phrases.items() if f" {phrase}" in text] for text in (first, second)]
        # `with a spot` is no part of `without a spot`, but `glowing` is of `not glowing`.
        assert [len(set(names)) for names in told] == [4, 4] and not set(told[0]) & set(told[1])
        assert first.split()[:3] == second.split()[:3]


def test_training_shards_are_drawn_once(tmp_path: Path):
    pattern = data.write_training_shards(tmp_path / "shards", num_images=20, num_shards=4)
    assert pattern.endswith("{00000..00003}.tar")
    shard = tmp_path / "shards" / "00000.tar"
    with tarfile.open(shard) as archive:
        assert len(archive.getnames()) == 5
    before = shard.stat().st_mtime_ns
    data.write_training_shards(tmp_path / "shards", num_images=20, num_shards=4)
    assert shard.stat().st_mtime_ns == before


def test_build_from_nothing(tmp_path: Path):
    """A few steps of everything: layouts load, losses fall, the card says what was done."""
    from dcr_mllm.denoiser_headers import denoiser_summary
    from dcr_mllm.headers import tower_summary
    from dcr_mllm.mini import build

    build.build_tower(tmp_path, steps=40, detail_steps=10)
    build.build_denoiser(tmp_path, vae_steps=15, unet_steps=15)
    card = build.write_card(tmp_path)
    assert tower_summary(tmp_path / "tower").model_type == "clip"
    assert denoiser_summary(tmp_path / "denoiser").cross_attention_dim == 128
    assert card["steps"] == {"clip": 50, "vae": 15, "unet": 15}
    assert card["quality"]["zero_shot"] > 100 / 96
    assert card["quality"]["error_own"] < 1.0
    assert (tmp_path / "samples.png").is_file() and (tmp_path / "README.md").is_file()


@pytest.mark.skipif(not PACKAGED.is_dir(), reason="the packaged weights are not there")
def test_packaged_weights_are_what_their_card_says():
    from dcr_mllm.mini.build import tower_quality
    from dcr_mllm.runs import hash_directory

    card = json.loads((PACKAGED / "card.json").read_text())
    for part in ("tower", "denoiser"):
        assert hash_directory(PACKAGED / part) == card["hashes"][part]
    assert sum(file.stat().st_size for file in PACKAGED.rglob("*") if file.is_file()) < 12 * 2**20
    assert abs(tower_quality(PACKAGED / "tower")["zero_shot"] - card["quality"]["zero_shot"]) < 0.5
