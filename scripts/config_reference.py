#!/usr/bin/env python3
"""Writes docs/configuration.md, every key of both stages' configs, from the dataclasses and their docstrings.

python scripts/config_reference.py [--check]     --check: write nothing, exit 1 if the file is out of date
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any

from stage1_dcr.config import Stage1Config
from stage2_llava.config import Stage2Config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

Every key of both stages, with its default; defaults are the published recipes. A config is a YAML file that names only
what differs; on the command line `key=value` wins, nested keys are dotted (`views.hue=0`, `instruct.lora_rank=64`).
`--print-config` shows what was resolved, and an unknown key or a wrong type is refused before anything is loaded.

This page is made from the sources by `python scripts/config_reference.py`.
"""


def field_notes(cls: type) -> dict[str, str]:
    """What the sources say of each field of a dataclass: the string below it, or its line under `Attributes:`."""
    notes: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        for name, text in re.findall(r"^    (\w+): (.+(?:\n        .+)*)", inspect.getdoc(base) or "", re.MULTILINE):
            notes[name] = text
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]).body
        for statement, after in zip(body, body[1:], strict=False):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(after, ast.Expr):
                continue
            if isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
                notes[ast.unparse(statement.target)] = inspect.cleandoc(after.value.value)
    return {name: " ".join(text.split()) for name, text in notes.items()}


def rows(cls: type, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Key, type, default and note of each field, nested configs dotted, in the order of the sources."""
    notes, hints = field_notes(cls), typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            found += rows(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.")
        else:
            key = prefix + field.name
            found.append((key, type_name(hints[field.name]), default(field), notes.get(field.name, "")))
    return found


def type_name(hint: Any) -> str:
    """A type as one would say it: `str or None`, `recipe or swap`."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(hint))
    if typing.get_origin(hint) in (tuple, list, dict):
        inside = [type_name(part) for part in typing.get_args(hint)]
        return f"{typing.get_origin(hint).__name__} of {' and '.join(dict.fromkeys(inside))}"
    if typing.get_args(hint):
        return " or ".join(type_name(part) for part in typing.get_args(hint))
    return "None" if hint is type(None) else hint.__name__


def default(field: dataclasses.Field) -> str:
    """The default as it is written in YAML."""
    if field.default_factory is not dataclasses.MISSING:
        value: Any = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return "required"
    if isinstance(value, tuple):
        value = list(value)
    return "`null`" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, command, cls in (
        ("Stage 1", "bash scripts/stage1.sh", Stage1Config),
        ("Stage 2", "bash scripts/stage2_llava.sh", Stage2Config),
    ):
        parts.append(f"\n## {title}\n\n`{command} [CONFIG] [key=value ...]`\n")
        parts.append("| key | default | type | meaning |\n|---|---|---|---|")
        for key, kind, value, note in rows(cls):
            cells = (f"`{key}`", value, kind, note)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command; 1 if `--check` finds another page than the sources make."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    page = render()
    if options.check:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page:
            return 0
        print(f"{PAGE.name} is out of date: run python scripts/config_reference.py", file=sys.stderr)
        return 1
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
