"""The pairs of a benchmark that flipped between two models, with both images, for the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dcr_mllm.evaluation.scored import Scored

if TYPE_CHECKING:
    from dcr_mllm.evaluation.mllm_data import TaskData

MAX_PAIRS = 12
_MAX_SIDE = 384  # pixels; so much is shown


def flipped_pairs(
    data: TaskData, base: str, model: str, items: dict[str, list[dict[str, Any]]], scored: dict[str, Scored]
) -> list[dict[str, Any]]:
    """Two galleries: pairs that only `model` gets right, then those that only `base` does.

    Args:
        data: MMVP or what has its layout.
        base, model: Names.
        items: Answers by model.
        scored: The same, scored.
    """
    order = sorted(range(len(data.rows)), key=lambda k: data.rows[k]["Index"])
    pairs = list(zip(order[::2], order[1::2], strict=True))

    def both(name: str) -> Callable[[tuple[int, int]], bool]:
        return lambda pair: bool(scored[name].right[list(pair)].all())

    gained = [pair for pair in pairs if both(model)(pair) and not both(base)(pair)]
    lost = [pair for pair in pairs if both(base)(pair) and not both(model)(pair)]
    return [
        {
            "title": f"{data.name}: {title}",
            "count": f"{len(chosen)} pair{'' if len(chosen) == 1 else 's'}",
            "more": len(chosen) > MAX_PAIRS,
            "pairs": [[_side(data, k, (base, model), items, scored) for k in pair] for pair in chosen[:MAX_PAIRS]],
        }
        for title, chosen in ((f"Gained by {model}", gained), (f"Lost by {model}", lost))
    ]


def _side(
    data: TaskData,
    position: int,
    models: tuple[str, str],
    items: dict[str, list[dict[str, Any]]],
    scored: dict[str, Scored],
) -> dict[str, Any]:
    row = data.rows[position]
    said = [
        {
            "model": model,
            "text": items[model][position]["answer"] or "(nothing)",
            "right": bool(scored[model].right[position]),
        }
        for model in models
    ]
    return {
        "image": None if position in data.undecodable else image_url(data.image(position)),
        "drawn": data.name.startswith("mini-"),  # a few pixels that are better seen as such
        "index": row["Index"],
        "question": row["Question"],
        "options": row["Options"],
        "truth": row["Correct Answer"],
        "answers": said,
    }


def image_url(content: bytes) -> str:
    """An image file as a data URL, no larger than it is shown."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        kind = image.format
        if kind not in ("JPEG", "PNG") or max(image.size) > _MAX_SIDE:
            small = image.convert("RGB")
            small.thumbnail((_MAX_SIDE, _MAX_SIDE))
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=85)
            content, kind = buffer.getvalue(), "JPEG"
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"
