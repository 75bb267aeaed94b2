"""The names that a LLaVA's tensors have had: on disk, in memory, and in the original repository."""

from __future__ import annotations

from typing import Literal

from dcr_mllm.errors import UserError
from dcr_mllm.llava_headers import PROJECTOR, tower_tensor

Part = Literal["tower", "projector", "language"]

# A language model inside a LLaVA: on disk (transformers 4 and 5), and in memory since 4.52.
_LANGUAGE_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
_ORIGINAL_PROJECTOR = {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"}


def part_of(name: str) -> tuple[Part, str]:
    """Which part of a LLaVA a stored tensor belongs to, and its name within: `model.*` and `lm_head.*` of a causal
    language model, `linear_1.*` of a projector, a tower's without `vision_model.`.

    Raises:
        UserError: It is of none of them.
    """
    own = tower_tensor(name)
    if own is not None:
        return "tower", own
    if PROJECTOR in name:
        return "projector", name.split(PROJECTOR)[1]
    for prefix, replacement in _LANGUAGE_PREFIXES.items():
        if name.startswith(prefix):
            return "language", replacement + name.removeprefix(prefix)
    raise UserError(f"the tensor {name} belongs neither to a tower nor to a projector nor to a language model")


def transformers4_name(name: str) -> str:
    """A stored tensor's name as every transformers since 4.36, and vLLM, read it."""
    part, own = part_of(name)
    return {"tower": "vision_tower.vision_model.", "projector": PROJECTOR, "language": "language_model."}[part] + own


def original_name(name: str) -> str | None:
    """A stored tensor's name in the original LLaVA; None for a tower's, which lies in a directory of its own."""
    part, own = part_of(name)
    if part == "projector":
        layer, _, kind = own.partition(".")
        return f"{_ORIGINAL_PROJECTOR[layer]}.{kind}"
    return own if part == "language" else None
