"""The card of a directory that is published: metadata that the hub understands, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dcr_mllm.errors import UserError
from dcr_mllm.headers import read_json
from dcr_mllm.machine_paths import name_of
from dcr_mllm.runs import PROVENANCE_FILE, hash_directory

_FRONT = re.compile(r"\A---\n(.*?)\n---\n(.*)\Z", re.DOTALL)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_ORIGINS = ("base_tower", "tower", "llm", "base", "exported", "open_clip", "swapped")
_ADAPTER_CARD = """# {name}: an adapter trained with dcr-mllm

LoRA of rank {r}, alpha {lora_alpha}. Load it with PEFT on the model that it was trained on,
`{base_model_name_or_path}`.
"""


def split_card(text: str, source: Path) -> tuple[dict[str, Any], str]:
    """Metadata and body of a card.

    Raises:
        UserError: It has no metadata, or they are no YAML mapping.
    """
    found = _FRONT.match(text)
    try:
        metadata = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        metadata = None
    if found is None or not isinstance(metadata, dict):
        raise UserError(f"{source} does not begin with YAML metadata between two lines of ---; export the model again")
    return metadata, found[2]


def published_card(
    directory: Path,
    kind: str,
    record: Mapping[str, Any],
    *,
    base_model: str | None,
    license_id: str | None,
    evaluation: Path | None,
) -> str:
    """The card as it is to be published.

    Args:
        directory: What is published; its README.md is the card so far.
        kind: As `dcr_mllm.inspection.kind_of` says, or another word.
        record: Its provenance; empty if it has none of its own.
        base_model: Hub id to state; None takes the ones that provenance leads to.
        license_id: License to state; None takes over the base's, if all bases state the same one, or says unknown.
        evaluation: `tower_evaluation.json` or `results.json` that this directory was measured in.

    Raises:
        UserError: A file is missing, or the evaluation is of other weights.
    """
    source = directory / "README.md"
    if kind == "adapter":  # PEFT writes a form with nothing filled in
        config = read_json(directory / "adapter_config.json")
        metadata: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "dcr"]}
        body = _ADAPTER_CARD.format_map({**config, "name": directory.resolve().name})
    elif kind == "projector" and not source.is_file():
        metadata, body = {"tags": ["dcr"]}, "# A projector from a tower's embedding to a denoiser's condition\n"
    else:
        if not source.is_file():
            raise UserError(f"{source} is missing: every finished export has a card")
        metadata, body = split_card(source.read_text(encoding="utf-8"), source)
    origins = list(origin_paths(record))
    ids = [base_model] if base_model else [name for path in origins if is_hub_id(name := hub_name(path))]
    if not ids and is_hub_id(str(metadata.get("base_model"))):
        ids = [metadata["base_model"]]
    metadata.pop("base_model", None)
    if ids:
        metadata["base_model"] = ids[0] if len(set(ids)) == 1 else sorted(set(ids))
    metadata["license"] = license_id or metadata.get("license") or _inherited_license(origins)
    tags = metadata.get("tags") or []
    metadata["tags"] = list(dict.fromkeys([*tags, "dcr-mllm"]))
    body = body.rstrip() + "\n"
    if evaluation is not None:
        body += "\n" + "\n".join(_measured(evaluation, directory)) + "\n"
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n{body}"


def is_hub_id(name: str) -> bool:
    """Whether a text is `owner/name`, and no folder here."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def hub_name(path: str) -> str:
    """The id behind a path in the hub's cache, an id as it is, else the path's last part."""
    return path if is_hub_id(path) else name_of(path)


def origin_paths(record: Mapping[str, Any], depth: int = 6) -> Iterator[str]:
    """Paths of the published models at the beginning of a chain of provenance, as far as it lies on this machine."""
    nested = [record[key] for key in ("source", "tower") if _is_record(record.get(key))]
    if nested:  # an export carries the provenance of what it was made of
        for inner in nested:
            yield from origin_paths(inner, depth - 1)
        return
    for key in _ORIGINS:
        value = record.get(key)
        entries = value.values() if key == "swapped" and isinstance(value, dict) else [value]
        for entry in entries:
            path = entry.get("path") if isinstance(entry, dict) else None
            if not isinstance(path, str):
                continue
            earlier = Path(path) / PROVENANCE_FILE
            if depth and earlier.is_file():
                yield from origin_paths(read_json(earlier), depth - 1)
            elif key != "open_clip":
                yield path


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and "path" not in value and any(key in value for key in (*_ORIGINS, "config"))


def _inherited_license(origins: list[str]) -> str:
    """The license that the cards of all bases state, where they lie on this machine and agree."""
    stated = set()
    for path in origins:
        card = Path(path) / "README.md"
        found = _FRONT.match(card.read_text(encoding="utf-8")) if card.is_file() else None
        metadata = yaml.safe_load(found[1]) if found else None
        license_id = metadata.get("license") if isinstance(metadata, dict) else None
        stated.add(license_id if isinstance(license_id, str) else None)
    return next(iter(stated)) or "unknown" if len(stated) == 1 else "unknown"


def _measured(evaluation: Path, directory: Path) -> Iterator[str]:
    """A table of comparisons with the baseline: n, both scores, the difference and its interval, and the p value."""
    stored, own = read_json(evaluation), hash_directory(directory)
    hashes = stored.get("model_hashes") or {
        name: entry.get("description", {}).get("sha256") for name, entry in (stored.get("towers") or {}).items()
    }
    name = next((name for name, value in hashes.items() if value == own and name in stored["comparisons"]), None)
    if name is None:
        raise UserError(
            f"{evaluation} compares {', '.join(sorted(stored.get('comparisons') or {})) or 'nothing'} with a baseline, "
            f"and none of them has the weights of {directory}; evaluate it, or leave --evaluation out"
        )
    yield from ("## Measured", "", "Against the model it was made from, same code, data and order; 95 % intervals.", "")
    yield from ("| benchmark | n | baseline | this | difference | p (Holm) |", "|---|---|---|---|---|---|")
    comparison = stored["comparisons"][name]
    for task, entry in comparison.get("measures", comparison).items():
        if "headline" in entry:  # of LLaVAs: one line per task
            score, amount = entry["measures"][entry["headline"]], _amount(entry.get("test", ""))
            label, this = f"{task}, {entry['headline']}", score["model"]
        else:
            score, amount, label, this = entry, str(entry.get("num_units", "")), task, entry["tower"]
        low, high = score["interval"]
        p = entry.get("p_holm")
        difference = f"{score['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
        shown = "" if p is None else f"{p:.2g}"
        yield f"| {label} | {amount} | {score['base']:.1f} | {this:.1f} | {difference} | {shown} |"
    for caution in comparison.get("cautions") or ():
        yield f"\n{caution}"


def _amount(test: str) -> str:
    """`900 pairs` of `exact McNemar on 900 pairs`."""
    found = re.search(r"\d[\d,]* \w+", test)
    return found[0] if found else ""
