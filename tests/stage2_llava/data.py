"""LLaVA instruction data on noise images, for the tests of stage 2."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

QUESTIONS = ("Is it red?", "What is in the image?", "Describe the picture.", "Is it blue?")
ANSWERS = ("Yes.", "No.", "two of them", "left", "right", "three")


def write_data(folder: Path, *, num_images: int = 24, num_text: int = 6, seed: int = 0) -> Path:
    """`align.json` (captions), `instruct.json` (one or two turns, and text-only samples) and `images/`."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    align, instruct = [], []
    for k in range(num_images):
        width, height = rng.integers(24, 60, size=2)
        name = f"images/{k}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
        align.append(_sample(f"a{k}", [("<image>\nDescribe the picture.", f"It is {_pick(rng, ANSWERS)}")], name))
        turns = [(f"{_pick(rng, QUESTIONS)}\n<image>", _pick(rng, ANSWERS))]
        if k % 2:
            turns.append((_pick(rng, QUESTIONS), _pick(rng, ANSWERS)))
        instruct.append(_sample(f"i{k}", turns, name))
    for k in range(num_text):
        instruct.append(_sample(f"t{k}", [(_pick(rng, QUESTIONS), _pick(rng, ANSWERS))], None))
    for name, samples in (("align", align), ("instruct", instruct)):
        (folder / f"{name}.json").write_text(json.dumps(samples))
    return folder


def _pick(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]


def _sample(name: str, turns: list[tuple[str, str]], image: str | None) -> dict:
    conversation = [
        {"from": speaker, "value": text}
        for question, answer in turns
        for speaker, text in (("human", question), ("gpt", answer))
    ]
    return {"id": name, **({"image": image} if image else {}), "conversations": conversation}
