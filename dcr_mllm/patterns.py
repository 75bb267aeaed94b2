"""File patterns as WebDataset users write them."""

from __future__ import annotations

import re

from dcr_mllm.errors import UserError


def expand_braces(pattern: str) -> list[str]:
    """Expands `{00..12}` (zero padded as written) and `{a,b}`, all combinations, from left to right."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    if words is not None:
        parts = words.split(",")
    else:
        parts = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
        if not parts:
            raise UserError(f"{pattern}: the range {first}..{last} runs backwards")
    head, tails = pattern[: match.start()], expand_braces(pattern[match.end() :])
    return [head + part + tail for part in parts for tail in tails]
