"""A deterministic drawn world in which each of the nine MMVP patterns is one attribute of a scene.

A scene is one object (its kind and colour are what coarse captions name) with nine details, one per pattern. Scenes
are drawn by Pillow at twice the final size and averaged down. Everything follows from integers: the same scene always
gives the same pixels. Splits are disjoint by construction: `split_of` hashes what a scene shows, without its jitter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 48
_SCALE = 2  # drawn at twice the size, then averaged down

COLOURS = {
    "red": (214, 48, 42),
    "green": (52, 160, 66),
    "blue": (48, 88, 206),
    "yellow": (236, 200, 44),
    "purple": (142, 62, 176),
    "orange": (240, 132, 36),
    "pink": (240, 140, 184),
    "brown": (122, 78, 44),
}

# Silhouettes in [-1, 1] x [-1, 1], y downwards, all facing right and none of them mirror-symmetric.
KINDS: dict[str, list[tuple[float, float]]] = {
    "fish": [(-1, -0.7), (-0.55, -0.1), (0, -0.6), (0.6, -0.5), (1, 0), (0.6, 0.5), (0, 0.6), (-0.55, 0.1), (-1, 0.7)],
    "car": [(-1, 0.6), (-1, 0), (-0.8, -0.1), (-0.6, -0.7), (0.2, -0.7), (0.5, -0.1), (1, 0.05), (1, 0.6)],
    "boat": [
        (-1, 0.15),
        (-0.2, 0.15),
        (-0.2, -1),
        (0.75, -0.05),
        (-0.05, 0.0),
        (-0.05, 0.15),
        (1, 0.15),
        (0.6, 0.8),
        (-0.7, 0.8),
    ],
    "arrow": [(-1, -0.28), (0.1, -0.28), (0.1, -0.85), (1, 0), (0.1, 0.85), (0.1, 0.28), (-1, 0.28)],
    "flag": [(-0.8, -1), (1, -0.9), (0.6, -0.4), (1, 0.1), (-0.5, 0.1), (-0.5, 1), (-0.8, 1)],
    "mug": [(-0.9, -0.8), (0.4, -0.8), (0.4, -0.5), (1, -0.5), (1, 0.4), (0.4, 0.4), (0.4, 0.8), (-0.9, 0.8)],
    "boot": [(-0.7, -1), (0, -1), (0, 0.1), (0.9, 0.3), (1, 0.9), (-0.7, 0.9)],
    "key": [
        (-1, -0.2),
        (0.1, -0.2),
        (0.1, -0.6),
        (0.9, -0.6),
        (0.9, 0.6),
        (0.1, 0.6),
        (0.1, 0.2),
        (-0.6, 0.2),
        (-0.6, 0.7),
        (-0.8, 0.7),
        (-0.8, 0.2),
        (-1, 0.2),
    ],
    "bird": [
        (-1, 0.1),
        (-0.3, -0.1),
        (-0.5, -0.9),
        (0.2, -0.2),
        (0.5, -0.5),
        (0.75, -0.4),
        (1, -0.2),
        (0.7, -0.1),
        (0.4, 0.5),
        (-0.3, 0.5),
    ],
    "hammer": [
        (-0.9, -0.9),
        (0.6, -0.9),
        (1, -0.5),
        (0.6, -0.35),
        (0.1, -0.35),
        (0.1, 1),
        (-0.3, 1),
        (-0.3, -0.35),
        (-0.9, -0.35),
    ],
    "house": [
        (-0.8, 0.9),
        (-0.8, -0.1),
        (-1, -0.1),
        (0, -0.9),
        (0.35, -0.6),
        (0.35, -1),
        (0.65, -1),
        (0.65, -0.35),
        (1, -0.1),
        (0.8, -0.1),
        (0.8, 0.9),
    ],
    "horn": [(-1, -0.2), (-0.2, -0.25), (0.5, -0.9), (1, -1), (1, 1), (0.5, 0.9), (-0.2, 0.25), (-1, 0.2)],
}

# Each of the nine MMVP patterns is one attribute; the words are the phrases of captions and statements.
ATTRIBUTES: dict[str, dict[str, str]] = {
    "orientation": {"right": "facing right", "left": "facing left"},
    "presence": {"spot": "with a spot", "plain": "without a spot"},
    "state": {"glowing": "glowing", "dull": "not glowing"},
    "quantity": {"one": "under one star", "two": "under two stars", "three": "under three stars"},
    "position": {"left": "with a ball on the left", "right": "with a ball on the right", "below": "with a ball below"},
    "color": {"dark": "on dark ground", "light": "on light ground", "teal": "on teal ground"},
    "structure": {"solid": "with a solid body", "striped": "with a striped body"},
    "text": {"A": "near the letter a", "T": "near the letter t", "O": "near the letter o", "X": "near the letter x"},
    "viewpoint": {"front": "seen from the front", "above": "seen from above"},
}
PATTERN_NAMES = {
    "orientation": "Orientation and Direction",
    "presence": "Presence of Specific Features",
    "state": "State and Condition",
    "quantity": "Quantity and Count",
    "position": "Positional and Relational Context",
    "color": "Color and Appearance",
    "structure": "Structural Characteristics",
    "text": "Texts",
    "viewpoint": "Viewpoint and Perspective",
}
GROUNDS = {"dark": (44, 46, 54), "light": (222, 220, 210), "teal": (70, 140, 140)}
_LETTERS = {  # 5 x 5 bitmaps
    "A": ("01110", "10001", "11111", "10001", "10001"),
    "T": ("11111", "00100", "00100", "00100", "00100"),
    "O": ("01110", "10001", "10001", "10001", "01110"),
    "X": ("10001", "01010", "00100", "01010", "10001"),
}
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows. `jitter` moves and tints it without changing its meaning."""

    kind: str
    colour: str
    orientation: str
    presence: str
    state: str
    quantity: str
    position: str
    color: str
    structure: str
    text: str
    viewpoint: str
    jitter: int = 0

    @property
    def label(self) -> str:
        """The class that coarse captions name: colour and kind."""
        return f"{self.colour} {self.kind}"

    def content(self) -> tuple[str, ...]:
        """Everything that the scene shows, without its jitter."""
        return (self.kind, self.colour, *(getattr(self, name) for name in ATTRIBUTES))


def split_of(scene: Scene) -> str:
    """The split a scene belongs to: 80 % train, 10 % validation, 10 % test, by a hash of its content."""
    return split_by_hash(scene.content())


def split_by_hash(content: Sequence[str]) -> str:
    """80 % train, 10 % validation, 10 % test."""
    bucket = hashlib.sha256("|".join(content).encode()).digest()[0] % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def random_scene(rng: np.random.Generator, split: str | None = None) -> Scene:
    """A scene with every attribute drawn uniformly, from the given split (any if None)."""
    while True:
        scene = Scene(
            kind=_pick(rng, KINDS),
            colour=_pick(rng, COLOURS),
            jitter=int(rng.integers(2**31)),
            **{name: _pick(rng, values) for name, values in ATTRIBUTES.items()},
        )
        if split is None or split_of(scene) == split:
            return scene


def contrast_scene(scene: Scene, attribute: str, rng: np.random.Generator) -> Scene:
    """The same scene with another value of one attribute and a jitter of its own (the other half of a pair)."""
    others = [value for value in ATTRIBUTES[attribute] if value != getattr(scene, attribute)]
    return replace(scene, jitter=int(rng.integers(2**31)), **{attribute: others[int(rng.integers(len(others)))]})


def _pick(rng: np.random.Generator, values) -> str:
    names = list(values)
    return names[int(rng.integers(len(names)))]


def draw(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of IMAGE_SIZE x IMAGE_SIZE pixels."""
    rng = np.random.default_rng(scene.jitter)
    shift_x, shift_y = rng.uniform(-2.0, 2.0, size=2)
    radius = rng.uniform(9.0, 11.5)
    tint = rng.integers(-14, 15, size=(3, 3))
    colour = tuple(int(c) for c in np.clip(np.array(COLOURS[scene.colour]) + tint[0], 0, 255))
    ground = tuple(int(c) for c in np.clip(np.array(GROUNDS[scene.color]) + tint[1], 0, 255))
    ink = (250, 250, 250) if scene.color != "light" else (20, 20, 24)

    canvas = Image.new("RGB", (IMAGE_SIZE * _SCALE, IMAGE_SIZE * _SCALE), ground)
    pen = ImageDraw.Draw(canvas)
    centre = np.array([24.0 + shift_x, 25.0 + shift_y])

    outline = np.array(KINDS[scene.kind]) * radius
    if scene.orientation == "left":
        outline[:, 0] *= -1
    if scene.viewpoint == "above":
        outline[:, 1] *= 0.5
    outline = (outline + centre) * _SCALE
    points = [(float(x), float(y)) for x, y in outline]
    if scene.state == "glowing":
        pen.line([*points, points[0]], fill=(255, 244, 150), width=5 * _SCALE, joint="curve")
    pen.polygon(points, fill=colour)
    if scene.structure == "striped":
        _stripe(canvas, points, tuple(c // 2 for c in colour))
    if scene.presence == "spot":
        _disc(pen, outline.mean(axis=0) / _SCALE, 3.0, (252, 252, 252), (10, 10, 10))

    offset = {"left": (-17.5, 2), "right": (17.5, 2), "below": (0, 16.5)}[scene.position]
    wobble = rng.uniform(-1.5, 1.5, size=2)
    _disc(pen, np.array([24.0, 25.0]) + offset + wobble, 4.0, (150, 220, 240), (10, 10, 10))

    count = {"one": 1, "two": 2, "three": 3}[scene.quantity]
    first = rng.uniform(18.0, 22.0)
    for index in range(count):
        _square(pen, first + 8.0 * index, 6.0 + rng.uniform(-1, 1), 2.6, ink)
    _letter(pen, scene.text, 3.0 + rng.uniform(-1, 1), 3.0 + rng.uniform(-1, 1), ink)
    return canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def _disc(pen: ImageDraw.ImageDraw, centre, radius: float, fill, edge) -> None:
    x, y = float(centre[0]) * _SCALE, float(centre[1]) * _SCALE
    r = radius * _SCALE
    pen.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=edge, width=_SCALE)


def _square(pen: ImageDraw.ImageDraw, x: float, y: float, half: float, fill) -> None:
    pen.polygon(
        [
            (x * _SCALE, (y - half) * _SCALE),
            ((x + half) * _SCALE, y * _SCALE),
            (x * _SCALE, (y + half) * _SCALE),
            ((x - half) * _SCALE, y * _SCALE),
        ],
        fill=fill,
    )


def _letter(pen: ImageDraw.ImageDraw, letter: str, left: float, top: float, fill) -> None:
    cell = 2 * _SCALE
    x0, y0 = left * _SCALE, top * _SCALE
    for row, bits in enumerate(_LETTERS[letter]):
        for column, bit in enumerate(bits):
            if bit == "1":
                x, y = x0 + column * cell, y0 + row * cell
                pen.rectangle((x, y, x + cell - 1, y + cell - 1), fill=fill)


def _stripe(canvas: Image.Image, points: list[tuple[float, float]], fill) -> None:
    mask = Image.new("L", canvas.size)
    ImageDraw.Draw(mask).polygon(points, fill=255)
    bars = Image.new("L", canvas.size)
    pen = ImageDraw.Draw(bars)
    for x in range(0, canvas.size[0], 5 * _SCALE):
        pen.rectangle((x, 0, x + 2 * _SCALE - 1, canvas.size[1]), fill=255)
    both = Image.fromarray(np.minimum(np.asarray(mask), np.asarray(bars)))
    canvas.paste(Image.new("RGB", canvas.size, fill), mask=both)


_COARSE = ("a photo of a {}", "a picture of a {}", "an image of a {}", "a {}", "a drawing of a {}")


def coarse_caption(scene: Scene, rng: np.random.Generator, detail_rate: float = 0.15) -> str:
    """Names colour and kind, and only with probability `detail_rate` one detail: what makes CLIP blind to details."""
    caption = _COARSE[int(rng.integers(len(_COARSE)))].format(scene.label)
    if rng.random() < detail_rate:
        caption = f"{caption} {detail_phrase(scene, _pick(rng, ATTRIBUTES))}"
    return caption


def full_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Names every detail, in random order (the captions that the mini Stable Diffusion learns from)."""
    names = list(ATTRIBUTES)
    rng.shuffle(names)
    return " ".join([f"a {scene.label}", *(detail_phrase(scene, name) for name in names)])


def detail_phrase(scene: Scene, attribute: str) -> str:
    """The phrase for one attribute of a scene, for example `facing left`."""
    return ATTRIBUTES[attribute][getattr(scene, attribute)]


def statement(scene: Scene, attribute: str) -> str:
    """What MMVP-VLM asks of an image: class and one detail (the scorer puts `a photo of ` before it)."""
    return f"a {scene.label} {detail_phrase(scene, attribute)}"
