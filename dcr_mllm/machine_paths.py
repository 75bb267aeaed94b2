"""Paths of this machine in files that leave it: each becomes the name of what it points to."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath
from typing import Any

# A whole value that is a path, and paths of two or more folders within a text. Links, closing tags of HTML, fractions
# and patterns with backslashes do not begin like this.
_WHOLE = re.compile(r"(?:/|~/|[A-Za-z]:[\\/])\S.*")
_FOLDER = r"[\w.+@{}*\[\]=-]+"
_WITHIN = re.compile(rf"(?<![\w:/.<~])~?(?:/{_FOLDER}){{2,}}/?|(?<!\w)[A-Za-z]:(?:[\\/]{_FOLDER})+")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\][^/\\]+")


def name_of(path: str) -> str:
    """A Hugging Face id for what lies in the hub's cache, else the last part of the path."""
    cached = _CACHED.search(path)
    if cached and not path[cached.end() :].strip("/\\"):
        return f"{cached[1]}/{cached[2]}"
    return (PureWindowsPath(path) if "\\" in path else Path(path)).name or "root"


def without_paths(value: Any) -> tuple[Any, int]:
    """JSON-like data or text with names in place of absolute paths, and how many there were.

    Args:
        value: Mapping, list, text or anything else, which is returned as it is.
    """
    if isinstance(value, dict):
        pairs = {key: without_paths(inner) for key, inner in value.items()}
        return {key: inner for key, (inner, _) in pairs.items()}, sum(count for _, count in pairs.values())
    if isinstance(value, list):
        items = [without_paths(inner) for inner in value]
        return [inner for inner, _ in items], sum(count for _, count in items)
    if not isinstance(value, str):
        return value, 0
    if "\n" not in value and _WHOLE.fullmatch(value):
        return name_of(value), 1
    return _WITHIN.subn(lambda found: name_of(found[0]), value)
