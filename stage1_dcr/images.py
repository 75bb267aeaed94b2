"""An endless, shuffled, sharded stream of training images that restarts exactly where it was.

A rank's data are read once, in an order that does not know of workers (`order`); workers decode chunks of it
(`samples`); here the chunks become batches without broken images, and it is counted what was skipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from dcr_mllm.errors import UserError
from dcr_mllm.log import get_logger
from stage1_dcr.order import EntryOrder
from stage1_dcr.position import Cursor, StreamPosition
from stage1_dcr.samples import Decoder
from stage1_dcr.sources import Source, fingerprint, open_source
from stage1_dcr.view_config import ViewConfig, check_range

__all__ = ["ImageLoader", "Source", "StreamPosition", "fingerprint", "make_loader", "open_source"]

logger = get_logger(__name__)

_TENSORS = ("images", "view_params", "timestep_uniform", "noise")
_JUDGED_AFTER = 100  # samples; before that a single broken image would be too large a share
_EMPTY_EPOCHS = 10  # in a row, before it is clear that no image will come


class ImageLoader(DataLoader):
    """A DataLoader over an `EntryOrder`; every `iter` starts at `position`, i.e. after what has been consumed."""

    position: StreamPosition
    order: EntryOrder
    max_skipped_fraction: float

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start = Cursor.from_list(self.position.cursor.to_list())
        self.order.start = start
        return self._batches(self.accounted(super().__iter__(), start))

    def _batches(self, chunks: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Batches of equal size; a chunk is one as it is, until a broken image has made one shorter."""
        size = self.order.chunk_size
        held: dict[str, Any] | None = None
        for chunk in chunks:
            held = chunk if held is None else _join(held, chunk)
            if len(held["keys"]) >= size:
                batch = {name: value[:size] for name, value in held.items()}
                held = {name: value[size:] for name, value in held.items()} if len(held["keys"]) > size else None
                batch["cursor"] = batch.pop("cursors")[-1]
                yield batch

    def accounted(self, chunks: Iterable[dict[str, Any]], start: Cursor) -> Iterator[dict[str, Any]]:
        """Names, counts and judges what is broken, and yields the rest with the cursor after each sample."""
        skipped, before, last_broken = start.skipped, start, ""
        num_good = empty_epochs = 0  # num_good: in this epoch
        for chunk in chunks:
            keys, cursors = [], []
            for key, values, problem in chunk.pop("outcomes"):
                cursor = Cursor.from_list(values)
                if cursor.epoch > before.epoch:
                    self._judge(before, last_broken)
                    if before.epoch == 0 and start == Cursor() and 0 < num_good < self.order.chunk_size:
                        logger.warning(
                            "only %d images for a batch of %d: every batch holds some image twice, once as its own "
                            "negative",
                            num_good,
                            self.order.chunk_size,
                        )
                    empty_epochs = 0 if num_good else empty_epochs + 1
                    if empty_epochs > _EMPTY_EPOCHS:
                        raise UserError(f"no image for rank {self.order.rank} in {self.order.source.description}")
                    num_good = 0
                if problem:
                    skipped += 1
                    last_broken = key
                    logger.warning("skipped %s: %s", key, problem)
                cursor.skipped = skipped
                if not problem:
                    num_good += 1
                    keys.append(key)
                    cursors.append(cursor.to_list())
                if cursor.seen >= _JUDGED_AFTER:
                    self._judge(cursor, last_broken)
                before = cursor
            if keys:
                yield {**chunk, "keys": keys, "cursors": cursors}

    def _judge(self, cursor: Cursor, last_broken: str) -> None:
        if cursor.skipped > self.max_skipped_fraction * cursor.seen:
            raise UserError(
                f"{cursor.skipped} of {cursor.seen} images are broken, more than max_skipped_fraction="
                f"{self.max_skipped_fraction:g} allows; the last one is {last_broken or 'not known'} in "
                f"{self.order.source.description}"
            )


def _join(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two chunks as one, in pinned memory if they were."""
    joined: dict[str, Any] = {name: one[name] + other[name] for name in ("keys", "cursors")}
    for name in _TENSORS:
        tensor = torch.cat([one[name], other[name]])
        joined[name] = tensor.pin_memory() if other[name].is_pinned() else tensor
    return joined


def _as_it_is(chunk: dict[str, Any]) -> dict[str, Any]:
    return chunk


def _tell_split(num_shards: int, world_size: int) -> None:
    """Warns of a split over the ranks that costs reading, or lets epochs drift apart."""
    if num_shards < world_size:
        logger.warning(
            "only %d shards for %d processes: each process reads all of them and keeps every %dth image; "
            "write the data in at least %d shards",
            num_shards,
            world_size,
            world_size,
            world_size,
        )
    elif num_shards % world_size and num_shards < 4 * world_size:
        logger.warning(
            "%d shards for %d processes: in an epoch some read %d and others %d, who begin the next one earlier",
            num_shards,
            world_size,
            num_shards // world_size + 1,
            num_shards // world_size,
        )


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
    `StreamPosition.from_json(...)` here goes on there, with bit-identical batches, whatever the number of workers.
    Batches run on across epochs, so a batch is never ragged; the one batch that straddles two epochs may hold an image
    twice.

    Args:
        data: see `open_source`.
        batch_size: images per batch and rank, at least 2.
        size: side of the square images.
        latent_shape: [C, h, w] of the noise.
        seed: decides the order and everything random about each sample.
        rank: of this process.
        world_size: number of processes.
        num_workers: decoding processes of this rank; 0 decodes in this process. The batches do not depend on it.
        shuffle_buffer: encoded images that are shuffled together; up to twice as many are held in memory.
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
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}")
    if batch_size < 2:
        raise UserError(f"batch_size is {batch_size}: a batch of one has no negatives; take 2 or more")
    if shuffle_buffer < 1:
        raise UserError(f"shuffle_buffer is {shuffle_buffer}: it must be 1 (no shuffling within shards) or more")
    check_range("crop_scale", crop_scale, 1.0)
    check_range("crop_ratio", crop_ratio, math.inf)
    source = open_source(data)
    if rank == 0:
        _tell_split(len(source.shards), world_size)
    order = EntryOrder(
        source, chunk_size=batch_size, seed=seed, rank=rank, world_size=world_size, shuffle_buffer=shuffle_buffer
    )
    decoder = Decoder(
        size=size,
        latent_shape=latent_shape,
        seed=seed,
        views=views or ViewConfig(),
        crop_scale=crop_scale,
        crop_ratio=crop_ratio,
    )
    loader = ImageLoader(
        decoder,
        batch_sampler=order,  # it yields the entries themselves instead of their indices
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=prefetch_factor if num_workers else None,
        multiprocessing_context=multiprocessing_context if num_workers else None,
        # Of its own, or starting to iterate would draw from the global generator, and a resumed run would differ.
        generator=torch.Generator(),
    )
    loader.order = order
    loader.max_skipped_fraction = max_skipped_fraction
    loader.position = position if position is not None else StreamPosition()
    loader.position.bind(
        {  # everything that the order of the samples depends on
            "rank": rank,
            "world_size": world_size,
            "batch_size": batch_size,
            "shuffle_buffer": shuffle_buffer,
            "seed": seed,
            "data": source.fingerprint,
        }
    )
    return loader
