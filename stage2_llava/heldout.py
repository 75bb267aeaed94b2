"""Does a trained LLaVA look at the image? Closed questions that training never saw, with the image and with noise in
its place, compared by an exact McNemar test.

A quick look at the end of a run, from one training seed and on one kind of data; benchmarks are another matter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcr_mllm.conversation import Template
from dcr_mllm.evaluation.statistics import mcnemar_exact
from dcr_mllm.llava import load_llava, load_processor
from dcr_mllm.runs import write_json_atomic
from stage2_llava.collate import Collator, pixels
from stage2_llava.instructions import Instructions, load_instructions
from stage2_llava.labels import encode
from stage2_llava.step import learned_logits
from stage2_llava.train import template_of

_BATCH = 64


@torch.inference_mode()
def answered_right(
    model: Any,
    processor: Any,
    template: Template,
    questions: Instructions,
    *,
    blind: bool,
    chosen: Sequence[int] | None = None,
) -> np.ndarray:
    """Which questions greedy decoding answers exactly, bool [N].

    Decoding gives an answer exactly if, and only if, each of its tokens is the likeliest after the ones before, so one
    forward pass over the right answers decides.

    Args:
        model: LLaVA, in eval mode.
        processor: Its own.
        template: Its own.
        questions: One question and answer each, with one image.
        blind: Replace every image by noise.
        chosen: Positions of the N questions; None takes all.
    """
    from PIL import Image

    vision = model.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    collate = Collator(processor.tokenizer.pad_token_id, torch.zeros(3, vision.image_size, vision.image_size))
    rng = np.random.default_rng(0)
    right: list[bool] = []
    chosen = range(len(questions)) if chosen is None else chosen
    for start in range(0, len(chosen), _BATCH):
        items = []
        for index in chosen[start : start + _BATCH]:
            sample = questions[index]
            encoded = encode(sample.turns, template, processor.tokenizer, image_tokens=tokens, where=sample.where)
            images = [questions.open_image(sample, name) for name in sample.images]
            if blind:
                images = [Image.fromarray(rng.integers(0, 256, (i.height, i.width, 3), dtype=np.uint8)) for i in images]
            items.append((encoded, list(pixels(processor, images)) if images else []))
        batch = {name: value.to(model.device) for name, value in collate(items).items()}
        logits, _ = learned_logits(
            model,
            batch["input_ids"],
            batch["attention_mask"],
            batch["target_positions"],
            {name: value for name, value in batch.items() if name.endswith("pixel_values")},
        )
        hits = (logits.argmax(dim=-1) == batch["labels"]).cpu()
        counts = [sum(label != -100 for label in encoded.labels[1:]) for encoded, _ in items]
        right += [bool(part.all()) for part in hits.split(counts)]
    return np.array(right)


def evaluate_heldout(
    llavas: dict[str, Path],
    data: str,
    images: str | None,
    out: Path,
    *,
    device: str = "cpu",
    limit: int | None = None,
) -> dict[str, Any]:
    """Ask every LLaVA every question, seeing and blind, and write `out` with a record per question.

    Args:
        llavas: By name, the first is the baseline.
        data: LLaVA JSON of single-turn questions; its keys `attribute` and `form` are reported by, where it has them.
        images: Where image names are looked up.
        out: JSON file to write.
        device: Where the models run.
        limit: At most so many questions, drawn at random, the same for every LLaVA.

    Returns:
        Per LLaVA: accuracy seeing and blind in percent and McNemar's test between them; for all but the first also the
        test against the first.
    """
    questions = load_instructions(data, images)
    chosen = sorted(np.random.default_rng(0).permutation(len(questions))[:limit].tolist())
    seen: dict[str, np.ndarray] = {}
    result: dict[str, Any] = {"questions": len(chosen), "llavas": {}}
    for name, path in llavas.items():
        model, processor = load_llava(path).to(device), load_processor(path)
        if device == "cpu":
            model = model.float()
        template = template_of(processor, "auto")
        seen[name] = answered_right(model, processor, template, questions, blind=False, chosen=chosen)
        blind = answered_right(model, processor, template, questions, blind=True, chosen=chosen)
        entry = {
            "accuracy": 100 * float(seen[name].mean()),
            "blind": 100 * float(blind.mean()),
            "against_blind": mcnemar_exact(blind, seen[name]),
        }
        first = next(iter(seen))
        if name != first:
            entry["against_" + first] = mcnemar_exact(seen[first], seen[name])
        entry["by"] = _by_key(data, seen[name], chosen)
        result["llavas"][name] = entry
    records = [
        {"id": questions[k].id, **{name: bool(right[row]) for name, right in seen.items()}}
        for row, k in enumerate(chosen)
    ]
    write_json_atomic(out, {**result, "records": records})
    return result


def _by_key(data: str, right: np.ndarray, chosen: Sequence[int]) -> dict[str, dict[str, float]]:
    """Accuracy in percent by the values of `attribute` and `form`, where the questions have them."""
    if not data.endswith(".json"):
        return {}
    everything = json.loads(Path(data).read_text(encoding="utf-8"))
    records = [everything[k] for k in chosen]
    found: dict[str, dict[str, float]] = {}
    for key in ("attribute", "form"):
        values = [record.get(key) for record in records]
        if len(values) == len(right) and all(isinstance(value, str) for value in values):
            names = list(dict.fromkeys(values))
            found[key] = {name: 100 * float(right[[v == name for v in values]].mean()) for name in names}
    return found


def format_heldout(result: dict[str, Any]) -> str:
    """The result as a table for the terminal."""
    rows = [f"{result['questions']:,} held-out questions     right   blind   p (McNemar, right against blind)"]
    for name, entry in result["llavas"].items():
        rows.append(
            f"{name:<28} {entry['accuracy']:5.1f} % {entry['blind']:5.1f} %   {entry['against_blind']['p_value']:.2g}"
        )
    rows += _differences(result["llavas"])
    return "\n".join(rows)


def _differences(llavas: dict[str, Any]) -> Sequence[str]:
    first, *others = llavas
    lines = []
    for name in others:
        test = llavas[name][f"against_{first}"]
        difference = llavas[name]["accuracy"] - llavas[first]["accuracy"]
        lines.append(
            f"{name} against {first}: {difference:+.1f} points, {test['gained']} gained and {test['lost']} lost, "
            f"p {test['p_value']:.2g}; one training run each, training variance not measured"
        )
    return lines
