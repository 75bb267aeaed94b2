"""`dcr-mllm swap LLAVA TOWER OUT`: put another tower of the same shape into a LLaVA directory, without training.

Works on the files, shard by shard: every tensor that is not the tower's keeps its bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from dcr_mllm.cli import run_main
from dcr_mllm.headers import read_json, resolve_weights
from dcr_mllm.llava_headers import UNREAD, check_swap, llava_summary, tower_tensor, vision_summary
from dcr_mllm.log import get_logger
from dcr_mllm.runs import PROVENANCE_FILE, atomic_directory, hash_directory, write_json_atomic

logger = get_logger(__name__)

_COPIED = (".json", ".txt", ".model", ".jinja")


def swap(llava: str | Path, tower: str | Path, out: str | Path, *, legacy_keys: bool = False) -> Path:
    """Write a LLaVA that has another tower.

    Args:
        llava: LLaVA directory.
        tower: CLIP or SigLIP directory whose image side has the shapes of the one that is replaced.
        out: Directory to write; must not exist.
        legacy_keys: Write tensor names for older readers, see `legacy_name`.

    Returns:
        `out`.

    Raises:
        UserError: The shapes differ (says which), or `out` exists.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    from dcr_mllm.llava import image_processor, load_processor
    from dcr_mllm.towers import vision_tensors

    before, after = llava_summary(llava), vision_summary(tower)
    check_swap(before, after)
    new = vision_tensors(after.path)
    index: dict[str, str] = {}
    with atomic_directory(out) as temporary:
        for source in sorted(before.path.iterdir()):
            if source.name.endswith(".safetensors"):
                with safe_open(source, framework="pt") as file:
                    state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                for name in list(state):
                    own = tower_tensor(name)
                    if own is not None and not (own not in new and own.startswith(UNREAD)):
                        state[name] = new[own].to(state[name].dtype).contiguous()
                    if legacy_keys:
                        state[legacy_name(name)] = state.pop(name)
                index.update(dict.fromkeys(state, source.name))
                save_file(state, temporary / source.name, metadata={"format": "pt"})
            elif source.suffix in _COPIED and source.name != PROVENANCE_FILE:
                shutil.copyfile(source, temporary / source.name)
        for file in temporary.glob("*.safetensors.index.json"):
            stored = read_json(file)
            write_json_atomic(file, {**stored, "weight_map": index})
        _write_config(temporary / "config.json", after.path)
        # The new tower may have been trained with another mean, std or resampling.
        processor = load_processor(before.path)
        pads = getattr(processor.image_processor, "do_pad", False)
        processor.image_processor = image_processor(after.path, "pad" if pads else "square")
        processor.save_pretrained(temporary)
        write_json_atomic(
            temporary / PROVENANCE_FILE,
            {
                "swapped": {
                    "llava": {"path": str(before.path), "sha256": hash_directory(before.path)},
                    "tower": {"path": str(after.path), "sha256": hash_directory(after.path)},
                }
            },
        )
    logger.info("%s: %s with the tower of %s; its projector was trained with another tower", out, llava, tower)
    return Path(out)


def legacy_name(name: str) -> str:
    """The name of a tensor as transformers before 5 and vLLM know it: `vision_tower.vision_model.*`."""
    own = tower_tensor(name)
    return name if own is None else f"vision_tower.vision_model.{own}"


def _write_config(path: Path, tower: Path) -> None:
    """Take over what the new tower's config says beside its shapes, such as its activation."""
    config, own = read_json(path), read_json(tower / "config.json")
    vision = own.get("vision_config", own)
    config["vision_config"] = {**config["vision_config"], **{k: v for k, v in vision.items() if k != "dtype"}}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="dcr-mllm swap", description=__doc__.splitlines()[0])
    parser.add_argument("llava", metavar="LLAVA", help="LLaVA directory, or the Hugging Face id of a downloaded one")
    parser.add_argument("tower", metavar="TOWER", help="CLIP or SigLIP directory of the same shape")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument("--legacy-keys", action="store_true", help="tensor names for older transformers and vLLM")
    options = parser.parse_args(argv)

    def call() -> None:
        llava, tower = resolve_weights(options.llava, "llava"), resolve_weights(options.tower, "tower")
        print(swap(llava, tower, options.out, legacy_keys=options.legacy_keys))

    return run_main(call)
