"""Which samples make which batch: one plan for any number of processes, so that two runs see the same data.

The composition of a global batch follows LLaVA's sampler (llava/train/llava_trainer.py,
get_modality_length_grouped_indices): with grouping, a batch holds either samples with images or text-only ones, and the
left-overs of both kinds make the last ones. Inside a batch samples are sorted by length, and micro-batches that run at
the same time on several processes are neighbours, so that little is spent on padding. The loss is a mean over all
learned tokens of the global batch, so this order does not change the gradient.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class BatchPosition:
    """Where a process stands: how many micro-batches it has consumed."""

    micro_batches: int = 0

    def update(self, batch: dict[str, Any]) -> None:
        """Note that a batch was consumed."""
        self.micro_batches += 1

    def to_json(self) -> str:
        """For the checkpoint."""
        return json.dumps({"micro_batches": self.micro_batches})

    @classmethod
    def from_json(cls, text: str) -> BatchPosition:
        """From a checkpoint."""
        return cls(**json.loads(text))


def epoch_batches(
    num_words: np.ndarray, has_image: np.ndarray, batch_size: int, *, group_by_modality: bool, seed: int, epoch: int
) -> list[np.ndarray]:
    """The global batches of an epoch, each a sorted-by-length array of `batch_size` sample indices.

    Every sample occurs; where the last batch is not full, it is filled up with the first samples of the epoch.

    Args:
        num_words: Length of every sample [N].
        has_image: Which of them have images, bool [N].
        batch_size: Samples per optimizer step.
        group_by_modality: Keep samples with and without images apart.
        seed: Of the order.
        epoch: From 0; each has an order of its own.
    """
    rng = np.random.default_rng([seed, epoch])
    kinds = (
        [np.flatnonzero(has_image), np.flatnonzero(~has_image)] if group_by_modality else [np.arange(len(num_words))]
    )
    full: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    for indices in kinds:
        order = rng.permutation(indices)
        count = len(order) // batch_size
        full += np.split(order[: count * batch_size], count) if count else []
        rest.append(order[count * batch_size :])
    full = [full[k] for k in rng.permutation(len(full))]
    left = rng.permutation(np.concatenate(rest))
    first = np.concatenate([*full, left])
    while len(left):
        batch, left = left[:batch_size], left[batch_size:]
        # np.resize repeats where there are fewer samples than one batch holds.
        missing = batch_size - len(batch)
        full.append(np.concatenate([batch, np.resize(first, missing)]) if missing else batch)
    return [batch[np.argsort(-num_words[batch], kind="stable")] for batch in full]


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Optimizer steps that see every sample at least once."""
    return math.ceil(num_samples / batch_size)


def micro_batches(batch: np.ndarray, micro_batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """This process's micro-batches of a global batch, each [micro_batch_size]."""
    parts = batch.reshape(-1, world_size, micro_batch_size)
    return list(parts[:, rank])


class BatchPlan:
    """Endless micro-batches of one process, from a position on; a `batch_sampler` for a DataLoader."""

    def __init__(
        self,
        num_words: np.ndarray,
        has_image: np.ndarray,
        *,
        batch_size: int,
        micro_batch_size: int,
        group_by_modality: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ):
        assert batch_size % (micro_batch_size * world_size) == 0, "accumulation() refuses this"
        self.num_words, self.has_image = num_words, has_image
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.group_by_modality, self.seed = group_by_modality, seed
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[int]]:
        per_batch = self.batch_size // (self.micro_batch_size * self.world_size)
        per_epoch = steps_per_epoch(len(self.num_words), self.batch_size) * per_batch
        epoch, skip = divmod(self.start, per_epoch)
        while True:
            batches = epoch_batches(
                self.num_words,
                self.has_image,
                self.batch_size,
                group_by_modality=self.group_by_modality,
                seed=self.seed,
                epoch=epoch,
            )
            for batch in batches[skip // per_batch :]:
                for micro in micro_batches(batch, self.micro_batch_size, self.rank, self.world_size)[
                    skip % per_batch :
                ]:
                    yield micro.tolist()
                skip = 0
            epoch, skip = epoch + 1, 0
