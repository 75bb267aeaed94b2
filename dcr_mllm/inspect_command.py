"""`dcr-mllm inspect DIR [DIR ...]`: what model directories hold, and what of several would not fit together.

Reads headers only: no weights are loaded, and neither torch nor transformers is imported.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dcr_mllm.cli import run_main
from dcr_mllm.errors import UserError
from dcr_mllm.fits import pairs
from dcr_mllm.headers import resolve_weights
from dcr_mllm.inspection import inspect, kind_of


def render(facts: Mapping[str, Any]) -> str:
    """One directory's facts as lines, a fact each."""
    lines = [f"{facts['path']}: {facts['kind']}"]
    lines += [f"  {name:<22}{value}" for name, value in _flat(facts) if name not in ("path", "kind")]
    lines += [f"  problem: {problem}" for problem in facts["problems"]]
    return "\n".join(lines)


def _flat(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        name = key.replace("_", " ")
        if key == "problems" or value is None:
            continue
        if key == "weights" and "parameters" in value:
            yield name, _weights(value)
        elif isinstance(value, Mapping):
            inner = [f"{k.replace('_', ' ')} {v}" for k, v in _flat(value)]
            if key == "weights":  # of several parts
                yield from ((f"{name}, {k}", v) for k, v in _flat({part: _weights(w) for part, w in value.items()}))
            elif inner:
                yield name, ", ".join(inner)
        elif isinstance(value, bool):
            yield name, "yes" if value else "no"
        else:
            yield name, str(value)


def _weights(value: Mapping[str, Any]) -> str:
    types = ", ".join(
        name if len(value["types"]) == 1 else f"{name} {_number(n)}" for name, n in value["types"].items()
    )
    files = ""
    if "files" in value:
        files = f" in {value['files']} file{'s' * (value['files'] > 1)}, {value['bytes'] / 1e6:,.1f} MB"
    return f"{_number(value['parameters'])} parameters ({types}){files}"


def _number(count: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return str(count)


def _resolve(text: str) -> Path:
    """A directory, or the cached snapshot behind an id, be it of a model or of a Stable Diffusion."""
    if Path(text).is_dir():
        return Path(text)
    try:
        return resolve_weights(text, "tower")
    except UserError as error:
        try:
            return resolve_weights(text, "denoiser")
        except UserError:
            raise error from None


def main(argv: list[str] | None = None) -> int:
    """The command; returns 0 if everything fits, 1 if something does not, 2 for what cannot be read."""
    parser = argparse.ArgumentParser(
        prog="dcr-mllm inspect",
        description="What model directories hold, and what of several would not fit together; loads nothing.",
        epilog="Exit status: 0 all is well, 1 something does not fit, 2 a directory cannot be read.",
    )
    parser.add_argument("directories", nargs="+", metavar="DIR", help="tower, denoiser, LLaVA, LLM, projector, adapter")
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(argv)

    def call() -> int:
        paths = [_resolve(text) for text in options.directories]
        facts = [inspect(path) for path in paths]
        found = list(pairs({path: kind_of(path) for path in paths}))
        if options.json:
            print(json.dumps({"directories": facts, "pairs": found}, indent=2, ensure_ascii=False))
        else:
            print("\n\n".join(render(fact) for fact in facts))
            for pair in found:
                verdict = "fit each other" if pair["fits"] else "do not fit"
                print(f"\n{' and '.join(pair['directories'])} {verdict}" + "".join(f"\n  {n}" for n in pair["notes"]))
        return int(any(fact["problems"] for fact in facts) or not all(pair["fits"] for pair in found))

    return run_main(call)


if __name__ == "__main__":
    raise SystemExit(main())
