"""What a model directory is: facts for `dcr-mllm inspect`, from JSON files and safetensors headers alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dcr_mllm.denoiser_headers import DENOISER_PARTS, denoiser_summary
from dcr_mllm.errors import UserError
from dcr_mllm.headers import (
    TOWER_TYPES,
    TensorHeader,
    read_json,
    read_safetensors_header,
    read_weights,
    tower_summary,
    weight_file,
)
from dcr_mllm.llava_headers import llava_summary, llm_summary, projector_shape, vision_summary
from dcr_mllm.llava_names import part_of
from dcr_mllm.runs import PROVENANCE_FILE

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I8": "int8"}
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# Facts of a provenance.json that say what something was made of; other files' paths shrink to names.
_PROVENANCE = (
    "base_tower", "tower", "llm", "base", "merged_adapter", "denoiser", "swapped", "exported", "open_clip", "data",
    "phase", "steps", "seeds", "template", "precision", "created",
)  # fmt: skip


def kind_of(directory: Path) -> str:
    """`tower`, `denoiser`, `llava`, `llm`, `projector` or `adapter`.

    Raises:
        UserError: It is none of them; says what it looks like.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory; give a model directory")
    if (directory / "unet").is_dir() or (directory / "model_index.json").is_file():
        return "denoiser"
    if (directory / "adapter_config.json").is_file():
        return "adapter"
    if not (directory / "config.json").is_file():
        hint = "; it is in open_clip's layout" if (directory / "open_clip_config.json").is_file() else ""
        hint = hint or ("; it is a run, give a folder in it" if (directory / "config.yaml").is_file() else "")
        raise UserError(f"{directory / 'config.json'} is missing, so this is no model directory{hint}")
    config = read_json(directory / "config.json")
    kind = str(config.get("model_type"))
    if kind == "llava":
        return "llava"
    if "input_width" in config and "output_width" in config:
        return "projector"
    if kind in TOWER_TYPES or kind.endswith("_vision_model"):
        return "tower"
    if kind.startswith("llava_"):
        raise UserError(f"{directory} is a LLaVA in the original layout ({kind}), which is written here but not read")
    return "llm"


def inspect(directory: Path) -> dict[str, Any]:
    """Facts about a directory, ready for JSON.

    Returns:
        `path`, `kind`, the facts of its kind, and `problems`: sentences about what does not fit inside it.

    Raises:
        UserError: A file is missing or damaged, or it contradicts itself so that it cannot be loaded.
    """
    kind = kind_of(directory)
    facts = _KINDS[kind](directory)
    problems = facts.pop("problems", [])
    provenance = _provenance(directory)
    return {
        "path": str(directory),
        "kind": kind,
        **facts,
        **({"provenance": provenance} if provenance else {}),
        "problems": problems,
    }


def _tower(directory: Path) -> dict[str, Any]:
    config = read_json(directory / "config.json")
    image, full = vision_summary(directory), config.get("model_type") in TOWER_TYPES
    summary = tower_summary(directory) if full else None
    vision = config.get("vision_config") or {} if full else config
    tensors = read_weights(directory)
    processor, problems = _processor(directory, image.image_size)
    rows = tensors.get("text_model.embeddings.token_embedding.weight")
    tokenizer, more = _tokenizer(directory, rows.shape[0] if rows else None) if rows else (None, [])
    text = config.get("text_config") or {}
    return {
        "model_type": config.get("model_type"),
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "image_tokens": image.image_tokens,
        "class_token": image.num_additional_image_tokens == 1,
        "layers": image.num_layers,
        "width": image.hidden_size,
        "heads": vision.get("num_attention_heads"),
        "activation": vision.get("hidden_act"),
        "embedding_width": summary.width if summary else None,
        "text_side": {"vocabulary": rows.shape[0], "length": text.get("max_position_embeddings")} if rows else None,
        "weights": _weights(directory, tensors),
        "processor": processor,
        "tokenizer": tokenizer,
        "problems": problems + more,
    }


def _denoiser(directory: Path) -> dict[str, Any]:
    summary = denoiser_summary(directory)
    scheduler = read_json(directory / "scheduler" / "scheduler_config.json")
    unet = read_json(directory / "unet" / "config.json")
    problems = []
    if summary.cross_attention_dim != summary.text_width:
        problems.append(
            f"the UNet takes conditions of width {summary.cross_attention_dim}, the text encoder gives "
            f"{summary.text_width}: stage 1 refuses it"
        )
    if summary.addition_embed_type is not None:
        problems.append(f"addition_embed_type {summary.addition_embed_type!r}: an SDXL-like model, stage 1 refuses it")
    return {
        "cross_attention_width": summary.cross_attention_dim,
        "text_width": summary.text_width,
        "prediction_type": summary.prediction_type,
        "latent_channels": summary.latent_channels,
        "vae_factor": summary.vae_scale,
        "unet_factor": summary.unet_scale,
        "native_size": unet["sample_size"] * summary.vae_scale if isinstance(unet.get("sample_size"), int) else None,
        "scheduler": f"{scheduler.get('_class_name')}, {scheduler.get('num_train_timesteps', 1000)} steps",
        "variant": summary.variant,
        "weights": {
            part: _weights(directory / part, read_weights(directory / part))
            for part in DENOISER_PARTS
            if part not in ("scheduler", "tokenizer")
        },
        "problems": problems,
    }


def _llava(directory: Path) -> dict[str, Any]:
    summary, config = llava_summary(directory), read_json(directory / "config.json")
    parts: dict[str, dict[str, TensorHeader]] = {"tower": {}, "projector": {}, "language": {}}
    for name, header in summary.tensors.items():
        part, own = part_of(name)
        parts[part][own] = header
    language = parts["language"]
    embedding = language.get("model.embed_tokens.weight")
    rows = embedding.shape[0] if embedding else None
    processor, problems = _processor(directory, summary.image_size)
    tokenizer, more = _tokenizer(directory, rows)
    problems += more + _token_problems(directory, config, summary.patch_size, summary.select_strategy, rows)
    text = config.get("text_config") or {}
    return {
        "tower": {
            "model_type": summary.vision_type,
            "image_size": summary.image_size,
            "patch_size": summary.patch_size,
            "layers": _num_layers(parts["tower"], "encoder.layers."),
            "width": summary.vision_hidden_size,
            "weights": _weights(None, parts["tower"]),
        },
        "image_tokens": summary.image_tokens,
        "selects": f"layer {summary.vision_feature_layer}, {summary.select_strategy}",
        "projector": dict(zip(("input_width", "output_width"), projector_shape(summary.tensors), strict=True)),
        "language_model": {
            "model_type": text.get("model_type", "llama"),
            "layers": _num_layers(language, "model.layers."),
            "width": summary.text_hidden_size,
            "vocabulary": rows,
            "weights": _weights(None, language),
        },
        "weights": _weights(directory, summary.tensors),
        "processor": processor,
        "tokenizer": tokenizer,
        "chat_template": any((directory / f"chat_template.{suffix}").is_file() for suffix in ("jinja", "json")),
        "problems": problems,
    }


def _llm(directory: Path) -> dict[str, Any]:
    summary = llm_summary(directory)
    tokenizer, problems = _tokenizer(directory, summary.vocab_size)
    return {
        "model_type": summary.model_type,
        "layers": summary.num_layers,
        "width": summary.hidden_size,
        "vocabulary": summary.vocab_size,
        "weights": _weights(directory, read_weights(directory)),
        "tokenizer": tokenizer,
        "problems": problems,
    }


def _projector(directory: Path) -> dict[str, Any]:
    config = read_json(directory / "config.json")
    widths = {key: config.get(key) for key in ("input_width", "hidden_width", "output_width")}
    return {**widths, "weights": _weights(directory, read_weights(directory))}


def _adapter(directory: Path) -> dict[str, Any]:
    config = read_json(directory / "adapter_config.json")
    tensors = read_safetensors_header(directory / "adapter_model.safetensors")
    return {
        "base": Path(str(config.get("base_model_name_or_path"))).name,
        "method": config.get("peft_type"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "dropout": config.get("lora_dropout"),
        "targets": config.get("target_modules"),
        "saved_whole": config.get("modules_to_save"),
        "weights": _weights(None, tensors),
    }


_KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "tower": _tower,
    "denoiser": _denoiser,
    "llava": _llava,
    "llm": _llm,
    "projector": _projector,
    "adapter": _adapter,
}


def _weights(directory: Path | None, tensors: Mapping[str, TensorHeader]) -> dict[str, Any]:
    """Stored numbers, in all and by type; with a directory, its files as well."""
    counts: Counter[str] = Counter()
    for header in tensors.values():
        counts[_DTYPES.get(header.dtype, header.dtype)] += math.prod(header.shape)
    facts: dict[str, Any] = {"parameters": sum(counts.values()), "types": dict(counts.most_common())}
    if directory is not None:
        found = weight_file(directory)
        names = set(read_json(found)["weight_map"].values()) if found.suffix == ".json" else {found.name}
        facts |= {"files": len(names), "bytes": sum((directory / name).stat().st_size for name in names)}
    return facts


def _num_layers(tensors: Mapping[str, TensorHeader], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


def _processor(directory: Path, image_size: int) -> tuple[dict[str, Any] | None, list[str]]:
    """The image processor's settings, and whether it makes images of the size that the tower takes."""
    source = directory / "preprocessor_config.json"
    stored = read_json(source) if source.is_file() else None
    if stored is None and (directory / "processor_config.json").is_file():
        source = directory / "processor_config.json"
        stored = read_json(source).get("image_processor")
    if not stored:
        return None, ["there is no image processor"]
    size = stored.get("crop_size") if stored.get("do_center_crop") else stored.get("size")
    side = next(iter(size.values()), None) if isinstance(size, dict) else size
    facts = {
        "class": stored.get("image_processor_type"),
        "size": side,
        "crops": bool(stored.get("do_center_crop")),
        "pads": bool(stored.get("do_pad")),
        "mean": stored.get("image_mean"),
        "std": stored.get("image_std"),
        "resample": _RESAMPLE.get(stored.get("resample", -1), stored.get("resample")),
    }
    if side is not None and side != image_size:
        return facts, [f"{source.name} makes images of {side} px, the tower takes {image_size}"]
    return facts, []


def _tokenizer(directory: Path, rows: int | None) -> tuple[dict[str, Any] | None, list[str]]:
    """Number of tokens and longest text, and whether the embedding has a row for each token."""
    config = directory / "tokenizer_config.json"
    stored = read_json(config) if config.is_file() else {}
    ids = _token_ids(directory)
    facts = {"class": stored.get("tokenizer_class"), "tokens": None if ids is None else len(ids)}
    if isinstance(length := stored.get("model_max_length"), int) and length < 10**9:
        facts["length"] = length
    if ids and rows is not None and max(ids.values()) >= rows:
        return facts, [f"the tokenizer goes up to id {max(ids.values())}, the embedding has {rows} rows"]
    return facts, []


def _token_ids(directory: Path) -> dict[str, int] | None:
    """Every token with its id; None where only a SentencePiece model knows."""
    ids: dict[str, int] = {}
    if (directory / "tokenizer.json").is_file():
        stored = read_json(directory / "tokenizer.json")
        vocabulary = (stored.get("model") or {}).get("vocab") or {}
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((e[0], i) for i, e in enumerate(vocabulary))
        ids = {**dict(pairs), **{token["content"]: token["id"] for token in stored.get("added_tokens") or ()}}
    elif (directory / "vocab.json").is_file():
        ids = dict(read_json(directory / "vocab.json"))
    if (directory / "added_tokens.json").is_file():
        ids.update(read_json(directory / "added_tokens.json"))
    return ids or None


def _token_problems(
    directory: Path, config: Mapping[str, Any], patch_size: int, strategy: str, rows: int | None
) -> list[str]:
    """What would make a LLaVA's image tokens and image features disagree."""
    problems = []
    image_id, ids = config.get("image_token_index", config.get("image_token_id")), _token_ids(directory) or {}
    if "<image>" in ids and image_id != ids["<image>"]:
        problems.append(f"<image> is token {ids['<image>']}, config.json has image_token_index {image_id}")
    if rows is not None and isinstance(image_id, int) and image_id >= rows:
        problems.append(f"image_token_index {image_id} is beyond the embedding's {rows} rows")
    source = directory / "processor_config.json"
    stored = read_json(source) if source.is_file() else {}
    for key, wanted in (("patch_size", patch_size), ("vision_feature_select_strategy", strategy)):
        if stored.get(key) not in (None, wanted):
            problems.append(f"{source.name} has {key} {stored[key]!r}, the model {wanted!r}")
    return problems


def _provenance(directory: Path) -> dict[str, Any]:
    source = directory / PROVENANCE_FILE
    if not source.is_file():
        return {}
    stored = read_json(source)
    return {key: _short(stored[key]) for key in _PROVENANCE if stored.get(key) not in (None, {})}


def _short(value: Any) -> Any:
    """A named input as `name (hash)`, a hash as its beginning."""
    if isinstance(value, dict) and {"path", "sha256"} <= value.keys():
        return f"{Path(value['path']).name} ({str(value['sha256'])[:12]})"
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return value
