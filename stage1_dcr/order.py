"""The order in which a rank deals with its data: endless, shuffled in blocks, restartable at any sample.

The order follows from (seed, epoch) and the split over ranks, so no state of a random generator has to be saved: a
place is a handful of integers, and a restart re-reads one block. Each rank reads its data once, in a thread that is
one block ahead, and hands out encoded images in chunks; how many workers decode the chunks does not change the order.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from dcr_mllm.errors import UserError
from stage1_dcr.position import Cursor
from stage1_dcr.shards import Encoded
from stage1_dcr.sources import Source

_EMPTY_EPOCHS = 10  # in a row, before it is clear that nothing will come


def number(*parts: object) -> int:
    """A 63-bit seed from anything with a stable text."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Entry(NamedTuple):
    """An encoded image and the place after it, whose `skipped` is not known before decoding."""

    encoded: Encoded
    cursor: list[int]


@dataclass(frozen=True)
class _Block:
    start: Cursor  # of which epoch, shard, offset and block count
    entries: list[Encoded]


class EntryOrder:
    """Chunks of the entries of one rank, for ever; every iteration begins at `start`."""

    def __init__(
        self, source: Source, *, chunk_size: int, seed: int, rank: int, world_size: int, shuffle_buffer: int
    ) -> None:
        self.source = source
        self.chunk_size = chunk_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shuffle_buffer = shuffle_buffer
        self.start = Cursor()

    def __iter__(self) -> Iterator[list[Entry]]:
        entries = self.entries(self.start)
        while True:
            yield list(itertools.islice(entries, self.chunk_size))

    def entries(self, start: Cursor) -> Iterator[Entry]:
        """Yields each entry with the cursor after it, for ever."""
        cursor = replace(start)
        first = True
        for block in self._read_ahead(start):
            place = block.start
            begun, first = start.done if first else 0, False
            seed = number(self.seed, place.epoch, self.rank, place.block, "block")
            order = np.random.default_rng(seed).permutation(len(block.entries)).tolist()
            for done in range(begun, len(block.entries)):
                entry, block.entries[order[done]] = block.entries[order[done]], Encoded(0, "", None)  # frees the used
                cursor = replace(place, done=done + 1, seen=cursor.seen + 1)
                yield Entry(entry, cursor.to_list())

    def _read_ahead(self, start: Cursor) -> Iterator[_Block]:
        stop = threading.Event()
        blocks = self._blocks(start, stop)
        with ThreadPoolExecutor(1, thread_name_prefix="images") as thread:
            try:
                coming = thread.submit(next, blocks)
                while True:
                    block = coming.result()
                    coming = thread.submit(next, blocks)
                    yield block
            finally:
                stop.set()

    def _blocks(self, start: Cursor, stop: threading.Event) -> Iterator[_Block]:
        place = replace(start, done=0, seen=0, skipped=0)
        empty_epochs = 0
        while True:
            entries = self._epoch(place)
            # Whoever waits for the thread to end should not have to wait for a whole block.
            entries = itertools.takewhile(lambda _: not stop.is_set(), entries)
            while block := list(itertools.islice(entries, self.shuffle_buffer)):
                yield _Block(place, [entry for _, entry in block])
                shard, last = block[-1]
                place = replace(place, shard=shard, offset=last.index + 1, block=place.block + 1)
            if stop.is_set():
                return
            empty_epochs = 0 if place.block else empty_epochs + 1
            if empty_epochs > max(_EMPTY_EPOCHS, self.world_size):
                raise UserError(f"no image for rank {self.rank} in {self.source.description}")
            place = Cursor(epoch=place.epoch + 1)

    def _epoch(self, place: Cursor) -> Iterator[tuple[int, Encoded]]:
        """Yields (position of the shard, entry) of what is left of the epoch for this rank."""
        shards = self.source.shards
        order = np.random.default_rng(number(self.seed, place.epoch, "shards")).permutation(len(shards)).tolist()
        whole = len(shards) >= self.world_size
        if whole:
            order = order[self.rank :: self.world_size]
        for position in range(place.shard, len(order)):
            offset = place.offset if position == place.shard else 0
            # Too few shards to go round: all read all of them and take turns. Who begins changes from shard to shard.
            shift = position + place.epoch

            def wanted(index: int, offset: int = offset, shift: int = shift) -> bool:
                return index >= offset and (whole or (index + shift) % self.world_size == self.rank)

            for entry in shards[order[position]].samples(wanted):
                yield position, entry
