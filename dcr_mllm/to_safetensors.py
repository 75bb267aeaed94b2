"""Model directories whose weights are pickles (`pytorch_model.bin`), written again as safetensors.

Older repositories have nothing else, and nothing here loads pickles. They are read with `weights_only=True`, which runs
no code of theirs, one file at a time.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcr_mllm.cli import run_main
from dcr_mllm.errors import UserError
from dcr_mllm.headers import read_json, resolve_weights
from dcr_mllm.runs import atomic_directory

if TYPE_CHECKING:
    from torch import Tensor

_KEPT = (".json", ".txt", ".model", ".jinja", ".safetensors")
_INDEX = ".bin.index.json"


def convert(source: Path, out: str | Path) -> list[Path]:
    """Write a model directory, with its sub-folders, that has safetensors where the source has pickles.

    Args:
        source: Directory with `*.bin` weights in one or several files, config, processor and tokenizer.
        out: Directory to write; it must not exist.

    Returns:
        The converted files, relative to `source`.

    Raises:
        UserError: There are no such weights, or a file holds something else than tensors.
    """
    pickles = sorted(file for file in source.rglob("*.bin") if _is_weights(file))
    if not pickles:
        raise UserError(f"{source} has no weights as .bin files, so there is nothing to convert")
    with atomic_directory(out) as temporary:
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            target = temporary / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file in pickles:
                _convert_file(file, target.with_name(_new_name(file.name)))
            elif file.name.endswith(_INDEX):
                index = read_json(file)
                index["weight_map"] = {name: _new_name(shard) for name, shard in index["weight_map"].items()}
                name = _new_name(file.name.removesuffix(".index.json")) + ".index.json"
                target.with_name(name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            elif file.suffix in _KEPT:
                shutil.copyfile(file, target)
    return [file.relative_to(source) for file in pickles]


def _is_weights(file: Path) -> bool:
    return file.name.startswith(("pytorch_model", "diffusion_pytorch_model"))


def _new_name(name: str) -> str:
    """`pytorch_model-00001-of-00002.bin` -> `model-00001-of-00002.safetensors`, as the libraries look for it."""
    if name.startswith("pytorch_model"):
        name = name.removeprefix("pytorch_")
    return name.removesuffix(".bin") + ".safetensors"


def read_pickle(file: Path) -> Any:
    """What a pickled weight file holds, read without running anything in it.

    Raises:
        UserError: It holds Python objects, or a program (TorchScript), or is damaged.
    """
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        # TorchScript archives end here too: they are programs. OpenAI's own downloads are such.
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file} cannot be read as plain tensors ({detail[:120]}); save its state_dict alone, with a library that "
            "you trust it to"
        ) from None


def _convert_file(file: Path, target: Path) -> None:
    from safetensors.torch import save_file
    from torch import Tensor

    state = read_pickle(file)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} holds more than named tensors; a training checkpoint has to be unpacked first")
    save_file(_own_memory(state), target, metadata={"format": "pt"})


def _own_memory(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory: safetensors stores neither strides nor aliases (tied weights)."""
    seen: set[int] = set()
    own = {}
    for name, value in state.items():
        address = value.untyped_storage().data_ptr()
        own[name] = value.clone().contiguous() if address in seen else value.contiguous()
        seen.add(address)
    return own


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="dcr-mllm to-safetensors", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", metavar="DIR", help="model directory, or a downloaded Hugging Face id")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    options = parser.parse_args(argv)

    def call() -> None:
        names = convert(resolve_weights(options.source, "llm"), options.out)
        print(f"{options.out}: converted {', '.join(map(str, names))}")

    return run_main(call)
