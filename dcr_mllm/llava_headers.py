"""What LLM and LLaVA directories say of themselves, and whether tower, projector and LLM fit; loads no model."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from dcr_mllm.errors import UserError
from dcr_mllm.headers import TensorHeader, count, read_json, read_weights, weight_file

VISION_TYPES = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""Vision part of every kind of tower, which is also what its vision-only directories are called."""
PROJECTOR = "multi_modal_projector."
# Current files, older ones, and names as they are in memory, which some tools write.
_TOWER_PREFIXES = (
    "vision_tower.vision_model.",
    "vision_tower.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
)
# SigLIP's pooling head and what stands behind the last block: LLaVA never reads them, and may lack them.
UNREAD = ("head.", "post_layernorm.")


@dataclasses.dataclass(kw_only=True, frozen=True)
class VisionSummary:
    """The image side of a tower, from a full dual encoder or a vision-only directory.

    Attributes:
        model_type: `clip` or `siglip`.
        tensors: headers by name without the prefix `vision_model.`.
    """

    path: Path
    model_type: str
    image_size: int
    patch_size: int
    hidden_size: int
    num_layers: int
    tensors: dict[str, TensorHeader]

    @property
    def select_strategy(self) -> str:
        """LLaVA's name for which tokens are taken: CLIP's class token is dropped, SigLIP has none."""
        return "default" if self.model_type == "clip" else "full"

    @property
    def num_additional_image_tokens(self) -> int:
        """Tokens beside the patches."""
        return 1 if self.model_type == "clip" else 0

    @property
    def image_tokens(self) -> int:
        """Tokens that an image becomes in the language model."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(kw_only=True, frozen=True)
class LlmSummary:
    """A causal language model directory."""

    path: Path
    model_type: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    num_parameters: int


@dataclasses.dataclass(kw_only=True, frozen=True)
class LlavaSummary:
    """A `LlavaForConditionalGeneration` directory."""

    path: Path
    vision_type: str
    vision_hidden_size: int
    image_size: int
    patch_size: int
    select_strategy: str
    vision_feature_layer: int | list[int]
    text_hidden_size: int
    tensors: dict[str, TensorHeader]

    @property
    def image_tokens(self) -> int:
        """Tokens that an image becomes in the language model."""
        return (self.image_size // self.patch_size) ** 2


def vision_summary(directory: str | os.PathLike[str]) -> VisionSummary:
    """Reads the image side of a tower directory.

    Raises:
        UserError: it is no CLIP or SigLIP, or a file or tensor is missing.
    """
    directory = Path(directory)
    config = read_json(directory / "config.json")
    stated = str(config.get("model_type"))
    kinds = {**{kind: kind for kind in VISION_TYPES}, **{vision: kind for kind, vision in VISION_TYPES.items()}}
    # Its image side is CLIP's, name for name.
    kinds["metaclip_2"] = "clip"
    if stated not in kinds:
        raise UserError(
            f"{directory / 'config.json'} has model_type {stated!r}, expected a tower: {', '.join(sorted(kinds))}"
        )
    kind = kinds[stated]
    own = config if stated == VISION_TYPES[kind] else config.get("vision_config") or {}
    vision = {
        "hidden_size": 768,
        "image_size": 224,
        "num_hidden_layers": 12,
        "patch_size": 32 if kind == "clip" else 16,
    }
    vision.update({key: own[key] for key in vision if key in own})
    tensors = {
        name.removeprefix("vision_model."): header
        for name, header in read_weights(directory).items()
        if not name.startswith(("text_model.", "text_projection", "visual_projection", "logit_"))
    }
    hidden, patch = vision["hidden_size"], vision["patch_size"]
    name = "embeddings.patch_embedding.weight"
    if name not in tensors or tensors[name].shape != (hidden, 3, patch, patch):
        found = f"shape {list(tensors[name].shape)}" if name in tensors else "none"
        raise UserError(
            f"{weight_file(directory)} has {name} of {found}, its config.json says {[hidden, 3, patch, patch]}"
        )
    if not (directory / "preprocessor_config.json").is_file() and not (directory / "processor_config.json").is_file():
        raise UserError(f"{directory / 'preprocessor_config.json'} is missing; copy it from the original model")
    return VisionSummary(
        path=directory,
        model_type=kind,
        image_size=vision["image_size"],
        patch_size=patch,
        hidden_size=hidden,
        num_layers=vision["num_hidden_layers"],
        tensors=tensors,
    )


def llm_summary(directory: str | os.PathLike[str]) -> LlmSummary:
    """Reads a causal language model directory of the Llama family (Llama, Mistral, Qwen, SmolLM, ...).

    Raises:
        UserError: it is of another build, or a file is missing.
    """
    directory = Path(directory)
    config = read_json(directory / "config.json")
    kind = str(config.get("model_type"))
    if kind == "llava":
        raise UserError(
            f"{directory} is a LLaVA, expected a language model; use protocol=instruct-only to start from it"
        )
    tensors = read_weights(directory)
    embedding = tensors.get("model.embed_tokens.weight")
    blocks = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    needed = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"] + [
        f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    ]
    absent = [name for name in needed if name not in tensors]
    if embedding is None or absent:
        raise UserError(
            f"{directory} (model_type {kind!r}) has no tensor {(absent or ['model.embed_tokens.weight'])[0]}: expected "
            "a causal language model built like Llama, Mistral or Qwen"
        )
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(
            f"{directory / 'tokenizer.json'} is missing; copy the tokenizer's files from the original model"
        )
    return LlmSummary(
        path=directory,
        model_type=kind,
        hidden_size=embedding.shape[1],
        vocab_size=embedding.shape[0],
        num_layers=len(blocks),
        num_parameters=count(tensors),
    )


def llava_summary(directory: str | os.PathLike[str]) -> LlavaSummary:
    """Reads a LLaVA directory and checks its projector against its own tower and language model.

    Raises:
        UserError: it is no LLaVA in the Hugging Face layout, or it contradicts itself.
    """
    directory = Path(directory)
    config = read_json(directory / "config.json")
    kind = config.get("model_type")
    if kind != "llava":
        hint = "; convert the original layout first" if str(kind).startswith("llava_") else ""
        raise UserError(f"{directory / 'config.json'} has model_type {kind!r}, expected llava{hint}")
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "image_size": 336,
        "patch_size": 14,
        **(config.get("vision_config") or {}),
    }
    text: dict[str, Any] = {"model_type": "llama", "hidden_size": 4096, **(config.get("text_config") or {})}
    tensors = read_weights(directory)
    projector = projector_shape(tensors)
    layers = config.get("vision_feature_layer", -2)
    width = vision["hidden_size"] * (len(layers) if isinstance(layers, list) else 1)
    if projector != (width, text["hidden_size"]):
        raise UserError(
            f"{directory}: the projector goes from {projector[0]} to {projector[1]}, but its config.json says tower "
            f"{width} and language model {text['hidden_size']}; export it again"
        )
    strategy = config.get("vision_feature_select_strategy", "default")
    expected = "full" if "siglip" in str(vision["model_type"]) else "default"
    if strategy != expected:
        raise UserError(
            f"{directory / 'config.json'} has vision_feature_select_strategy {strategy!r} with a "
            f"{vision['model_type']}: image features and image tokens would not match; set it to {expected!r}"
        )
    return LlavaSummary(
        path=directory,
        vision_type=vision["model_type"],
        vision_hidden_size=vision["hidden_size"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        select_strategy=strategy,
        vision_feature_layer=layers,
        text_hidden_size=text["hidden_size"],
        tensors=tensors,
    )


def projector_shape(tensors: dict[str, TensorHeader]) -> tuple[int, int]:
    """Input and output width of a LLaVA's projector.

    Raises:
        UserError: there is none.
    """
    named = {name.split(PROJECTOR)[-1]: header for name, header in tensors.items() if PROJECTOR in name}
    if "linear_1.weight" not in named or "linear_2.weight" not in named:
        raise UserError("the LLaVA has no projector (multi_modal_projector.linear_1 and linear_2)")
    return named["linear_1.weight"].shape[1], named["linear_2.weight"].shape[0]


def tower_tensor(name: str) -> str | None:
    """The tower's own name of a tensor in a LLaVA file, as in `VisionSummary.tensors`; None for all others."""
    for prefix in _TOWER_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return None


def check_swap(llava: LlavaSummary, tower: VisionSummary) -> None:
    """Refuses a tower that the LLaVA's projector was not made for.

    Raises:
        UserError: another kind, width, image size or tensor shape; says which.
    """
    advice = "the projector needs retraining: use protocol=recipe with this tower"
    if llava.vision_type != VISION_TYPES[tower.model_type]:
        raise UserError(f"{llava.path} has a {llava.vision_type} and {tower.path} is a {tower.model_type}; {advice}")
    for what, old, new in (
        ("width", llava.vision_hidden_size, tower.hidden_size),
        ("image size", llava.image_size, tower.image_size),
        ("patch size", llava.patch_size, tower.patch_size),
    ):
        if old != new:
            raise UserError(f"the tower in {llava.path} has {what} {old}, {tower.path} has {new}; {advice}")
    for name, header in llava.tensors.items():
        own = tower_tensor(name)
        if own is None:
            continue
        if own not in tower.tensors:
            if own.startswith(UNREAD):
                continue
            raise UserError(f"{tower.path} lacks tensor {own}, which the tower in {llava.path} has; {advice}")
        if tower.tensors[own].shape != header.shape:
            raise UserError(
                f"tensor {own} is {list(header.shape)} in {llava.path} and {list(tower.tensors[own].shape)} in "
                f"{tower.path}; {advice}"
            )
