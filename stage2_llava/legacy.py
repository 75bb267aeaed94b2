"""Files as older readers have them: transformers 4, and the original LLaVA repository on top of 4.37.

Everything here turns what lies on disk into what would lie there in an older layout; no model is loaded.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dcr_mllm.errors import UserError
from dcr_mllm.headers import read_json
from dcr_mllm.runs import write_json_atomic

# Written by transformers 5 only, or about the machine that wrote it.
_NEW_KEYS = ("dtype", "rope_parameters", "transformers_version", "_name_or_path", "architectures")
_TOKENIZER_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "model_max_length", "padding_side")
_IMAGE_KEYS = (
    "crop_size", "do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "image_mean",
    "image_std", "resample", "rescale_factor", "size",
)  # fmt: skip


def text_config(stored: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A language model's config with all of its keys, in transformers 4's terms.

    Args:
        stored: `text_config` of a LLaVA; what it leaves out gets the library's default.
        dtype: Of the weights, as `torch_dtype` is to say.
    """
    from transformers import CONFIG_MAPPING

    full = CONFIG_MAPPING[stored.get("model_type", "llama")](**{k: v for k, v in stored.items() if k != "model_type"})
    old = _without_new_keys(full.to_diff_dict())
    rope = dict(full.rope_parameters or {})
    old["rope_theta"] = rope.pop("rope_theta", 10000.0)
    kind = rope.pop("rope_type", "default")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, "rope_type": kind, **rope}
    return {**old, "torch_dtype": dtype}


def vision_config(stored: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A tower's config with all of its keys, in transformers 4's terms.

    Args:
        stored: `vision_config` of a LLaVA or of a full tower.
        dtype: Of the weights.
    """
    from transformers import CONFIG_MAPPING

    kind = stored.get("model_type", "clip_vision_model")
    full = CONFIG_MAPPING[kind](**{k: v for k, v in stored.items() if k != "model_type"})
    return {**_without_new_keys(full.to_diff_dict()), "torch_dtype": dtype}


def stored_image_processor(directory: Path) -> dict[str, Any]:
    """The image processor's settings from either of the two files that may hold them."""
    source = directory / "preprocessor_config.json"
    if not source.is_file() and (directory / "processor_config.json").is_file():
        return read_json(directory / "processor_config.json").get("image_processor") or {}
    return read_json(source)


def preprocessor_config(directory: Path, kind: str) -> dict[str, Any]:
    """`preprocessor_config.json` of a model that has it inside `processor_config.json`, or has it already.

    Args:
        directory: A tower or a LLaVA.
        kind: Name of the image processor's class.
    """
    stored = stored_image_processor(directory)
    settings = {key: stored[key] for key in _IMAGE_KEYS if stored.get(key) is not None}
    if kind == "LlavaImageProcessor":
        settings["do_pad"] = bool(stored.get("do_pad", False))
    return {**settings, "image_processor_type": kind}


def write_tokenizer(source: Path, out: Path, *, splits: bool = False) -> None:
    """Tokenizer files that transformers 4 reads, giving the same ids.

    Merges become text again, and the class is the one that takes `tokenizer.json` as it is, with `use_fast=False` too.

    Args:
        source: A directory with `tokenizer.json`.
        out: Where to write.
        splits: For tokenizers before 0.19, whose Metaspace always splits at spaces: one that does not is written as the
            normalizer that Llama had before. They differ behind special tokens only, where that one puts a space.

    Raises:
        UserError: There is no `tokenizer.json`, or a merge cannot be written as text.
    """
    tokenizer = read_json(source / "tokenizer.json")
    model = tokenizer["model"]
    if any(" " in piece for pair in model.get("merges", ()) if isinstance(pair, list) for piece in pair):
        raise UserError(f"{source / 'tokenizer.json'} merges pieces with spaces, which older tokenizers cannot read")
    if "merges" in model:
        model["merges"] = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    step = tokenizer.get("pre_tokenizer") or {}
    if step.get("type") == "Metaspace":
        prefix = step.get("prepend_scheme", "always") != "never"
        step.setdefault("add_prefix_space", prefix)  # older versions want to be told of the prefix in a second way
        if splits and step.get("split") is False:
            tokenizer["normalizer"] = _as_normalizer(tokenizer.get("normalizer"), step["replacement"], prefix)
            tokenizer["pre_tokenizer"] = None
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    stored = read_json(source / "tokenizer_config.json")
    kept = {key: _text(stored[key]) for key in _TOKENIZER_KEYS if stored.get(key) is not None}
    write_json_atomic(out / "tokenizer_config.json", {**kept, "tokenizer_class": "PreTrainedTokenizerFast"})


def copy_slow_tokenizer(llm: Path, llava: Path, out: Path) -> None:
    """Take the SentencePiece tokenizer of a language model, which is what the original LLaVA trains and evaluates with.

    Raises:
        UserError: The directory has none, or it is not the vocabulary that the LLaVA was made with.
    """
    from transformers import AutoTokenizer

    if not (llm / "tokenizer.model").is_file():
        raise UserError(f"{llm / 'tokenizer.model'} is missing: --tokenizer takes the directory of the language model")
    theirs, ours = (AutoTokenizer.from_pretrained(path, local_files_only=True).get_vocab() for path in (llm, llava))
    odd = next((token for token in sorted(theirs) if ours.get(token) != theirs[token]), None)
    if odd is not None:
        raise UserError(f"token {odd!r} is {theirs[odd]} in {llm} and {ours.get(odd)} in {llava}: another vocabulary")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (llm / name).is_file():
            shutil.copyfile(llm / name, out / name)


def _as_normalizer(own: Any, replacement: str, prefix: bool) -> dict[str, Any]:
    steps = [own] if own else []
    steps += [{"type": "Prepend", "prepend": replacement}] if prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": replacement})
    return {"type": "Sequence", "normalizers": steps}


def _text(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def _without_new_keys(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _NEW_KEYS and value is not None}
