"""One plan of batches for any number of processes: everything occurs, kinds stay apart, a resumed plan goes on."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from stage2_llava.batches import BatchPlan, BatchPosition, epoch_batches, micro_batches, steps_per_epoch

WORDS = np.random.default_rng(0).integers(1, 200, 203)
HAS_IMAGE = np.random.default_rng(1).random(203) > 0.1


def plan(batch_size: int = 16, micro: int = 4, *, rank: int = 0, world: int = 1, start: int = 0) -> BatchPlan:
    return BatchPlan(
        WORDS,
        HAS_IMAGE,
        batch_size=batch_size,
        micro_batch_size=micro,
        group_by_modality=True,
        seed=5,
        rank=rank,
        world_size=world,
        start=start,
    )


@pytest.mark.parametrize("group", [True, False])
def test_an_epoch_holds_every_sample_and_only_fills_up_the_last_batch(group: bool):
    batches = epoch_batches(WORDS, HAS_IMAGE, 16, group_by_modality=group, seed=0, epoch=0)
    assert len(batches) == steps_per_epoch(203, 16) == 13
    assert all(len(batch) == 16 for batch in batches)
    counts = np.bincount(np.concatenate(batches), minlength=203)
    assert counts.min() == 1 and counts.sum() == 13 * 16 and counts.max() <= 2
    assert all((np.diff(WORDS[batch]) <= 0).all() for batch in batches)


def test_grouping_keeps_text_only_samples_apart_but_for_the_left_overs():
    batches = epoch_batches(WORDS, HAS_IMAGE, 4, group_by_modality=True, seed=0, epoch=0)
    mixed = [batch for batch in batches if len(set(HAS_IMAGE[batch])) == 2]
    assert len(mixed) <= 2
    free = epoch_batches(WORDS, HAS_IMAGE, 4, group_by_modality=False, seed=0, epoch=0)
    assert sum(len(set(HAS_IMAGE[batch])) == 2 for batch in free) > 5


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(
            epoch_batches(WORDS, HAS_IMAGE, 16, group_by_modality=True, seed=seed, epoch=epoch)
        ).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 0)


@pytest.mark.parametrize(("micro", "world"), [(16, 1), (4, 4), (2, 2), (1, 8)])
def test_any_split_gives_the_same_global_batches(micro: int, world: int):
    per_step = 16 // (micro * world)
    ranks = [list(islice(plan(micro=micro, rank=rank, world=world), 30 * per_step)) for rank in range(world)]
    for step in range(30):
        together = sorted(
            index for rank in ranks for part in rank[step * per_step : (step + 1) * per_step] for index in part
        )
        expected = sorted(islice(plan(micro=16), step, step + 1).__next__())
        assert together == expected


def test_processes_get_samples_of_similar_length_at_the_same_time():
    batch = epoch_batches(WORDS, HAS_IMAGE, 64, group_by_modality=True, seed=0, epoch=0)[0]
    parts = [micro_batches(batch, 4, rank, 2) for rank in range(2)]
    spread = [abs(WORDS[a].max() - WORDS[b].max()) for a, b in zip(*parts, strict=True)]
    assert np.mean(spread) < 0.25 * np.ptp(WORDS[batch])


@pytest.mark.parametrize("start", [0, 1, 3, 51, 52, 53, 160])
def test_a_resumed_plan_goes_on_with_the_next_micro_batch(start: int):
    whole = list(islice(plan(), 200))
    assert list(islice(plan(start=start), 200 - start)) == whole[start:]


def test_position_counts_and_survives():
    position = BatchPosition()
    for _ in range(3):
        position.update({})
    assert BatchPosition.from_json(position.to_json()) == BatchPosition(micro_batches=3)
