"""The whole tower that a LLaVA was made from: its text side, which a LLaVA does not keep, is needed to compare texts.

Provenance says where the tower was; its tensors say whether what is there now is still the tower in the LLaVA.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dcr_mllm.errors import UserError
from dcr_mllm.evaluation.tower import whole_tower
from dcr_mllm.headers import read_json, resolve_weights
from dcr_mllm.llava_headers import UNREAD, tower_tensor
from dcr_mllm.runs import PROVENANCE_FILE


def tower_of(path: str | Path) -> Path:
    """The dual encoder to measure for a model: a tower directory itself, for a LLaVA the tower inside it.

    Args:
        path: Tower or LLaVA directory.

    Raises:
        UserError: It is neither, it has no text side, or the LLaVA's tower is not where it was recorded or is not the
            one inside it any more.
    """
    path = Path(path)
    if read_json(path / "config.json").get("model_type") != "llava":
        return whole_tower(path).path
    different = []
    for candidate in _candidates(path):
        if _same_tower(path, candidate):
            return whole_tower(candidate).path
        different.append(str(candidate))
    found = f"the tower in it differs from {' and '.join(different)}" if different else "its tower is not on record"
    raise UserError(f"{path} is a LLaVA without text side, and {found}; name the whole tower directory instead")


def _candidates(llava: Path) -> list[Path]:
    """Tower directories that the LLaVA's provenance, or that of what it was made from, leads to and that exist."""
    found: list[Path] = []
    for recorded in _recorded(llava, depth=4):
        place = _find(recorded, llava)
        if place is not None and place not in found:
            found.append(place)
    return found


def _recorded(llava: Path, depth: int) -> Iterator[str]:
    """What provenance says of the tower, the surest first."""
    source = llava / PROVENANCE_FILE
    if depth == 0 or not source.is_file():
        return
    record = read_json(source)
    for part in (record, _part(record, "swapped")):
        if "path" in _part(part, "tower"):
            yield str(part["tower"]["path"])
    base = _part(record, "base").get("path")
    place = None if base is None else _find(str(base), llava)
    if place is not None:
        yield from _recorded(place, depth - 1)
    # All arms' towers; which of them it was, the tensors say.
    yield from (str(value) for value in _part(_part(record, "config"), "towers").values())


def _part(record: dict[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def _find(recorded: str, llava: Path) -> Path | None:
    """A recorded model directory; a relative one was meant from where training ran, mostly a folder above the LLaVA."""
    for folder in (Path(), *llava.resolve().parents):
        if (folder / recorded / "config.json").is_file():
            return folder / recorded
    try:
        place = resolve_weights(recorded, "tower")  # `mini`, or a Hugging Face id
    except UserError:
        return None
    return place if (place / "config.json").is_file() else None


def _same_tower(llava: Path, tower: Path) -> bool:
    """Whether every tensor of the LLaVA's tower is the directory's, after the cast that the LLaVA was saved with."""
    import torch
    from safetensors import safe_open

    from dcr_mllm.towers import vision_tensors

    own = vision_tensors(tower)
    left = {name for name in own if not name.startswith(UNREAD) and not name.endswith("position_ids")}
    for source in sorted(llava.glob("*.safetensors")):
        with safe_open(source, framework="pt") as file:
            for stored in file.keys():  # noqa: SIM118 (not a dict)
                name = tower_tensor(stored)
                if name is None or name.endswith("position_ids"):
                    continue
                value = file.get_tensor(stored)
                if name not in own or not torch.equal(own[name].to(value.dtype), value):
                    return False
                left.discard(name)
    return not left
