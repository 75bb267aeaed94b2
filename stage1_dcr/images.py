"""An endless, shuffled, sharded stream of training images that restarts exactly where it was.

What a sample is (its crop, view, timestep and noise) depends on (seed, epoch, key) alone, and the order of samples on
(seed, epoch) and the split over ranks and workers: no state of a random generator has to be saved. A consumer (one
worker of one rank) shuffles in blocks, so its place is a handful of integers, and a restart re-reads one block at most.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from dcr_mllm.errors import UserError
from dcr_mllm.log import get_logger
from stage1_dcr.position import Cursor, StreamPosition
from stage1_dcr.shards import Encoded
from stage1_dcr.sources import Source, fingerprint, open_source
from stage1_dcr.view_config import ViewConfig, check_range
from stage1_dcr.views import draw_view_params

__all__ = ["ImageLoader", "ImageStream", "Source", "StreamPosition", "fingerprint", "make_loader", "open_source"]

logger = get_logger(__name__)

_JUDGED_AFTER = 100  # samples; before that a single broken image would be too large a share
_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop


def _number(*parts: object) -> int:
    """A 63-bit seed from anything with a stable text."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(_number(*parts))


def draw_crop(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """Draws (top, left, height, width) as torchvision's RandomResizedCrop does, but from a given generator."""
    draws = torch.rand(_CROP_ATTEMPTS, 4, generator=generator, dtype=torch.float64).tolist()
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, ratio_draw, top_draw, left_draw in draws:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(low + (high - low) * ratio_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = max(1, min(width, round(height * aspect))), max(1, min(height, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def decode(data: bytes) -> torch.Tensor:
    """Decodes an image of any mode to uint8 RGB [3, H, W], turned upright if it says how."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        upright: Image.Image = image
        with contextlib.suppress(Exception):  # damaged EXIF data do not make the pixels bad
            upright = ImageOps.exif_transpose(image)
        return functional.pil_to_tensor(upright.convert("RGB"))


@dataclass(kw_only=True, frozen=True)
class _Failure:
    """Carries a UserError out of a worker: raised there, it would arrive wrapped in a traceback."""

    message: str


class ImageStream(IterableDataset):
    """The samples of one rank; each worker of a DataLoader gets its share. See `make_loader` for the arguments."""

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        size: int,
        latent_shape: Sequence[int],
        seed: int,
        rank: int,
        world_size: int,
        num_workers: int,
        shuffle_buffer: int,
        views: ViewConfig,
        crop_scale: tuple[float, float] = (0.9, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        max_skipped_fraction: float = 0.05,
        position: StreamPosition | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        if batch_size < 2:
            raise UserError(f"batch_size is {batch_size}: a batch of one has no negatives; take 2 or more")
        if shuffle_buffer < 1:
            raise UserError(f"shuffle_buffer is {shuffle_buffer}: it must be 1 (no shuffling within shards) or more")
        check_range("crop_scale", crop_scale, 1.0)
        check_range("crop_ratio", crop_ratio, math.inf)
        self.source = source
        self.batch_size = batch_size
        self.size = size
        self.latent_shape = tuple(latent_shape)
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.num_workers = max(num_workers, 1)
        self.shuffle_buffer = shuffle_buffer
        self.views = views
        self.crop_scale = crop_scale
        self.crop_ratio = crop_ratio
        self.max_skipped_fraction = max_skipped_fraction
        self.start = (position or StreamPosition()).copy()
        self.start.bind(self.identity)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the order of the samples depends on."""
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "num_workers": self.num_workers,
            "batch_size": self.batch_size,
            "shuffle_buffer": self.shuffle_buffer,
            "seed": self.seed,
            "data": self.source.fingerprint,
        }

    def __iter__(self) -> Iterator[dict[str, Any] | _Failure]:
        info = get_worker_info()
        if info is not None and info.num_workers != self.num_workers:
            raise ValueError(f"the stream was made for {self.num_workers} workers, the loader has {info.num_workers}")
        # The loader asks its workers in turn, so the first one has to play the role of whoever would come next.
        role = ((info.id if info else 0) + self.start.batches) % self.num_workers
        cursor = self.start.cursors.get(role, Cursor())
        try:
            for sample, after in self._samples(role, Cursor.from_list(cursor.to_list())):
                yield {**sample, "cursor": [role, *after]}
        except UserError as error:
            yield _Failure(message=str(error))

    def _samples(self, role: int, cursor: Cursor) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Yields each sample with the cursor after it, for ever."""
        consumers = self.world_size * self.num_workers
        consumer = self.rank * self.num_workers + role
        last_broken = ""
        empty_epochs = 0
        while True:
            entries = self._entries(cursor, consumer, consumers)
            whole_epoch, first = cursor.block == cursor.done == 0, cursor.seen - cursor.skipped
            while block := list(itertools.islice(entries, self.shuffle_buffer)):
                seed = _number(self.seed, cursor.epoch, consumer, cursor.block, "block")
                order = np.random.default_rng(seed).permutation(len(block)).tolist()
                end = block[-1][0], block[-1][1].index + 1
                while cursor.done < len(block):
                    place = order[cursor.done]
                    entry, block[place] = block[place][1], (0, Encoded(0, "", None))  # frees what has been used
                    cursor.done += 1
                    cursor.seen += 1
                    sample, problem = self._sample(entry, cursor.epoch)
                    if sample is None:
                        cursor.skipped += 1
                        last_broken = entry.key
                        logger.warning("skipped %s: %s", entry.key, problem)
                    if cursor.seen >= _JUDGED_AFTER:
                        self._judge(cursor, last_broken)
                    if sample is not None:
                        yield sample, cursor.to_list()
                cursor.shard, cursor.offset = end
                cursor.block, cursor.done = cursor.block + 1, 0
            self._judge(cursor, last_broken)
            usable = cursor.seen - cursor.skipped - first
            if whole_epoch and 0 < usable < self.batch_size and cursor.epoch == 0:
                logger.warning(
                    "only %d images for a batch of %d: every batch holds some image twice, once as its own negative",
                    usable,
                    self.batch_size,
                )
            empty_epochs = 0 if usable or not whole_epoch else empty_epochs + 1
            if empty_epochs > max(10, consumers):
                raise UserError(f"no image for worker {role} of rank {self.rank} in {self.source.description}")
            cursor.epoch, cursor.shard, cursor.offset, cursor.block = cursor.epoch + 1, 0, 0, 0

    def _entries(self, cursor: Cursor, consumer: int, consumers: int) -> Iterator[tuple[int, Encoded]]:
        """Yields (position of the shard, entry) of what is left of the cursor's epoch for this consumer."""
        shards = self.source.shards
        epoch, first_shard, first_offset = cursor.epoch, cursor.shard, cursor.offset
        order = np.random.default_rng(_number(self.seed, epoch, "shards")).permutation(len(shards)).tolist()
        whole = len(shards) >= consumers
        if whole:
            order = order[consumer::consumers]
        for position in range(first_shard, len(order)):
            offset = first_offset if position == first_shard else 0
            # Too few shards to go round: all read all of them and take turns. Who begins changes from shard to shard.
            shift = position + epoch

            def wanted(index: int, offset: int = offset, shift: int = shift) -> bool:
                return index >= offset and (whole or (index + shift) % consumers == consumer)

            for entry in shards[order[position]].samples(wanted):
                yield position, entry

    def _judge(self, cursor: Cursor, last_broken: str) -> None:
        if cursor.skipped > self.max_skipped_fraction * cursor.seen:
            raise UserError(
                f"{cursor.skipped} of {cursor.seen} images are broken, more than max_skipped_fraction="
                f"{self.max_skipped_fraction:g} allows; the last one is {last_broken or 'not known'} in "
                f"{self.source.description}"
            )

    def _sample(self, entry: Encoded, epoch: int) -> tuple[dict[str, Any] | None, str]:
        """Decodes, crops, and draws all that is random about a sample; None and the reason if it is broken."""
        if entry.data is None:
            return None, entry.problem
        try:
            image = decode(entry.data)
        except UnidentifiedImageError:  # its text is the address of a buffer
            return None, "not an image of a known kind"
        except Exception as error:  # fed with broken bytes, a decoder raises nearly anything
            return None, f"{type(error).__name__}: {error}"
        # A generator for each purpose: another crop or view setting leaves the noise as it is.
        draw = (self.seed, epoch, entry.key)
        height, width = image.shape[1:]
        box = draw_crop(height, width, self.crop_scale, self.crop_ratio, _generator(*draw, "crop"))
        noise_generator = _generator(*draw, "noise")
        sample = {
            "image": functional.resized_crop(image, *box, [self.size] * 2, InterpolationMode.BICUBIC, antialias=True),
            "view_params": draw_view_params(self.views, _generator(*draw, "view")),
            "timestep_uniform": torch.rand((), generator=noise_generator),
            "noise": torch.randn(self.latent_shape, generator=noise_generator),
            "key": entry.key,
        }
        return sample, ""


def collate(samples: Sequence[dict[str, Any] | _Failure]) -> dict[str, Any]:
    """Stacks samples into a batch, see `make_loader`. `cursor` is that of the last one."""
    good: list[dict[str, Any]] = []
    for sample in samples:
        if isinstance(sample, _Failure):
            return {"failure": sample.message}
        good.append(sample)
    if len(good) < 2:
        raise ValueError(f"a batch of {len(good)} has no negatives; take 2 or more")
    return {
        "images": torch.stack([sample["image"] for sample in good]),
        "view_params": torch.stack([sample["view_params"] for sample in good]),
        "timestep_uniform": torch.stack([sample["timestep_uniform"] for sample in good]),
        "noise": torch.stack([sample["noise"] for sample in good]),
        "keys": [sample["key"] for sample in good],
        "cursor": good[-1]["cursor"],
    }


class ImageLoader(DataLoader):
    """A DataLoader over an `ImageStream`; every `iter` starts at `position`, i.e. after what has been consumed."""

    position: StreamPosition

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.dataset.start = self.position.copy()  # the workers are started, and get their copy, below
        return self._checked(super().__iter__())

    @staticmethod
    def _checked(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            if "failure" in batch:
                raise UserError(batch["failure"])
            yield batch


def make_loader(
    data: str | Sequence[str] | Source,
    *,
    batch_size: int,
    size: int,
    latent_shape: Sequence[int],
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    shuffle_buffer: int = 2000,
    views: ViewConfig | None = None,
    crop_scale: tuple[float, float] = (0.9, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    max_skipped_fraction: float = 0.05,
    position: StreamPosition | None = None,
    prefetch_factor: int = 2,
    multiprocessing_context: str | None = None,
) -> ImageLoader:
    """Makes the endless loader of one rank.

    It is already split by rank: hand it to a Trainer unprepared. The training loop calls
    `loader.position.update(batch)` for each batch it has consumed and saves `loader.position.to_json()`; passing
    `StreamPosition.from_json(...)` here goes on there, with bit-identical batches. Whole batches are built per worker,
    across epochs, so a batch is never ragged; the one batch that straddles two epochs may hold an image twice.

    Args:
        data: see `open_source`.
        batch_size: images per batch and rank, at least 2.
        size: side of the square images.
        latent_shape: [C, h, w] of the noise.
        seed: decides the order and everything random about each sample.
        rank: of this process.
        world_size: number of processes.
        num_workers: decoding processes of this rank; 0 decodes in this process. The order depends on it.
        shuffle_buffer: encoded images that a worker holds and shuffles.
        views: ranges of the view parameters.
        crop_scale: area of the random crop relative to the image.
        crop_ratio: width : height of the random crop.
        max_skipped_fraction: a larger share of broken images ends the run with a UserError.
        position: where to go on.
        prefetch_factor: batches that a worker prepares ahead.
        multiprocessing_context: `fork`, `spawn` or `forkserver`; the platform's default if None.

    Yields:
        images uint8 [B, 3, S, S]; view_params [B, P]; timestep_uniform [B] in [0, 1); noise [B, C, h, w]; keys, a list
        of B strings; cursor, integers for `StreamPosition.update`.
    """
    stream = ImageStream(
        open_source(data),
        batch_size=batch_size,
        size=size,
        latent_shape=latent_shape,
        seed=seed,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        shuffle_buffer=shuffle_buffer,
        views=views or ViewConfig(),
        crop_scale=crop_scale,
        crop_ratio=crop_ratio,
        max_skipped_fraction=max_skipped_fraction,
        position=position,
    )
    loader = ImageLoader(
        stream,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=prefetch_factor if num_workers else None,
        multiprocessing_context=multiprocessing_context if num_workers else None,
        # Of its own, or starting to iterate would draw from the global generator, and a resumed run would differ.
        generator=torch.Generator(),
    )
    loader.position = position if position is not None else StreamPosition()
    loader.position.bind(stream.identity)
    return loader
