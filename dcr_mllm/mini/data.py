"""Data sets of the drawn world: training shards, and benchmarks in exactly the public layouts.

Pair benchmarks, MMVP and MMVP-VLM, are what the real files look like, so that the real ones drop in. A labelled set
(class and every attribute of each image) serves zero-shot, k-NN, probes and clustering.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from dcr_mllm.mini.groups import write_pope
from dcr_mllm.mini.world import (
    ATTRIBUTES,
    COLOURS,
    KINDS,
    PATTERN_NAMES,
    Scene,
    contrast_scene,
    detail_phrase,
    draw,
    random_scene,
    split_of,
    statement,
)
from dcr_mllm.runs import atomic_directory

_SPLIT_SEEDS = {"train": 11, "validation": 12, "test": 13}
_QUESTIONS = {
    "orientation": "Which way does the {} face?",
    "presence": "Does the {} have a spot?",
    "state": "Is the {} glowing?",
    "quantity": "How many stars are above the {}?",
    "position": "Where is the ball next to the {}?",
    "color": "What is the ground behind the {}?",
    "structure": "How is the body of the {}?",
    "text": "Which letter is near the {}?",
    "viewpoint": "From where is the {} seen?",
}


def _jpeg(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95, subsampling=0)


def _draw_once(directory: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder unless it is there; of several runs that want it one draws and the others wait."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.parent / f".{directory.name}.lock"):
        if not directory.is_dir():
            with atomic_directory(directory) as temporary:
                write(temporary)


def write_training_shards(directory: Path, num_images: int = 16_000, num_shards: int = 8, seed: int = 1) -> str:
    """Draw training scenes into WebDataset shards, unless they are there.

    Returns:
        The pattern that names them.
    """

    def write(temporary: Path) -> None:
        rng = np.random.default_rng(seed)
        for shard in range(num_shards):
            with tarfile.open(temporary / f"{shard:05d}.tar", "w") as archive:
                for index in range(shard, num_images, num_shards):
                    buffer = io.BytesIO()
                    draw(random_scene(rng, "train")).save(buffer, format="PNG", compress_level=1)
                    entry = tarfile.TarInfo(f"{index:09d}.png")
                    entry.size = buffer.tell()
                    buffer.seek(0)
                    archive.addfile(entry, buffer)

    _draw_once(directory, write)
    return str(directory / f"{{00000..{num_shards - 1:05d}}}.tar")


def _pairs(split: str, pairs_per_pattern: int, seed: int) -> list[tuple[str, Scene, Scene]]:
    """Pairs of scenes that differ in one attribute (and in jitter): (attribute, first, second)."""
    rng = np.random.default_rng(1000 * _SPLIT_SEEDS[split] + seed)
    pairs = []
    for attribute in ATTRIBUTES:
        for _ in range(pairs_per_pattern):
            first = random_scene(rng, split)
            while True:
                second = contrast_scene(first, attribute, rng)
                if split_of(second) == split:
                    break
                first = random_scene(rng, split)
            pairs.append((attribute, first, second))
    return pairs


def write_mmvp_vlm(directory: Path, split: str, pairs_per_pattern: int, seed: int = 0) -> None:
    """Draw mini-MMVP-VLM: `Questions.csv` (Question ID, Type, Statement) and `MLLM_VLM Images/<Type>/<id>.jpg`."""
    rows: list[tuple] = []
    for attribute, *scenes in _pairs(split, pairs_per_pattern, seed):
        for scene in scenes:
            index = len(rows) + 1
            rows.append((index, PATTERN_NAMES[attribute], statement(scene, attribute)))
            _jpeg(draw(scene), directory / "MLLM_VLM Images" / PATTERN_NAMES[attribute] / f"{index}.jpg")
    _write_csv(directory / "Questions.csv", ("Question ID", "Type", "Statement"), rows)


def write_mmvp(directory: Path, split: str, pairs_per_pattern: int, seed: int = 0) -> None:
    """Draw mini-MMVP: `Questions.csv` (Index, Question, Options, Correct Answer) and `MMVP Images/<Index>.jpg`.

    The pattern of each question, which MMVP's file does not tell, is a further column.
    """
    rng = np.random.default_rng(seed)
    rows: list[tuple] = []
    for attribute, *scenes in _pairs(split, pairs_per_pattern, seed):
        values = [getattr(scene, attribute) for scene in scenes]
        if rng.random() < 0.5:
            values.reverse()
        phrases = [ATTRIBUTES[attribute][value] for value in values]
        for scene in scenes:
            index = len(rows) + 1
            question = _QUESTIONS[attribute].format(scene.label)
            correct = "(a)" if getattr(scene, attribute) == values[0] else "(b)"
            rows.append((index, question, f"(a) {phrases[0]} (b) {phrases[1]}", correct, PATTERN_NAMES[attribute]))
            _jpeg(draw(scene), directory / "MMVP Images" / f"{index}.jpg")
    _write_csv(directory / "Questions.csv", ("Index", "Question", "Options", "Correct Answer", "Pattern"), rows)


def write_labelled(directory: Path, split: str, num_train: int = 3000, num_test: int = 3000, seed: int = 0) -> None:
    """Draw a labelled set: `labels.csv` (file, split, class, every attribute) and `classes.json` with its prompts.

    Its train part comes from training scenes, its test part from the given split.
    """
    rng = np.random.default_rng(1000 * _SPLIT_SEEDS[split] + 500 + seed)
    rows = []
    for part, source, count in (("train", "train", num_train), ("test", split, num_test)):
        for index in range(count):
            scene = random_scene(rng, source)
            name = f"images/{part}-{index:05d}.png"
            (directory / "images").mkdir(parents=True, exist_ok=True)
            draw(scene).save(directory / name, compress_level=1)
            rows.append((name, part, scene.label, *(getattr(scene, attribute) for attribute in ATTRIBUTES)))
    _write_csv(directory / "labels.csv", ("file", "split", "class", *ATTRIBUTES), rows)
    labels = [f"{colour} {kind}" for colour in COLOURS for kind in KINDS]
    classes = {
        "templates": ["a photo of a {}", "a picture of a {}", "an image of a {}"],
        "classes": {x: x for x in labels},
    }
    (directory / "classes.json").write_text(json.dumps(classes, indent=2) + "\n")


def write_captioned(directory: Path, split: str, num_images: int = 1000, seed: int = 0) -> None:
    """Draw images with two captions of four details each: `images/` and `captions.json`; no two images are the same.

    Nine details in one caption are more than the mini tower's text side can read.
    """
    rng = np.random.default_rng(1000 * _SPLIT_SEEDS[split] + 700 + seed)
    (directory / "images").mkdir(parents=True)
    seen: set[tuple[str, ...]] = set()
    rows: list[dict] = []
    while len(rows) < num_images:
        scene = random_scene(rng, split)
        if scene.content() in seen:
            continue
        seen.add(scene.content())
        name = f"images/{len(rows):05d}.png"
        draw(scene).save(directory / name, compress_level=1)
        details = [detail_phrase(scene, str(attribute)) for attribute in rng.permutation(list(ATTRIBUTES))]
        captions = [" ".join([f"a {scene.label}", *part]) for part in (details[:4], details[4:8])]
        rows.append({"image": name, "captions": captions})
    (directory / "captions.json").write_text(json.dumps(rows, indent=1) + "\n")


def write_retrieval(directory: Path, split: str = "test") -> Path:
    """The captioned images of a split below the directory, drawn once; returns their folder."""
    _draw_once(directory / "retrieval", lambda folder: write_captioned(folder, split))
    return directory / "retrieval"


def write_benchmarks(directory: Path, split: str = "test", pairs_per_pattern: int = 100) -> Path:
    """The benchmarks of a split, each drawn once: `mmvp_vlm/`, `mmvp/`, `pope/`, `labelled/` below the directory."""
    write_tower_benchmarks(directory, split, pairs_per_pattern)
    _draw_once(directory / "mmvp", lambda folder: write_mmvp(folder, split, pairs_per_pattern))
    _draw_once(directory / "pope", lambda folder: write_pope(folder, split))
    return directory


def write_tower_benchmarks(directory: Path, split: str = "test", pairs_per_pattern: int = 100) -> Path:
    """Those of them that need no language model: `mmvp_vlm/` and `labelled/`."""
    _draw_once(directory / "mmvp_vlm", lambda folder: write_mmvp_vlm(folder, split, pairs_per_pattern))
    _draw_once(directory / "labelled", lambda folder: write_labelled(folder, split))
    return directory


def _write_csv(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
