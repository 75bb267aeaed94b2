"""The frozen tower's output, computed once per image and kept on disk as safetensors shards.

Beside a 7B language model the tower is about 2 % of a step and the cache is not worth its disk (ViT-L at 336 px: 1.2 MB
an image in bf16); beside a 0.5B one it is about a quarter, and a sweep or several epochs read it again and again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dcr_mllm.log import get_logger
from dcr_mllm.runs import write_json_atomic
from stage2_llava.collate import pixels
from stage2_llava.export import module_hash
from stage2_llava.step import tower_features

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from stage2_llava.instructions import Instructions

logger = get_logger(__name__)

_IMAGES_PER_SHARD = 512


class FeatureCache:
    """Features [P, D] by image name, read from the shards below a directory; cheap to pickle for workers."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._place: dict[str, str] = {}
        for index in sorted(directory.glob("index-*.json")):
            shard = f"features-{index.stem.removeprefix('index-')}.safetensors"
            self._place.update(dict.fromkeys(json.loads(index.read_text()), shard))
        self._open: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, name: str) -> Tensor:
        shard = self._place[name]
        if shard not in self._open:
            self._open[shard] = safe_open(self.directory / shard, framework="pt")
        return self._open[shard].get_tensor(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def cache_directory(
    root: Path, llava: LlavaForConditionalGeneration, processor: Any, images: str | Sequence[str] | None
) -> Path:
    """Where the features of a tower under a preprocessing lie: another tower, layer, size or padding is another folder.

    Args:
        root: Folder of all caches.
        llava: Its tower, layer and strategy count.
        processor: Its image processor counts.
        images: Where image names are looked up.
    """
    config = llava.config
    key = {
        "tower": module_hash(llava.model.vision_tower),
        "layer": config.vision_feature_layer,
        "strategy": config.vision_feature_select_strategy,
        "image_processor": processor.image_processor.to_dict(),
        "images": images,
    }
    return root / hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]


@torch.inference_mode()
def build_cache(
    directory: Path,
    llava: LlavaForConditionalGeneration,
    processor: Any,
    instructions: Instructions,
    *,
    device: torch.device,
    batch_size: int = 32,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Compute what is missing. Several processes share the work; wait for all of them before reading.

    Args:
        directory: From `cache_directory`; shards are written whole or not at all, so a killed build goes on.
        llava: Its tower is moved to `device`.
        processor: Prepares the images.
        instructions: Whose images are needed.
        device: Where the tower runs.
        batch_size: Images at a time.
        rank: Of this process.
        world_size: Number of processes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    present = FeatureCache(directory)
    wanted: dict[str, int] = {}  # a sample that shows the image, by its index: half a million samples are gigabytes
    for k, sample in enumerate(instructions):
        for name in sample.images:
            wanted.setdefault(name, k)
    missing = [name for name in sorted(wanted) if name not in present][rank::world_size]
    if not missing:
        return
    logger.info("computing the tower's features of %d images into %s", len(missing), directory)
    llava.model.vision_tower.to(device)
    for start in range(0, len(missing), _IMAGES_PER_SHARD):
        names = missing[start : start + _IMAGES_PER_SHARD]
        features: dict[str, Tensor] = {}
        for first in range(0, len(names), batch_size):
            chunk = names[first : first + batch_size]
            images = [instructions.open_image(instructions[wanted[name]], name) for name in chunk]
            values = tower_features(llava, pixels(processor, images).to(device))
            features.update(zip(chunk, values.cpu().unbind(), strict=True))
        stem = hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
        partial = directory / f".{stem}.partial"
        save_file({name: value.clone() for name, value in features.items()}, partial)
        partial.replace(directory / f"features-{stem}.safetensors")
        write_json_atomic(directory / f"index-{stem}.json", names)
