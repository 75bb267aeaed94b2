"""`dcr-mllm export-llava DIR OUT`: a tower or a LLaVA for the original LLaVA repository, or for transformers 4.

Layout `original`, for a CLIP tower: what `mm_vision_tower` may point to. For a LLaVA: the language model with
`model.mm_projector.*`, and its tower in `OUT/vision_tower`. Layout `transformers4`, for a LLaVA: the same model with
the tensor names, configs and processor files that transformers before 5 and vLLM read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dcr_mllm.cli import run_main
from dcr_mllm.errors import UserError
from dcr_mllm.headers import TensorHeader, read_json, resolve_weights, weight_files
from dcr_mllm.llava_headers import LlavaSummary, llava_summary, vision_summary
from dcr_mllm.llava_names import original_name, part_of, transformers4_name
from dcr_mllm.runs import PROVENANCE_FILE, atomic_directory, hash_directory, write_json_atomic
from stage2_llava.legacy import (
    copy_slow_tokenizer,
    preprocessor_config,
    stored_image_processor,
    text_config,
    vision_config,
    write_tokenizer,
)

LAYOUTS = ("original", "transformers4")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PROCESSORS = {"clip_vision_model": "CLIPImageProcessor", "siglip_vision_model": "SiglipImageProcessor"}


def export_tower(tower: str | Path, out: str | Path) -> Path:
    """Write the image side of a CLIP as the original LLaVA's `CLIPVisionTower` reads it.

    Args:
        tower: CLIP directory, full or vision-only.
        out: Directory to write; must not exist. Its path is then LLaVA's `--vision_tower`.

    Raises:
        UserError: It is no CLIP.
    """
    from dcr_mllm.towers import vision_tensors

    summary = vision_summary(tower)
    if summary.model_type != "clip":
        raise UserError(f"{tower} is a {summary.model_type}, {_only_clip()}")
    config = read_json(summary.path / "config.json")
    with atomic_directory(out) as temporary:
        _write_tower(temporary, config.get("vision_config", config), vision_tensors(summary.path), summary.path)
        write_json_atomic(temporary / PROVENANCE_FILE, _record(summary.path))
        (temporary / "README.md").write_text(
            "---\nlibrary_name: transformers\ntags: [clip, vision-tower, dcr, llava]\n---\n"
            "# A vision tower for LLaVA\n\n"
            "The image side of a CLIP in the layout that the original LLaVA repository loads: pass this directory as\n"
            "`--vision_tower`, with `--mm_vision_select_layer -2`. A projector has to be trained with it.\n",
            encoding="utf-8",
        )
    return Path(out)


def export_original(
    llava: str | Path, out: str | Path, *, tokenizer: str | Path | None = None, mm_vision_tower: str | None = None
) -> Path:
    """Write a LLaVA as the original repository's `LlavaLlamaForCausalLM`.

    Args:
        llava: LLaVA directory with a CLIP tower and a Llama.
        out: Directory to write; must not exist. The original takes it for a LLaVA only if its name has `llava` in it.
        tokenizer: The language model's directory, for its `tokenizer.model`, which the original trains and evaluates
            with. None writes the LLaVA's own tokenizer, which adds `<image>` and perhaps `<pad>` to the vocabulary.
        mm_vision_tower: Path or id that config.json is to name; by default that of `OUT/vision_tower` on this machine.

    Raises:
        UserError: A part that the original has not.
    """
    summary, config = llava_summary(llava), read_json(Path(llava) / "config.json")
    _check_original(summary, config)
    target = Path(out).resolve()
    if "llava" not in target.name.lower():
        raise UserError(f"the original LLaVA decides by a directory's name: {target.name!r} must have 'llava' in it")
    stored = stored_image_processor(summary.path)
    text = text_config(config.get("text_config") or {}, _dtype(summary, "language"))
    if (text.get("rope_scaling") or {}).get("type") not in (None, "linear", "dynamic"):
        raise UserError(f"{summary.path} has rope_scaling {text['rope_scaling']['type']!r}, transformers 4.37 has not")
    text.pop("model_type", None)
    written = {
        **text,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": _vocabulary(summary),
        "use_mm_proj": True,
        "mm_vision_tower": mm_vision_tower or str(target / "vision_tower"),
        "mm_hidden_size": summary.vision_hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": summary.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad" if stored.get("do_pad") else "square",
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 2048,
    }
    with atomic_directory(out) as temporary:
        (temporary / "vision_tower").mkdir()
        tower, vision = _tower_tensors(summary.path), config.get("vision_config") or {}
        _write_tower(temporary / "vision_tower", vision, tower, summary.path)
        _write_weights(summary.path, temporary, original_name)
        write_json_atomic(temporary / "config.json", written)
        _write_generation_config(summary.path, temporary)
        if tokenizer is None:
            write_tokenizer(summary.path, temporary, splits=True)
        else:
            copy_slow_tokenizer(Path(tokenizer), summary.path, temporary)
        write_json_atomic(temporary / PROVENANCE_FILE, _record(summary.path))
        (temporary / "README.md").write_text(_original_card(written), encoding="utf-8")
    return Path(out)


def export_transformers4(llava: str | Path, out: str | Path) -> Path:
    """Write a LLaVA in the layout of transformers 4: names, configs, image processor, tokenizer, chat template.

    Args:
        llava: LLaVA directory.
        out: Directory to write; must not exist.
    """
    summary, config = llava_summary(llava), read_json(Path(llava) / "config.json")
    dtype = _dtype(summary, "language")
    text = text_config(config.get("text_config") or {}, dtype)
    written = {
        **{key: value for key, value in config.items() if key not in ("dtype", "transformers_version")},
        "text_config": {**text, "vocab_size": _vocabulary(summary)},
        "vision_config": vision_config(config.get("vision_config") or {}, _dtype(summary, "tower")),
        "torch_dtype": dtype,
        "ignore_index": -100,
    }
    pads = stored_image_processor(summary.path).get("do_pad")
    kind = "LlavaImageProcessor" if pads else _PROCESSORS[summary.vision_type]
    with atomic_directory(out) as temporary:
        _write_weights(summary.path, temporary, transformers4_name)
        write_json_atomic(temporary / "config.json", written)
        image = {**preprocessor_config(summary.path, kind), "processor_class": "LlavaProcessor"}
        write_json_atomic(temporary / "preprocessor_config.json", image)
        tokens = {
            "image_token": "<image>",
            "num_additional_image_tokens": 1 if summary.select_strategy == "default" else 0,
            "patch_size": summary.patch_size,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": summary.select_strategy,
        }
        write_json_atomic(temporary / "processor_config.json", tokens)
        _write_generation_config(summary.path, temporary)
        write_tokenizer(summary.path, temporary)
        for name in ("chat_template.jinja", "chat_template.json", "README.md"):
            if (summary.path / name).is_file():
                (temporary / name).write_bytes((summary.path / name).read_bytes())
        if (temporary / "chat_template.jinja").is_file():
            template = (temporary / "chat_template.jinja").read_text(encoding="utf-8")
            write_json_atomic(temporary / "chat_template.json", {"chat_template": template})
        write_json_atomic(temporary / PROVENANCE_FILE, _record(summary.path))
    return Path(out)


def _only_clip() -> str:
    return (
        "and the original LLaVA loads every tower as a CLIP: use it in this project, or in a fork with SigLIP towers "
        "(LLaVA-NeXT, TinyLLaVA_Factory)"
    )


def _check_original(summary: LlavaSummary, config: dict[str, Any]) -> None:
    text = config.get("text_config") or {}
    source = summary.path / "config.json"
    if summary.vision_type != "clip_vision_model":
        raise UserError(f"{summary.path} has a {summary.vision_type}, {_only_clip()}")
    if (kind := text.get("model_type", "llama")) != "llama":
        raise UserError(f"{source} has text_config.model_type {kind!r}; LlavaLlamaForCausalLM takes a llama")
    if not isinstance(summary.vision_feature_layer, int):
        raise UserError(f"{source} has vision_feature_layer {summary.vision_feature_layer}, the original takes one")
    if (activation := config.get("projector_hidden_act", "gelu")) != "gelu":
        raise UserError(f"{source} has projector_hidden_act {activation!r}, the original's mlp2x_gelu has gelu")
    if not any(name.endswith("linear_1.bias") for name in summary.tensors):
        raise UserError(f"{summary.path} has a projector without bias, the original's mlp2x_gelu has one")
    if text.get("mlp_bias"):
        raise UserError(f"{source} has text_config.mlp_bias true, which transformers 4.37's Llama has not")
    heads, width = text.get("num_attention_heads", 32), summary.text_hidden_size
    if (text.get("head_dim") or width // heads) != width // heads:
        raise UserError(f"{source} has text_config.head_dim {text['head_dim']}, transformers 4.37 has {width // heads}")


def _tower_tensors(llava: Path) -> dict[str, Any]:
    from dcr_mllm.towers import stored_tensors

    stored = stored_tensors(llava, lambda name: part_of(name)[0] == "tower")
    return {part_of(name)[1]: value for name, value in stored.items()}


def _write_weights(llava: Path, out: Path, rename: Callable[[str], str | None]) -> None:
    """The same shards under other names; tensors whose new name is None are left out, and so are empty shards."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    sources = weight_files(llava)
    index: dict[str, str] = {}
    total = 0
    for source in sources:
        with safe_open(source, framework="pt") as file:
            names = {name: rename(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            state = {new: file.get_tensor(name) for name, new in names.items() if new is not None}
        if state:
            save_file(state, out / source.name, metadata={"format": "pt"})
            index.update(dict.fromkeys(state, source.name))
            total += sum(value.nbytes for value in state.values())
    if len(sources) > 1:
        stored = {"metadata": {"total_size": total}, "weight_map": index}
        write_json_atomic(out / "model.safetensors.index.json", stored)


def _write_tower(out: Path, config: dict[str, Any], tensors: dict[str, Any], processor: Path) -> None:
    """A vision-only CLIP directory; `processor` is a directory that knows the image statistics."""
    from safetensors.torch import save_file

    dtype = str(tensors["embeddings.patch_embedding.weight"].dtype).removeprefix("torch.")
    state = {
        f"vision_model.{name}": value.contiguous()
        for name, value in tensors.items()
        if not name.endswith("position_ids")
    }
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    # MetaCLIP 2's image side is CLIP's under a name of its own.
    own = vision_config({**config, "model_type": "clip_vision_model"}, dtype)
    written = {**own, "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    write_json_atomic(out / "config.json", written)
    image = preprocessor_config(processor, "CLIPImageProcessor")
    # transformers 4.25 and earlier look for the second name.
    write_json_atomic(out / "preprocessor_config.json", {**image, "feature_extractor_type": "CLIPFeatureExtractor"})


def _write_generation_config(llava: Path, out: Path) -> None:
    source = llava / "generation_config.json"
    if source.is_file():
        kept = {k: v for k, v in read_json(source).items() if k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json_atomic(out / "generation_config.json", kept)


def _vocabulary(summary: LlavaSummary) -> int:
    for name, header in summary.tensors.items():
        if name.endswith("embed_tokens.weight"):
            return header.shape[0]
    raise UserError(f"{summary.path} has no embed_tokens.weight")


def _dtype(summary: LlavaSummary, part: str) -> str:
    headers: list[TensorHeader] = [header for name, header in summary.tensors.items() if part_of(name)[0] == part]
    return _DTYPES.get(headers[0].dtype, "float32")


def _record(source: Path) -> dict[str, Any]:
    record: dict[str, Any] = {"exported": {"path": str(source), "sha256": hash_directory(source)}}
    if (source / PROVENANCE_FILE).is_file():
        record["source"] = read_json(source / PROVENANCE_FILE)
    return record


def _original_card(config: dict[str, Any]) -> str:
    return (
        "---\npipeline_tag: image-text-to-text\ntags: [llava, dcr]\n---\n# LLaVA in the original layout\n\n"
        "For the code of haotian-liu/LLaVA (transformers 4.37): `load_pretrained_model(DIR, None, NAME)` with `llava`\n"
        "in NAME, and the conversation `vicuna_v1`. `mm_vision_tower` in config.json must be an existing path: the\n"
        "folder `vision_tower` here, wherever it lies. Images are prepared by `image_aspect_ratio: "
        f"{config['image_aspect_ratio']}`.\n"
    )


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="dcr-mllm export-llava", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", metavar="DIR", help="a LLaVA or a CLIP tower, or the id of a downloaded one")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument("--layout", choices=LAYOUTS, default="original", help="whom it is for (default: %(default)s)")
    parser.add_argument("--mm-vision-tower", metavar="PATH", help="named in config.json in place of OUT/vision_tower")
    parser.add_argument("--tokenizer", metavar="LLM", help="the language model, for its tokenizer.model (original)")
    options = parser.parse_args(argv)

    def call() -> None:
        directory = resolve_weights(options.directory, "llava")
        is_llava = read_json(directory / "config.json").get("model_type") == "llava"
        if options.layout == "transformers4":
            if not is_llava:
                raise UserError(f"{directory} is no LLaVA; transformers 4 reads towers as they are")
            print(export_transformers4(directory, options.out))
        elif is_llava:
            llm = resolve_weights(options.tokenizer, "llm") if options.tokenizer else None
            print(export_original(directory, options.out, tokenizer=llm, mm_vision_tower=options.mm_vision_tower))
        else:
            print(export_tower(directory, options.out))

    return run_main(call)


if __name__ == "__main__":
    raise SystemExit(main())
