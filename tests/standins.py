"""Stand-ins: random tiny towers in exactly the on-disk layout of the hub repositories that users bring.

File names, config keys (with all the old spellings), tensor names and types, processor and tokenizer files are those of
the repository; only widths, depths and vocabularies shrink. Patch sizes are the real ones, so that 384 / 14 still
leaves a remainder and 378 is still no multiple of the VAE's factor. The configs are written by hand: what today's
libraries would write is not what lies on the hub.

`save_tower(hub_id, path)` makes any of `TOWERS`; denoisers are in `standin_denoisers`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny_models import OPENAI_MEAN, OPENAI_STD, _save_siglip_tokenizer, clip_tokenizer

# Real pixels -> tiny pixels: multiples of the real patch size where the real one is, and of the VAE's 8 where that is.
TINY_SIZE = {224: 56, 336: 112, 384: 104, 378: 70}


def write_json(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n")


def clip_state(
    hidden: int,
    layers: int,
    image: int,
    patch: int,
    text_hidden: int,
    projection: int,
    vocabulary: int,
    *,
    length: int = 77,
    position_ids: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random tensors under the names that `CLIPModel` has had on disk since 2021, fp32."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    state = {
        "logit_scale": torch.tensor(4.6052),
        "visual_projection.weight": random(projection, hidden),
        "text_projection.weight": random(projection, text_hidden),
        "vision_model.embeddings.class_embedding": random(hidden),
        "vision_model.embeddings.patch_embedding.weight": random(hidden, 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": random((image // patch) ** 2 + 1, hidden),
        "text_model.embeddings.token_embedding.weight": random(vocabulary, text_hidden),
        "text_model.embeddings.position_embedding.weight": random(length, text_hidden),
    }
    if position_ids:
        state["vision_model.embeddings.position_ids"] = torch.arange((image // patch) ** 2 + 1)[None]
        state["text_model.embeddings.position_ids"] = torch.arange(length)[None]
    norms = ["vision_model.pre_layrnorm", "vision_model.post_layernorm", "text_model.final_layer_norm"]
    for side, width in (("vision_model", hidden), ("text_model", text_hidden)):
        state |= _blocks(side, width, 4 * width, layers, random)
        norms += [f"{side}.encoder.layers.{layer}.layer_norm{i}" for layer in range(layers) for i in (1, 2)]
    return state | _norms(norms, lambda name: text_hidden if name.startswith("text") else hidden, random)


def siglip_state(
    hidden: int, intermediate: int, layers: int, image: int, patch: int, vocabulary: int, *, length: int = 64
) -> dict[str, Tensor]:
    """Random tensors of a `SiglipModel`, the pooling head's `MultiheadAttention` included."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    head = "vision_model.head"
    state = {
        "logit_scale": torch.tensor([4.7]),
        "logit_bias": torch.tensor([-12.9]),
        "vision_model.embeddings.patch_embedding.weight": random(hidden, 3, patch, patch),
        "vision_model.embeddings.patch_embedding.bias": random(hidden),
        "vision_model.embeddings.position_embedding.weight": random((image // patch) ** 2, hidden),
        f"{head}.probe": random(1, 1, hidden),
        f"{head}.attention.in_proj_weight": random(3 * hidden, hidden),
        f"{head}.attention.in_proj_bias": random(3 * hidden),
        f"{head}.attention.out_proj.weight": random(hidden, hidden),
        f"{head}.attention.out_proj.bias": random(hidden),
        f"{head}.mlp.fc1.weight": random(intermediate, hidden),
        f"{head}.mlp.fc1.bias": random(intermediate),
        f"{head}.mlp.fc2.weight": random(hidden, intermediate),
        f"{head}.mlp.fc2.bias": random(hidden),
        "text_model.embeddings.token_embedding.weight": random(vocabulary, hidden),
        "text_model.embeddings.position_embedding.weight": random(length, hidden),
        "text_model.head.weight": random(hidden, hidden),
        "text_model.head.bias": random(hidden),
    }
    norms = ["vision_model.post_layernorm", "text_model.final_layer_norm", f"{head}.layernorm"]
    for side in ("vision_model", "text_model"):
        state |= _blocks(side, hidden, intermediate, layers, random)
        norms += [f"{side}.encoder.layers.{layer}.layer_norm{i}" for layer in range(layers) for i in (1, 2)]
    return state | _norms(norms, lambda name: hidden, random)


def _blocks(side: str, width: int, intermediate: int, layers: int, random: Callable[..., Tensor]) -> dict[str, Tensor]:
    state = {}
    for layer in range(layers):
        prefix = f"{side}.encoder.layers.{layer}"
        for part, (rows, columns) in {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (width, width),
            "self_attn.v_proj": (width, width),
            "self_attn.out_proj": (width, width),
            "mlp.fc1": (intermediate, width),
            "mlp.fc2": (width, intermediate),
        }.items():
            state[f"{prefix}.{part}.weight"] = random(rows, columns)
            state[f"{prefix}.{part}.bias"] = random(rows)
    return state


def _norms(names: list[str], width: Callable[[str], int], random: Callable[..., Tensor]) -> dict[str, Tensor]:
    weights = {f"{name}.weight": 1 + random(width(name)) for name in names}
    return weights | {f"{name}.bias": random(width(name)) for name in names}


def save_safetensors(path: Path, state: dict[str, Tensor]) -> None:
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata={"format": "pt"})


def save_sharded(path: Path, state: dict[str, Tensor], stem: str = "model", variant: str = "") -> None:
    """Two shards and their index, as `save_pretrained` has always named them; a variant as newer libraries do."""
    names = sorted(state)
    half = len(names) // 2
    dot = f".{variant}" if variant else ""
    files = [f"{stem}{dot}-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {name: files[index >= half] for index, name in enumerate(names)}
    for file in files:
        save_safetensors(path / file, {name: state[name] for name in names if weight_map[name] == file})
    total = sum(value.numel() * value.element_size() for value in state.values())
    index_name = f"{stem}.safetensors.index{dot}.json"
    write_json(path / index_name, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_clip_tokenizer(
    path: Path, *, fast: bool = True, added_tokens: bool = False, pad: str = "<|endoftext|>"
) -> int:
    """CLIP's tokenizer files as they were written in 2021; returns the size of the vocabulary.

    Args:
        fast: With tokenizer.json (OpenAI's repositories have it, MetaCLIP's and Stable Diffusion's do not).
        added_tokens: With the added_tokens.json of MetaCLIP.
        pad: Stable Diffusion 2 pads with `!`.
    """
    tokenizer = clip_tokenizer()
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "vocab.json", tokenizer.get_vocab())
    (path / "merges.txt").write_text("#version: 0.2\n")
    start, end = "<|startoftext|>", "<|endoftext|>"
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "__type": "AddedToken"}
    write_json(
        path / "tokenizer_config.json",
        {
            "unk_token": {"content": end, **token},
            "bos_token": {"content": start, **token},
            "eos_token": {"content": end, **token},
            "pad_token": end,
            "add_prefix_space": False,
            "errors": "replace",
            "do_lower_case": True,
            "name_or_path": "openai/clip-vit-base-patch32",
            "model_max_length": 77,
            "special_tokens_map_file": "./special_tokens_map.json",
            "tokenizer_class": "CLIPTokenizer",
        },
    )
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    write_json(path / "special_tokens_map.json", special)
    if added_tokens:
        ids = tokenizer.get_vocab()
        write_json(path / "added_tokens.json", {end: ids[end], start: ids[start]})
    if fast:
        tokenizer.backend_tokenizer.save(str(path / "tokenizer.json"))
    return len(tokenizer)


def save_openai(
    path: Path, *, size: int, patch: int = 14, weights: str = "safetensors", hidden: int = 32, seed: int = 0
) -> Path:
    """OpenAI CLIP as converted in 2021: `*_config_dict`, `size` as a number, `eos_token_id` 2, position ids stored.

    Args:
        weights: `safetensors`, or `bin` for a repository that has nothing else. There the projections are transposed
            views, as the conversion left them: not contiguous, which safetensors does not take.
    """
    image = TINY_SIZE[size] if patch == 14 else 2 * patch
    projection, text_hidden = 24, 24
    vocabulary = write_clip_tokenizer(path)
    # The old ids: today's library takes those of the `*_config_dict` where there is one, else has a rule for them.
    generation = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "torch_dtype": None, "top_k": 50}
    shrunk = {"vocab_size": vocabulary, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    text = {
        "hidden_size": text_hidden,
        "intermediate_size": 4 * text_hidden,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": projection,
    }
    vision = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": patch,
        "projection_dim": projection,
    }
    if image != 224:
        vision["image_size"] = image
    write_json(
        path / "config.json",
        {
            "_name_or_path": "clip-vit-large-patch14/",
            "architectures": ["CLIPModel"],
            "initializer_factor": 1.0,
            "logit_scale_init_value": 2.6592,
            "model_type": "clip",
            "projection_dim": projection,
            "text_config": {
                **generation,
                **text,
                "attention_dropout": 0.0,
                "dropout": 0.0,
                "hidden_act": "quick_gelu",
                "initializer_factor": 1.0,
                "initializer_range": 0.02,
                "layer_norm_eps": 1e-05,
                "max_position_embeddings": 77,
                "model_type": "clip_text_model",
                "vocab_size": vocabulary,
            },
            "text_config_dict": {**text, **shrunk} if size == 224 else None,
            "torch_dtype": "float32",
            "transformers_version": None,
            "vision_config": {
                **{key: value for key, value in generation.items() if not key.endswith("_id")},
                **vision,
                "attention_dropout": 0.0,
                "dropout": 0.0,
                "hidden_act": "quick_gelu",
                "initializer_factor": 1.0,
                "initializer_range": 0.02,
                "layer_norm_eps": 1e-05,
                "model_type": "clip_vision_model",
            },
            "vision_config_dict": vision if size == 224 else None,
        },
    )
    write_json(
        path / "preprocessor_config.json",
        {
            "crop_size": image,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": OPENAI_MEAN,
            "image_std": OPENAI_STD,
            "resample": 3,
            "size": image,
        },
    )
    state = clip_state(hidden, 2, image, patch, text_hidden, projection, vocabulary, position_ids=True, seed=seed)
    if weights == "safetensors":
        save_safetensors(path / "model.safetensors", state)
    else:
        for name in ("visual_projection.weight", "text_projection.weight"):
            state[name] = state[name].T.contiguous().T
    # The pickle beside the safetensors is what these repositories really hold; it must not be touched.
    torch.save(state, path / "pytorch_model.bin")
    return path


def save_metaclip(
    path: Path, *, size: int, heads: int, hidden: int, projection: int, sharded: bool = False, open_clip: bool = False
) -> Path:
    """MetaCLIP of 2023: a short config, `size` as a mapping, no tokenizer.json, open_clip's .bin beside.

    DFN and LAION repositories with a `CLIPModel` are of the same kind; LAION's have open_clip's safetensors beside.
    """
    image = TINY_SIZE[size]
    text_hidden = projection
    vocabulary = write_clip_tokenizer(path, fast=False, added_tokens=True)
    write_json(
        path / "config.json",
        {
            "architectures": ["CLIPModel"],
            "initializer_factor": 1.0,
            "logit_scale_init_value": 2.6592,
            "model_type": "clip",
            "projection_dim": projection,
            "text_config": {
                "hidden_size": text_hidden,
                "intermediate_size": 4 * text_hidden,
                "model_type": "clip_text_model",
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                # The real ones are the library's defaults, and left out.
                "vocab_size": vocabulary,
                "bos_token_id": vocabulary - 2,
                "eos_token_id": vocabulary - 1,
            },
            "torch_dtype": "float32",
            "transformers_version": "4.35.0.dev0",
            "vision_config": {
                "hidden_size": hidden,
                "image_size": image,
                "intermediate_size": 4 * hidden,
                "model_type": "clip_vision_model",
                "num_attention_heads": heads,
                "num_hidden_layers": 2,
                "patch_size": 14,
            },
        },
    )
    write_json(path / "preprocessor_config.json", modern_clip_processor(image))
    state = clip_state(hidden, 2, image, 14, text_hidden, projection, vocabulary)
    if sharded:
        save_sharded(path, state)
    else:
        save_safetensors(path / "model.safetensors", state)
    torch.save({}, path / "metaclip_fullcc2.5b.bin")
    if open_clip:
        other = {"logit_scale": torch.tensor(1.0), "visual.proj": torch.zeros(hidden, projection)}
        # The names of the other file too, so that whoever reads both files gets the wrong numbers.
        save_safetensors(path / "open_clip_model.safetensors", other | {n: torch.zeros(1) for n in state})
        write_json(path / "open_clip_config.json", {"model_cfg": {"embed_dim": projection}})
    return path


def modern_clip_processor(image: int) -> dict[str, Any]:
    return {
        "crop_size": {"height": image, "width": image},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": OPENAI_MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": OPENAI_STD,
        "processor_class": "CLIPProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": image},
    }


def save_siglip(path: Path, *, size: int) -> Path:
    """SigLIP SO400M: wide blocks of an odd ratio (4304 / 1152), vocabulary and lengths left to the defaults."""
    image, hidden, intermediate = TINY_SIZE[size], 36, 134
    tokenizer = _save_siglip_tokenizer(path, 64)
    for name in ("tokenizer.json", "processor_config.json"):
        (path / name).unlink(missing_ok=True)
    write_json(
        path / "tokenizer_config.json",
        {
            "additional_special_tokens": [],
            "clean_up_tokenization_spaces": True,
            "do_lower_case": True,
            "eos_token": "</s>",
            "model_input_names": ["input_ids"],
            "model_max_length": 64,
            "pad_token": "</s>",
            "processor_class": "SiglipProcessor",
            "sp_model_kwargs": {},
            "tokenizer_class": "SiglipTokenizer",
            "unk_token": "<unk>",
        },
    )
    token = {"lstrip": True, "normalized": False, "rstrip": True, "single_word": False}
    special = {name: {"content": text, **token} for name, text in (("eos_token", "</s>"), ("pad_token", "</s>"))}
    write_json(path / "special_tokens_map.json", special | {"unk_token": {"content": "<unk>", **token}})
    vocabulary = len(tokenizer)
    part = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": 2, "num_hidden_layers": 2}
    write_json(
        path / "config.json",
        {
            "architectures": ["SiglipModel"],
            "initializer_factor": 1.0,
            "model_type": "siglip",
            "text_config": {**part, "model_type": "siglip_text_model", "vocab_size": vocabulary},
            "torch_dtype": "float32",
            "transformers_version": "4.37.0.dev0",
            "vision_config": {**part, "image_size": image, "model_type": "siglip_vision_model", "patch_size": 14},
        },
    )
    write_json(path / "preprocessor_config.json", siglip_processor(image))
    save_safetensors(path / "model.safetensors", siglip_state(hidden, intermediate, 2, image, 14, vocabulary))
    return path


def siglip_processor(image: int) -> dict[str, Any]:
    return {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "SiglipProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": image, "width": image},
    }


def write_gemma_tokenizer(path: Path) -> int:
    """Gemma's tokenizer files with SigLIP 2's settings; returns the size of the vocabulary."""
    from transformers import GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += list("abcdefghijklmnopqrstuvwxyz.,'-0123456789")
    tokenizer = GemmaTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<pad>")
    write_json(
        path / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": True,
            "bos_token": "<bos>",
            "clean_up_tokenization_spaces": False,
            "do_lower_case": True,
            "eos_token": "<eos>",
            "model_input_names": ["input_ids"],
            "model_max_length": 64,
            "pad_token": "<pad>",
            "padding_side": "right",
            "processor_class": "SiglipProcessor",
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "tokenizer_class": "GemmaTokenizer",
            "unk_token": "<unk>",
            "use_default_system_prompt": False,
        },
    )
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    special = {name: {"content": text, **token} for name, text in names.items()}
    write_json(path / "special_tokens_map.json", special)
    return len(pieces)


def save_siglip2(path: Path) -> Path:
    """SigLIP 2 of fixed resolution, base/16: `model_type` siglip, next to nothing in the config, Gemma's tokenizer."""
    image, hidden = 32, 32
    vocabulary = write_gemma_tokenizer(path)
    part = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": 2, "num_hidden_layers": 2}
    write_json(
        path / "config.json",
        {
            "architectures": ["SiglipModel"],
            "initializer_factor": 1.0,
            "model_type": "siglip",
            "text_config": {**part, "model_type": "siglip_text_model", "vocab_size": vocabulary},
            "torch_dtype": "float32",
            "transformers_version": "4.49.0.dev0",
            "vision_config": {**part, "image_size": image, "model_type": "siglip_vision_model"},
        },
    )
    processor = siglip_processor(image) | {"do_convert_rgb": None, "resample": 2}
    write_json(path / "preprocessor_config.json", processor | {"image_processor_type": "SiglipImageProcessorFast"})
    save_safetensors(path / "model.safetensors", siglip_state(hidden, 4 * hidden, 2, image, 16, vocabulary))
    return path


def save_naflex(path: Path) -> Path:
    """SigLIP 2 NaFlex: patches as a sequence of vectors, positions that are resized per image."""
    hidden = 32
    vocabulary = write_gemma_tokenizer(path)
    part = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": 2, "num_hidden_layers": 2}
    write_json(
        path / "config.json",
        {
            "architectures": ["Siglip2Model"],
            "initializer_factor": 1.0,
            "model_type": "siglip2",
            "text_config": {**part, "model_type": "siglip2_text_model", "vocab_size": vocabulary},
            "torch_dtype": "float32",
            "transformers_version": "4.49.0.dev0",
            "vision_config": {**part, "model_type": "siglip2_vision_model"},
        },
    )
    processor = {key: value for key, value in siglip_processor(32).items() if key != "size"}
    processor |= {"image_processor_type": "Siglip2ImageProcessorFast", "max_num_patches": 256, "patch_size": 16}
    write_json(path / "preprocessor_config.json", processor | {"processor_class": "Siglip2Processor"})
    state = siglip_state(hidden, 4 * hidden, 2, 32, 16, vocabulary)
    state["vision_model.embeddings.patch_embedding.weight"] = torch.zeros(hidden, 3 * 16 * 16)
    state["vision_model.embeddings.position_embedding.weight"] = torch.zeros(256, hidden)
    save_safetensors(path / "model.safetensors", state)
    return path


def save_metaclip2(path: Path) -> Path:
    """MetaCLIP 2 worldwide: CLIP's image side, XLM-V's tokenizer, which ends with token 2 (its own, not a spelling)."""
    from transformers import XLMRobertaTokenizer

    image, hidden, projection = TINY_SIZE[224], 40, 32
    letters = [f"\u2581{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] + list("abcdefghijklmnopqrstuvwxyz.,'-")
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", *letters, "<mask>"]
    tokenizer = XLMRobertaTokenizer(vocab=[(piece, -float(index)) for index, piece in enumerate(pieces)])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(path / "tokenizer.json"))
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    names |= {"pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
    write_json(path / "special_tokens_map.json", names)
    write_json(
        path / "tokenizer_config.json",
        {
            **names,
            "clean_up_tokenization_spaces": True,
            "extra_special_tokens": {},
            "model_max_length": 77,
            "processor_class": "CLIPProcessor",
            "tokenizer_class": "XLMRobertaTokenizer",
        },
    )
    write_json(
        path / "config.json",
        {
            "architectures": ["MetaClip2Model"],
            "initializer_factor": 1.0,
            "logit_scale_init_value": 2.6592,
            "model_type": "metaclip_2",
            "projection_dim": projection,
            "text_config": {
                "bos_token_id": 0,
                "eos_token_id": 2,
                "hidden_act": "quick_gelu",
                "hidden_size": projection,
                "intermediate_size": 4 * projection,
                "max_position_embeddings": 77,
                "model_type": "metaclip_2_text_model",
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "projection_dim": projection,
                "vocab_size": len(pieces),
            },
            "torch_dtype": "float32",
            "transformers_version": "4.56.0.dev0",
            "vision_config": {
                "hidden_act": "quick_gelu",
                "hidden_size": hidden,
                "image_size": image,
                "intermediate_size": 4 * hidden,
                "model_type": "metaclip_2_vision_model",
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "patch_size": 14,
                "projection_dim": projection,
            },
        },
    )
    write_json(path / "preprocessor_config.json", modern_clip_processor(image))
    save_safetensors(path / "model.safetensors", clip_state(hidden, 2, image, 14, projection, projection, len(pieces)))
    return path


TOWERS: dict[str, Callable[[Path], Path]] = {
    "openai/clip-vit-large-patch14": partial(save_openai, size=224),
    # Only as a pickle, as far as is known; stage 1 wants it converted first.
    "openai/clip-vit-large-patch14-336": partial(save_openai, size=336, weights="bin"),
    "openai/clip-vit-base-patch16": partial(save_openai, size=224, patch=16),
    "openai/clip-vit-base-patch32": partial(save_openai, size=224, patch=32),
    "facebook/metaclip-l14-fullcc2.5b": partial(save_metaclip, size=224, heads=2, hidden=32, projection=24),
    "facebook/metaclip-h14-fullcc2.5b": partial(save_metaclip, size=224, heads=2, hidden=40, projection=32),
    "apple/DFN5B-CLIP-ViT-H-14-378": partial(save_metaclip, size=378, heads=2, hidden=40, projection=32, sharded=True),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": partial(
        save_metaclip, size=224, heads=2, hidden=40, projection=32, open_clip=True
    ),
    "facebook/metaclip-2-worldwide-huge-quickgelu": save_metaclip2,
    "google/siglip-so400m-patch14-224": partial(save_siglip, size=224),
    "google/siglip-so400m-patch14-384": partial(save_siglip, size=384),
    "google/siglip2-base-patch16-224": save_siglip2,
}
"""Hub id -> what writes its stand-in. NaFlex (`save_naflex`), which is refused, is not among them."""


def save_tower(hub_id: str, path: str | Path) -> Path:
    """The stand-in of a hub repository in a directory that is made for it."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    return TOWERS[hub_id](path)
