"""What model directories say of themselves, read from JSON files and safetensors headers with the standard library.

Everything here takes milliseconds and imports neither torch nor transformers nor diffusers, so that a wrong path or a
truncated file is refused before anything heavy starts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import struct
from pathlib import Path
from typing import Any, Literal

from dcr_mllm.errors import UserError

# The layouts that the Hugging Face libraries write: with or without a variant, in one file or in shards with an index.
_SUFFIXES = (
    "safetensors safetensors.index.json fp16.safetensors safetensors.index.fp16.json fp16.safetensors.index.json"
)
_WEIGHT_FILES = [f"{stem}.{suffix}" for stem in ("model", "diffusion_pytorch_model") for suffix in _SUFFIXES.split()]
# More than any header needs, and less than what text or a truncated archive looks like when read as a length.
_MAX_HEADER_BYTES = 100_000_000
_ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
# What `model_type` may be, and whether such a tower's image side begins with a class token.
CLASS_TOKEN = {"clip": True, "metaclip_2": True, "siglip": False}
TOWER_TYPES = tuple(CLASS_TOKEN)


@dataclasses.dataclass(kw_only=True, frozen=True)
class TensorHeader:
    """Type (as safetensors spells it, e.g. `F16`) and shape of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(kw_only=True, frozen=True)
class TowerSummary:
    """A vision tower directory.

    Attributes:
        model_type: `clip`, `metaclip_2` (CLIP's image side with a multilingual text side) or `siglip`.
        image_size: pixels per side that the position embedding was made for.
        patch_size: pixels per side of a patch.
        num_layers: transformer blocks of the vision side.
        hidden_size: width of its patch tokens.
        width: width of the embedding that conditions the denoiser: after the projection where there is one (CLIP,
            MetaCLIP 2), else pooled (SigLIP).
        image_mean, image_std: statistics of its own image processor, per channel.
        has_text_side: text weights and a tokenizer are there.
        num_parameters: stored numbers.
    """

    path: Path
    model_type: str
    image_size: int
    patch_size: int
    num_layers: int
    hidden_size: int
    width: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    has_text_side: bool
    num_parameters: int


def resolve_weights(value: str | os.PathLike[str], kind: Literal["tower", "denoiser", "llm", "llava"]) -> Path:
    """The local directory behind a setting that names a model.

    Args:
        value: a directory, `mini` for the weights that ship with the package, or a Hugging Face id that was downloaded.
        kind: which of them it is.

    Raises:
        UserError: there is no such directory, or the id is not in the local cache.
    """
    text = os.fspath(value)
    if text == "mini":
        path = Path(__file__).parent / "mini" / "weights" / kind
        if not path.is_dir():
            raise UserError(
                f"{kind} 'mini' is missing from the installation: {path} does not exist; reinstall the package"
            )
        return path
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{kind} {text!r} is a file, expected a model directory")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text):
        raise UserError(
            f"{kind} directory {text!r} does not exist; give a model directory, a Hugging Face id or 'mini'"
        )
    # Loading goes by directory from here on, so the cache is asked for one file that every such model has.
    probe = "unet/config.json" if kind == "denoiser" else "config.json"
    cached = _cached_file(text, probe)
    if cached is None:
        raise UserError(
            f"{kind} {text!r} is neither a directory nor in the local Hugging Face cache; "
            f"run `hf download {text}` on a machine with network access, or give a directory"
        )
    return cached.parents[probe.count("/")]


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: missing, unreadable, or not an object.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError:
        raise UserError(f"{path} is not valid JSON, download or export it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object, found a {type(data).__name__}")
    return data


def read_safetensors_header(path: str | os.PathLike[str]) -> dict[str, TensorHeader]:
    """Names, types and shapes of the tensors in a safetensors file, checked against the size of the file.

    Raises:
        UserError: missing, not safetensors, or truncated.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if length > _MAX_HEADER_BYTES:
                raise ValueError("no safetensors header starts like this")
            if len(prefix) < 8 or 8 + length > size:
                raise UserError(_truncated(path, size, f"{8 + length:,} bytes of header" if length else "a header"))
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: TensorHeader(dtype=entry["dtype"], shape=tuple(entry["shape"])) for name, entry in header.items()
            }
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            for name, entry in header.items():
                begin, stop = entry["data_offsets"]
                item = _ITEM_BYTES.get(entry["dtype"])
                if item is not None and stop - begin != item * math.prod(entry["shape"]):
                    raise UserError(
                        f"{path} is damaged: tensor {name} has another size than its shape says; download it again"
                    )
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a safetensors file (a Git LFS pointer?); download it again") from None
    if 8 + length + end != size:
        raise UserError(_truncated(path, size, f"{8 + length + end:,} bytes"))
    return tensors


def weight_file(directory: str | os.PathLike[str], variant: str | None = None) -> Path:
    """The weight file or shard index that the libraries would load from a model directory.

    Args:
        directory: model directory.
        variant: `fp16` prefers the files of that variant; None prefers the plain ones and takes fp16 if alone.

    Raises:
        UserError: there is none, or only a format that can run code on loading.
    """
    directory = Path(directory)
    names = sorted(_WEIGHT_FILES, key=lambda name: ("fp16" in name) != (variant == "fp16"))
    for name in names:
        if (directory / name).is_file():
            return directory / name
    peers = sorted(
        file.name for suffix in ("bin", "pt", "ckpt", "msgpack", "h5") for file in directory.glob(f"*.{suffix}")
    )
    if peers:
        raise UserError(
            f"{directory} has its weights only as {peers[0]}, which is not loaded for safety; convert it with "
            f"`dcr-mllm to-safetensors {directory} OUT`, or download a revision that has safetensors"
        )
    expected = "diffusion_pytorch_model.safetensors" if directory.name in ("unet", "vae") else "model.safetensors"
    raise UserError(f"{directory / expected} is missing (nor is there a shard index)")


def weight_files(directory: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files that the libraries would load; others may lie beside them, of open_clip or of a variant.

    Raises:
        UserError: as `weight_file`, or the index is damaged.
    """
    found = weight_file(directory)
    if found.suffix != ".json":
        return [found]
    return [found.parent / shard for shard in sorted(set(_weight_map(found).values()))]


def _weight_map(index: Path) -> dict[str, str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{index} has no weight_map, download it again")
    return names


def read_weights(directory: str | os.PathLike[str]) -> dict[str, TensorHeader]:
    """Headers of all tensors of a model directory, over all its shards.

    Raises:
        UserError: a shard or a tensor that the index names is missing, or a file is damaged.
    """
    tensors: dict[str, TensorHeader] = {}
    for file in weight_files(directory):
        tensors.update(read_safetensors_header(file))
    found = weight_file(directory)
    for name, shard in _weight_map(found).items() if found.suffix == ".json" else ():
        if name not in tensors:
            raise UserError(
                f"{found.parent / shard} lacks tensor {name}, which {found.name} promises; download it again"
            )
    return tensors


def tower_summary(directory: str | os.PathLike[str]) -> TowerSummary:
    """Reads a vision tower directory and checks that it is whole.

    Raises:
        UserError: a file or tensor is missing, or the model is of an unknown type.
    """
    directory = Path(directory)
    if (directory / "open_clip_config.json").is_file() and not (directory / "config.json").is_file():
        raise UserError(
            f"{directory} is in open_clip's layout; convert it with `dcr-mllm import-open-clip ARCH CHECKPOINT OUT`"
        )
    config = read_json(directory / "config.json")
    model_type = str(config.get("model_type"))
    if model_type not in TOWER_TYPES:
        raise UserError(
            f"{directory / 'config.json'} has model_type {model_type!r}, expected one of {', '.join(TOWER_TYPES)}"
            f"{_hint(model_type)}"
        )
    # Published configs leave out what equals the library's defaults.
    defaults = {
        "hidden_size": 768,
        "image_size": 224,
        "num_hidden_layers": 12,
        "patch_size": 32 if CLASS_TOKEN[model_type] else 16,
    }
    # Where the old spelling is there as well, it wins, as it does when the model is loaded.
    vision = {**defaults, **(config.get("vision_config_dict") or config.get("vision_config") or {})}
    hidden, image, patch, layers = (
        int(vision[key]) for key in ("hidden_size", "image_size", "patch_size", "num_hidden_layers")
    )
    mean, std = _image_statistics(directory, image)
    tensors = read_weights(directory)
    source = weight_file(directory)
    if "fp16" in source.name:
        raise UserError(
            f"{directory} has weights of the fp16 variant only, which towers are not loaded from; "
            f"rename {source.name} to {source.name.replace('.fp16', '')}"
        )
    positions = (image // patch) ** 2 + CLASS_TOKEN[model_type]
    expected: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.patch_embedding.weight": (hidden, int(vision.get("num_channels", 3)), patch, patch),
        "vision_model.embeddings.position_embedding.weight": (positions, hidden),
    }
    width = hidden
    if CLASS_TOKEN[model_type]:
        width = int(config.get("projection_dim", 512))
        expected["visual_projection.weight"] = (width, hidden)
    else:
        expected["vision_model.head.attention.in_proj_weight"] = (3 * hidden, hidden)
    for name, shape in expected.items():
        _expect(tensors, name, shape, source)
    for layer in range(layers):
        for part in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2", "layer_norm2"):
            _expect(tensors, f"vision_model.encoder.layers.{layer}.{part}.weight", None, source)
    text_side = any(name.startswith("text_model.") for name in tensors)
    if text_side and not has_tokenizer(directory):
        # transformers makes an empty vocabulary of a missing one, without a word.
        raise UserError(
            f"{directory / 'tokenizer.json'} is missing (nor are there vocab.json and merges.txt, or spiece.model)"
        )
    return TowerSummary(
        path=directory,
        model_type=model_type,
        image_size=image,
        patch_size=patch,
        num_layers=layers,
        hidden_size=hidden,
        width=width,
        image_mean=mean,
        image_std=std,
        has_text_side=text_side,
        num_parameters=count(tensors),
    )


def _cached_file(repo_id: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, name)
    return Path(found) if isinstance(found, str) else None


def _hint(model_type: str) -> str:
    """What to do about a model that is nearly a tower."""
    if model_type == "siglip2":
        # Fixed-resolution SigLIP 2 says `siglip`: only NaFlex has a type of its own.
        return (
            ": this is SigLIP 2 NaFlex, whose pictures are sequences of patches of any number; take SigLIP 2 of a "
            "fixed resolution, such as google/siglip2-so400m-patch14-384"
        )
    return "; the full model with its text side is needed" if "vision" in model_type else ""


def _image_statistics(directory: Path, image_size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation from the image processor's file, in the old layout or inside a processor's.

    Raises:
        UserError: they are not there, or that processor makes pictures of another size than the tower takes.
    """
    source = directory / "preprocessor_config.json"
    if source.is_file() or not (directory / "processor_config.json").is_file():
        data = read_json(source)
    else:
        source = directory / "processor_config.json"
        data = read_json(source).get("image_processor") or {}
    values = [data.get("image_mean"), data.get("image_std")]
    for key, value in zip(("image_mean", "image_std"), values, strict=True):
        if not (isinstance(value, list) and len(value) == 3 and all(isinstance(item, (int, float)) for item in value)):
            raise UserError(f"{source} has {key} {value!r}, expected three numbers")
    # What is cropped last decides; sizes were plain numbers once.
    stated = data.get("crop_size") if data.get("do_center_crop") else data.get("size")
    side = next(iter(stated.values()), None) if isinstance(stated, dict) else stated
    if side is not None and side != image_size:
        raise UserError(
            f"{source} makes pictures of {side} pixels, but the tower's config.json says image_size {image_size}; "
            "copy the processor file of the original model"
        )
    mean, std = (tuple(float(item) for item in value or []) for value in values)
    return mean, std


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds the files of some tokenizer."""
    names = {file.name for file in directory.iterdir()} if directory.is_dir() else set()
    return bool({"tokenizer.json", "spiece.model", "tokenizer.model"} & names) or {"vocab.json", "merges.txt"} <= names


def _expect(tensors: dict[str, TensorHeader], name: str, shape: tuple[int, ...] | None, source: Path) -> None:
    if name not in tensors:
        raise UserError(f"{source} lacks tensor {name}, which its config.json calls for; download or export it again")
    if shape is not None and tensors[name].shape != shape:
        raise UserError(f"{source} has {name} of shape {list(tensors[name].shape)}, its config.json says {list(shape)}")


def count(tensors: dict[str, TensorHeader]) -> int:
    """Stored numbers of all tensors."""
    return sum(math.prod(header.shape) for header in tensors.values())


def _truncated(path: Path, size: int, wanted: str) -> str:
    return f"{path} is incomplete: it has {size:,} bytes, expected {wanted}; download or copy it again"
