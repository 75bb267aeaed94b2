"""Pictures of several objects, for mini-POPE and the questions that prepare for it: which objects are there?

Each of the four quarters of a picture holds one object or none. Splits are disjoint by construction, as those of
scenes: `group_split` hashes which objects a picture shows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dcr_mllm.mini.world import COLOURS, GROUNDS, IMAGE_SIZE, KINDS, split_by_hash

Label = tuple[str, str]  # colour and kind
LABELS: tuple[Label, ...] = tuple((colour, kind) for colour in COLOURS for kind in KINDS)
CATEGORIES = ("random", "popular", "adversarial")
IMAGE_FOLDER = "val2014"  # as in POPE
_SCALE = 2  # drawn at twice the size, then averaged down


@dataclass(frozen=True, kw_only=True)
class Group:
    """What a picture shows.

    Attributes:
        quarters: Label of the object in each quarter, row by row; None where it is empty. No label occurs twice.
        ground: Colour of the ground.
        jitter: Moves, turns and tints the objects without changing what is there.
    """

    quarters: tuple[Label | None, ...]
    ground: str
    jitter: int

    @property
    def labels(self) -> tuple[Label, ...]:
        """The objects, in the order of their quarters."""
        return tuple(label for label in self.quarters if label is not None)


def group_split(group: Group) -> str:
    """The split a group belongs to, as `world.split_of`: by a hash of its objects, in whatever order."""
    return split_by_hash(sorted(f"{colour} {kind}" for colour, kind in group.labels))


def random_group(rng: np.random.Generator, split: str, num_objects: int) -> Group:
    """A group of so many different objects in random quarters."""
    while True:
        quarters: list[Label | None] = [None] * 4
        chosen = rng.choice(len(LABELS), size=num_objects, replace=False)
        for quarter, index in zip(rng.permutation(4)[:num_objects], chosen, strict=True):
            quarters[int(quarter)] = LABELS[int(index)]
        ground = list(GROUNDS)[int(rng.integers(len(GROUNDS)))]
        group = Group(quarters=tuple(quarters), ground=ground, jitter=int(rng.integers(2**31)))
        if group_split(group) == split:
            return group


def draw_group(group: Group) -> Image.Image:
    """Draw a group as an RGB image of IMAGE_SIZE x IMAGE_SIZE pixels."""
    rng = np.random.default_rng(group.jitter)

    def tinted(colour: tuple[int, int, int]) -> tuple[int, ...]:
        return tuple(int(c) for c in np.clip(np.array(colour) + rng.integers(-14, 15, size=3), 0, 255))

    canvas = Image.new("RGB", (IMAGE_SIZE * _SCALE, IMAGE_SIZE * _SCALE), tinted(GROUNDS[group.ground]))
    pen = ImageDraw.Draw(canvas)
    quarter = IMAGE_SIZE / 2
    for index, label in enumerate(group.quarters):
        if label is None:
            continue
        colour, kind = label
        outline = np.array(KINDS[kind]) * rng.uniform(8.0, 10.0)
        if rng.random() < 0.5:
            outline[:, 0] *= -1
        row, column = divmod(index, 2)
        centre = np.array([column + 0.5, row + 0.5]) * quarter + rng.uniform(-1.5, 1.5, size=2)
        points = [(float(x), float(y)) for x, y in (outline + centre) * _SCALE]
        pen.polygon(points, fill=tinted(COLOURS[colour]))
    return canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def similar_labels(labels: Sequence[Label]) -> list[Label]:
    """Absent objects that share colour or kind with one that is there."""
    return [
        label
        for label in LABELS
        if label not in labels and any(label[0] == colour or label[1] == kind for colour, kind in labels)
    ]


def write_pope(directory: Path, split: str = "test", num_images: int = 150, seed: int = 0) -> None:
    """Draw mini-POPE in POPE's layout: `coco_pope_<category>.json` (a JSON object per line) and `val2014/`.

    Every picture shows three objects. Its six questions per category alternate yes and no: the three objects, the same
    in all categories, and three absent ones. Random ones are any; popular ones those that most pictures show;
    adversarial ones share colour or kind with an object that is there.
    """
    rng = np.random.default_rng((seed, 5))
    groups = [random_group(rng, split, 3) for _ in range(num_images)]
    frequency = Counter(label for group in groups for label in group.labels)
    by_frequency = sorted(LABELS, key=lambda label: (-frequency[label], label))
    (directory / IMAGE_FOLDER).mkdir(parents=True)
    lines: dict[str, list[str]] = {category: [] for category in CATEGORIES}
    for index, group in enumerate(groups):
        name = f"mini_{index:06d}.png"
        draw_group(group).save(directory / IMAGE_FOLDER / name, compress_level=1)
        absent = [label for label in LABELS if label not in group.labels]
        wrong = {
            "random": absent,
            "popular": [label for label in by_frequency if label not in group.labels][:3],
            "adversarial": similar_labels(group.labels),
        }
        for category, candidates in wrong.items():
            chosen = [candidates[int(k)] for k in rng.choice(len(candidates), size=3, replace=False)]
            for present, missing in zip(group.labels, chosen, strict=True):
                for label, answer in ((present, "yes"), (missing, "no")):
                    record = {
                        "question_id": len(lines[category]) + 1,
                        "image": name,
                        "text": is_there(label),
                        "label": answer,
                    }
                    lines[category].append(json.dumps(record))
    for category, texts in lines.items():
        (directory / f"coco_pope_{category}.json").write_text("\n".join(texts) + "\n")


def is_there(label: Label) -> str:
    """POPE's question about an object."""
    words = " ".join(label)
    return f"Is there {'an' if words[0] in 'aeiou' else 'a'} {words} in the image?"
