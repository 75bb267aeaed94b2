"""LLaVA directories out of training: an aligned one, an adapter merged into its base, and the card beside them."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dcr_mllm.cli import run_main
from dcr_mllm.errors import UserError
from dcr_mllm.headers import read_json, resolve_weights
from dcr_mllm.llava import load_llava, load_processor
from dcr_mllm.llava_headers import llava_summary
from dcr_mllm.runs import PROVENANCE_FILE, atomic_directory, hash_directory, write_json_atomic
from stage2_llava.swap import legacy_name

MERGED = "merged_adapter"
"""Key in `provenance.json` of a LLaVA that an adapter was merged into."""


def module_hash(module: nn.Module) -> str:
    """SHA-256 over names, types and bytes of a module's parameters: equal exactly if nothing changed."""
    digest = hashlib.sha256()
    for name, value in sorted(module.named_parameters()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_llava(
    model: nn.Module, processor: Any, out: Path, record: dict[str, Any], *, legacy_keys: bool = False
) -> None:
    """Fill a directory with everything that loading and serving a LLaVA takes.

    Args:
        model: `LlavaForConditionalGeneration`, nothing wrapped.
        processor: The one that trained.
        out: An existing directory.
        record: Provenance.
        legacy_keys: Tensor names for older readers.
    """
    model.save_pretrained(out)
    processor.save_pretrained(out)
    if legacy_keys:
        rename_tensors(out)
    write_json_atomic(out / PROVENANCE_FILE, record)
    (out / "README.md").write_text(_card(record), encoding="utf-8")


def rename_tensors(directory: Path) -> None:
    """Give the tensors of a LLaVA directory their legacy names, in place."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            state = {legacy_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        save_file(state, path, metadata={"format": "pt"})
    for path in directory.glob("*.safetensors.index.json"):
        stored = read_json(path)
        stored["weight_map"] = {legacy_name(name): shard for name, shard in stored["weight_map"].items()}
        path.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def check_merge(base: Path, adapter: Path) -> None:
    """Refuses to merge an adapter into what is a merge already; whether its shapes fit shows when it is loaded.

    Raises:
        UserError: See above, or `adapter` is no adapter.
    """
    llava_summary(base)
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{adapter / 'adapter_config.json'} is missing: {adapter} is no PEFT adapter")
    if (base / PROVENANCE_FILE).is_file() and MERGED in read_json(base / PROVENANCE_FILE):
        merged = read_json(base / PROVENANCE_FILE)[MERGED]
        raise UserError(
            f"{base} has the adapter {merged['path']} merged in already; merge into the LLaVA that the adapter was "
            f"trained on, {read_json(adapter / 'adapter_config.json').get('base_model_name_or_path')}"
        )


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    record: dict[str, Any] | None = None,
    *,
    processor: Any = None,
    dtype: torch.dtype | str = "auto",
    legacy_keys: bool = False,
) -> Path:
    """Merge an adapter (LoRA and projector) into its LLaVA and write a plain LLaVA directory.

    Args:
        base: The LLaVA that the adapter was trained on.
        adapter: PEFT directory: a run's `adapter/`, or any of its checkpoints.
        out: Directory to write; must not exist.
        record: Provenance to store beside what is added here.
        processor: The one that trained; None takes the base's.
        dtype: Of the result; `auto` keeps the base's.
        legacy_keys: Tensor names for older readers.

    Returns:
        `out`.

    Raises:
        UserError: `base` is a merge already, or the adapter was made for another model.
    """
    from peft import PeftModel

    base, adapter = Path(base), Path(adapter)
    check_merge(base, adapter)
    model = load_llava(base, dtype)
    before = module_hash(model.model.vision_tower)
    try:
        wrapped = PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the adapter {adapter} does not fit {base}: {reason}") from None
    merged = wrapped.merge_and_unload()
    after = module_hash(merged.model.vision_tower)
    if before != after:
        raise RuntimeError(f"merging {adapter} into {base} changed the vision tower; nothing was written")
    with atomic_directory(out) as temporary:
        facts = {
            **(record or {}),
            MERGED: {"path": str(adapter), "sha256": hash_directory(adapter)},
            "base": {"path": str(base), "sha256": hash_directory(base)},
            "tower_parameters_sha256": after,
        }
        save_llava(merged, processor or load_processor(base), temporary, facts, legacy_keys=legacy_keys)
    return Path(out)


def with_state(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A model with some of its parameters replaced, by name."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)
    return model


def _card(record: dict[str, Any]) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", "tags: [llava, dcr]", "---"]
    lines += ["# LLaVA, trained with dcr-mllm", ""]
    rows = [
        (name, record[key]["path"] if isinstance(record[key], dict) else record[key])
        for key, name in (
            ("tower", "vision tower"),
            ("llm", "language model"),
            ("base", "trained from"),
            (MERGED, "merged adapter"),
            ("template", "prompt template"),
            ("phase", "last phase"),
            ("steps", "optimizer steps"),
            ("data", "data"),
        )
        if record.get(key) is not None
    ]
    lines += ["| | |", "|---|---|", *(f"| {name} | `{value}` |" for name, value in rows), ""]
    lines += [
        "Load with `LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor.from_pretrained(DIR, "
        'backend="pil")`; the processor and its chat template are those of the training. Everything that made it is in '
        "`provenance.json`.",
        "",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """`dcr-mllm merge BASE ADAPTER OUT`; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="dcr-mllm merge", description="Merge an adapter into the LLaVA it was made on."
    )
    parser.add_argument("base", metavar="BASE", help="the LLaVA that the adapter was trained on")
    parser.add_argument("adapter", metavar="ADAPTER", help="a run's adapter/, or a checkpoint of its instruct phase")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument("--legacy-keys", action="store_true", help="tensor names for older transformers and vLLM")
    options = parser.parse_args(argv)

    def call() -> None:
        base = resolve_weights(options.base, "llava")
        print(merge(base, options.adapter, options.out, legacy_keys=options.legacy_keys))

    return run_main(call)
