"""Mini-POPE has POPE's layout and proportions, its answers are right, and its splits are apart."""

from __future__ import annotations

import collections
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcr_mllm.mini import groups
from dcr_mllm.mini.world import COLOURS


@pytest.fixture(scope="module")
def pope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pope") / "pope"
    groups.write_pope(directory, "test", num_images=40, seed=3)
    return directory


def read(pope: Path, category: str) -> list[dict]:
    return [json.loads(line) for line in (pope / f"coco_pope_{category}.json").read_text().splitlines()]


def named(record: dict) -> tuple[str, str]:
    match = re.fullmatch(r"Is there (an?) (\w+) (\w+) in the image\?", record["text"])
    assert match and (match[1] == "an") == (match[2] == "orange")
    return match[2], match[3]


def colours_in(image: Image.Image) -> set[str]:
    """Colours of the world that a picture shows, by its pixels alone."""
    pixels = np.asarray(image, dtype=float).reshape(-1, 3)
    found = set()
    for name, value in COLOURS.items():
        near = np.abs(pixels - np.array(value)).max(axis=1) <= 15
        if near.sum() >= 25:
            found.add(name)
    return found


def test_six_questions_an_image_and_category(pope: Path):
    files = {category: read(pope, category) for category in groups.CATEGORIES}
    present: dict[str, set] = collections.defaultdict(set)
    for records in files.values():
        assert len(records) == 240
        assert [record["label"] for record in records] == ["yes", "no"] * 120
        assert [record["question_id"] for record in records] == list(range(1, 241))
        by_image = collections.Counter(record["image"] for record in records)
        assert set(by_image.values()) == {6}
        for record in records:
            if record["label"] == "yes":
                present[record["image"]].add(named(record))
    # The positive questions are the same in all categories.
    assert {len(labels) for labels in present.values()} == {3}
    for category, records in files.items():
        for record in records:
            assert (named(record) in present[record["image"]]) == (record["label"] == "yes")
        per_image = collections.Counter((record["image"], record["text"]) for record in records)
        assert max(per_image.values()) == 1, category


def test_negatives_are_of_their_category(pope: Path):
    present = collections.defaultdict(set)
    wrong = {category: collections.defaultdict(set) for category in groups.CATEGORIES}
    for category in groups.CATEGORIES:
        for record in read(pope, category):
            (present if record["label"] == "yes" else wrong[category])[record["image"]].add(named(record))
    frequency = collections.Counter(label for labels in present.values() for label in labels)

    def share_similar(category: str) -> float:
        hits = [
            any(label[0] == other[0] or label[1] == other[1] for other in present[image])
            for image, labels in wrong[category].items()
            for label in labels
        ]
        return float(np.mean(hits))

    assert share_similar("adversarial") == 1 and share_similar("random") < 0.8
    for image, labels in wrong["popular"].items():
        absent = {label: count for label, count in frequency.items() if label not in present[image]}
        third = sorted(absent.values(), reverse=True)[2]
        assert all(frequency[label] >= third for label in labels)


def test_pictures_show_their_objects(pope: Path):
    """By colour, which pixels tell: every named colour is there, and no other one."""
    present = collections.defaultdict(set)
    for record in read(pope, "random"):
        if record["label"] == "yes":
            present[record["image"]].add(named(record)[0])
    right = [colours_in(Image.open(pope / "val2014" / image)) == colours for image, colours in present.items()]
    assert np.mean(right) > 0.9  # thin shapes blur into the ground


def test_splits_share_no_group():
    rng = np.random.default_rng(0)
    seen = {
        split: {frozenset(groups.random_group(rng, split, 2).labels) for _ in range(300)}
        for split in ("train", "validation", "test")
    }
    assert (
        not seen["train"] & seen["test"]
        and not seen["train"] & seen["validation"]
        and not seen["test"] & seen["validation"]
    )
    group = groups.random_group(rng, "test", 4)
    moved = groups.Group(quarters=group.quarters[::-1], ground="teal", jitter=1)
    assert groups.group_split(moved) == "test" and len(set(group.labels)) == 4


def test_drawing_is_deterministic_and_jitter_only_moves():
    rng = np.random.default_rng(1)
    group = groups.random_group(rng, "train", 3)
    first, again = groups.draw_group(group), groups.draw_group(group)
    assert first.tobytes() == again.tobytes() and first.size == (48, 48)
    other = groups.draw_group(groups.Group(quarters=group.quarters, ground=group.ground, jitter=group.jitter + 1))
    assert other.tobytes() != first.tobytes()
    empty = groups.draw_group(groups.Group(quarters=(None,) * 4, ground="light", jitter=0))
    assert len(set(empty.getdata())) == 1
