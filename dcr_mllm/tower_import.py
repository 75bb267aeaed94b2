"""`dcr-mllm import-tower SOURCE OUT --base BASE`: released weights as a tower directory that every stage takes.

Peers release weights alone: a `config.json` with a pickle, or a state dict in OpenAI's or open_clip's layout, sometimes
with a whole diffusion model around it. Processor, tokenizer and configuration come from the tower that they started
from, and every shape is checked against it. Pickles are read as plain tensors only.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcr_mllm.cli import run_main
from dcr_mllm.errors import UserError
from dcr_mllm.headers import TOWER_TYPES, read_json, resolve_weights, tower_summary
from dcr_mllm.open_clip_names import to_hugging_face
from dcr_mllm.runs import PROVENANCE_FILE, atomic_directory, hash_directory, sha256_file, write_json_atomic
from dcr_mllm.siglip_names import ANCHOR as TIMM_ANCHOR
from dcr_mllm.to_safetensors import read_pickle

# The tensor that tells a layout; whatever stands before it is what the weights were wrapped in.
_ANCHORS = {
    "vision_model.embeddings.patch_embedding.weight": "Hugging Face",
    "visual.conv1.weight": "OpenAI",
    TIMM_ANCHOR: "open_clip with timm",
}
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
# Numbers that OpenAI's models carry among their weights.
_SCALARS = ("input_resolution", "context_length", "vocab_size")
# What vision-only weights lack: it is frozen in every method of this kind, and so is the base's.
_FROM_BASE = ("text_model.", "text_projection.", "visual_projection.", "logit_")
_WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was found in released weights.

    Attributes:
        layout: `Hugging Face`, `OpenAI` or `open_clip with timm`.
        prefix: what stood before the tower's names.
        num_left_out: tensors of other models around the tower.
        from_base: tensors that the weights lack and the base gave.
        num_different: tensors that are not the base's.
        num_tensors: all of the tower.
    """

    path: Path
    layout: str
    prefix: str
    num_left_out: int
    from_base: list[str]
    num_different: int
    num_tensors: int

    def describe(self) -> str:
        """One line per fact that a user should look at."""
        lines = [f"{self.path}: {self.num_tensors} tensors in the layout of {self.layout}"]
        if self.prefix:
            lines.append(f"taken from below {self.prefix!r}; {self.num_left_out} other tensors are left out")
        if self.from_base:
            lines.append(
                f"not in the weights, hence the base's: {len(self.from_base)} tensors ({self.from_base[0]}, ...)"
            )
        lines.append(f"{self.num_different} tensors differ from the base")
        return "\n".join(lines)


def import_tower(source: str | Path, out: str | Path, base: str | Path) -> Imported:
    """Make a tower directory of released weights.

    Args:
        source: a directory with weights, a weight file, or a cached hub id.
        out: directory to write; must not exist.
        base: directory or cached hub id of the tower that the weights started from, its own weights in safetensors or
            pickled; gives configuration, processor and tokenizer.

    Returns:
        What was found; `out` holds an fp32 model in safetensors with processor, tokenizer and provenance.

    Raises:
        UserError: the weights cannot be read as plain tensors, are in no known layout, or do not fit the base.
    """
    source = Path(source) if Path(source).exists() else resolve_weights(source, "tower")
    skeleton = resolve_weights(base, "tower")
    model = _empty_model(skeleton)
    expected = {name: value.shape for name, value in model.state_dict().items() if not name.endswith("position_ids")}
    _check_beside(skeleton, model.config.text_config.vocab_size)
    _check_config(source, skeleton, model.config)

    files = _weight_files(source)
    stored = read_tensors(files)
    layout, prefix = find_layout(stored, source)
    inside = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    num_left_out = len(stored) - len(inside)
    state = _hugging_face_names(inside, layout)
    base_state = read_tensors(_weight_files(skeleton))
    lacking = next((name for name in expected if name not in base_state), None)
    if lacking is not None:
        raise UserError(f"{skeleton} lacks {lacking}, which its config.json calls for; download it again")
    from_base = _complete(state, expected, base_state, source)
    _check_shapes(state, expected, source, skeleton)
    num_different = sum(
        not torch.equal(state[name].float(), base_state[name].float().reshape(shape))
        for name, shape in expected.items()
    )

    model.load_state_dict({name: state[name].float().contiguous() for name in expected}, strict=False, assign=True)
    model.config.dtype = torch.float32
    found = Imported(
        path=Path(out),
        layout=layout,
        prefix=prefix,
        num_left_out=num_left_out,
        from_base=from_base,
        num_different=num_different,
        num_tensors=len(expected),
    )
    with atomic_directory(out) as temporary:
        model.save_pretrained(temporary)
        _copy_beside(skeleton, temporary)
        tower_summary(temporary)
        record = {
            "imported": {
                "path": str(source),
                "sha256": {file.name: sha256_file(file) for file in files},
                **_facts(found),
            },
            "base_tower": {"path": str(skeleton), "sha256": hash_directory(skeleton)},
        }
        write_json_atomic(temporary / PROVENANCE_FILE, record)
    return found


def read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of weight files, whatever they are wrapped in; nothing else is loaded.

    Raises:
        UserError: a file holds Python objects or a program (TorchScript), or no tensors.
    """
    return {name: value for file in files for name, value in _read_file(file).items()}


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        data: Any = load_file(path)
    else:
        data = read_pickle(path)
    while isinstance(data, dict) and (wrapper := next((w for w in _WRAPPERS if isinstance(data.get(w), dict)), None)):
        data = data[wrapper]
    tensors = (
        {name: value for name, value in data.items() if isinstance(value, Tensor)} if isinstance(data, dict) else {}
    )
    if not tensors:
        raise UserError(f"{path} holds no named tensors; a state dict is needed")
    return tensors


def find_layout(tensors: dict[str, Tensor], source: Path) -> tuple[str, str]:
    """Layout of a tower among tensors, and what stands before its names.

    Raises:
        UserError: there is no tower, there are several, or a LoRA lies beside it unmerged.
    """
    found = {
        (layout, name.removesuffix(anchor))
        for name in tensors
        for anchor, layout in _ANCHORS.items()
        if name == anchor or name.endswith(f".{anchor}")
    }
    if len(found) != 1:
        what = (
            f"{len(found)} towers ({', '.join(sorted(repr(prefix) for _, prefix in found))})" if found else "no tower"
        )
        raise UserError(f"{source} holds {what}; one whose names end with {' or '.join(_ANCHORS)} is needed")
    layout, prefix = found.pop()
    adapter = next((name for name in tensors if name.startswith(prefix) and ".lora_" in name), None)
    if adapter is not None:
        raise UserError(f"{source} holds a LoRA that is not merged ({adapter}); merge it with PEFT before importing")
    return layout, prefix


def _hugging_face_names(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    kept = {
        name: value for name, value in tensors.items() if name not in _SCALARS and not name.endswith("position_ids")
    }
    return kept if layout == "Hugging Face" else to_hugging_face(kept)


def _empty_model(skeleton: Path) -> Any:
    """A model without memory, to know every name and shape."""
    from transformers import AutoConfig, AutoModel

    kind = read_json(skeleton / "config.json").get("model_type")
    if kind not in TOWER_TYPES:
        raise UserError(f"{skeleton} has model_type {kind!r}, expected a tower: {', '.join(TOWER_TYPES)}")
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.from_pretrained(skeleton))


def _check_beside(skeleton: Path, vocab_size: int) -> None:
    """Refuses a base without processor or tokenizer."""
    from transformers import AutoTokenizer

    names = {file.name for file in skeleton.iterdir()}
    if not {"preprocessor_config.json", "processor_config.json"} & names:
        raise UserError(f"{skeleton} has no image processor; name the original tower with --base")
    length = len(AutoTokenizer.from_pretrained(skeleton))
    # Without its files the library makes up a tokenizer of a few tokens; with them some vocabularies keep spare rows.
    if not 0.9 * vocab_size <= length <= vocab_size:
        raise UserError(
            f"{skeleton} has a tokenizer of {length} tokens for a vocabulary of {vocab_size}; name the original tower "
            "with --base"
        )


def _check_config(source: Path, skeleton: Path, config: Any) -> None:
    """Refuses what shapes cannot tell, where a release says it itself."""
    from transformers import AutoConfig

    if not (source / "config.json").is_file():
        return
    stated = AutoConfig.from_pretrained(source)
    for part in ("vision_config", "text_config"):
        for key in ("hidden_act", "num_attention_heads", "layer_norm_eps", "image_size"):
            own, other = (getattr(getattr(some, part, None), key, None) for some in (stated, config))
            if own is not None and own != other:
                raise UserError(
                    f"{source / 'config.json'} has {part}.{key} {own}, {skeleton} {other}: name another --base"
                )


def _weight_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    for name in _WEIGHTS:
        if (source / name).is_file():
            shards = sorted(set(read_json(source / name)["weight_map"].values())) if name.endswith(".json") else [name]
            return [source / shard for shard in shards]
    others = sorted(file for file in source.iterdir() if file.suffix in _SUFFIXES)
    if len(others) != 1:
        names = ", ".join(file.name for file in others) or "none"
        raise UserError(f"{source} should hold one weight file, found {names}; name the file itself")
    return others


def _complete(
    state: dict[str, Tensor], expected: dict[str, torch.Size], base: dict[str, Tensor], source: Path
) -> list[str]:
    """Fill in what vision-only weights lack, whole groups at a time; returns the names."""
    missing = [name for name in expected if name not in state]
    groups = {group for name in missing for group in _FROM_BASE if name.startswith(group)}
    torn = [name for name in missing if not name.startswith(_FROM_BASE)]
    torn += [name for name in state if name in expected and name.startswith(tuple(groups))]
    if torn:
        raise UserError(
            f"{source} lacks {missing[0]} ({len(missing)} of {len(expected)} tensors of this kind of tower); is it "
            "whole, and is --base the tower that it started from?"
        )
    state.update({name: base[name] for name in missing})
    return missing


def _check_shapes(state: dict[str, Tensor], expected: dict[str, torch.Size], source: Path, skeleton: Path) -> None:
    table = "text_model.embeddings.token_embedding.weight"
    rows, own = state[table].shape[0], expected[table][0]
    if rows != own:
        raise UserError(f"{source} has a vocabulary of {rows}, {skeleton} one of {own}: name another --base")
    unknown = [name for name in state if name not in expected]
    if unknown:
        raise UserError(f"{source} has {unknown[0]} ({len(unknown)} such tensors), which {skeleton} has not")
    for name, shape in expected.items():
        # A scale is a number to some and a list of one number to others.
        if state[name].numel() == shape.numel() == 1:
            state[name] = state[name].reshape(shape)
        if state[name].shape != shape:
            raise UserError(
                f"{source} has {name} of shape {list(state[name].shape)}, {skeleton} {list(shape)}: name another --base"
            )


def _copy_beside(skeleton: Path, out: Path) -> None:
    """Processor and tokenizer files, byte for byte."""
    for file in skeleton.iterdir():
        own = file.name == PROVENANCE_FILE or file.name.endswith(".index.json") or (out / file.name).exists()
        if file.suffix in (".json", ".txt", ".model", ".jinja") and not own:
            shutil.copyfile(file, out / file.name)


def _facts(found: Imported) -> dict[str, Any]:
    return {
        "layout": found.layout,
        "prefix": found.prefix,
        "left_out": found.num_left_out,
        "from_base": found.from_base,
        "different_from_base": found.num_different,
    }


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="dcr-mllm import-tower", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", metavar="SOURCE", help="directory, weight file or cached hub id")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument(
        "--base", metavar="BASE", required=True, help="tower that they started from: gives config, processor, tokenizer"
    )
    options = parser.parse_args(argv)
    return run_main(lambda: print(import_tower(options.source, options.out, options.base).describe()))


if __name__ == "__main__":
    import sys

    sys.exit(main())
