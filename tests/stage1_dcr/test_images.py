"""The image stream: every sample once per epoch, bit-exact restarts, what a sample is."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from dcr_mllm.errors import UserError
from stage1_dcr.images import StreamPosition, make_loader
from stage1_dcr.view_config import ViewConfig
from stage1_dcr.views import NUM_VIEW_PARAMS
from tests.stage1_dcr.image_data import (
    LATENT,
    assert_same,
    epoch_keys,
    epoch_samples,
    keys_of,
    loader_of,
    take,
    write_tars,
)

SHARED = Path(os.environ.get("DCR_MLLM_SHARED", Path(__file__).parents[3] / "shared"))


@pytest.fixture
def tars(tmp_path) -> str:
    return write_tars(tmp_path / "tars", [9, 5, 14, 3, 8, 1, 6])  # 46 images, uneven


def test_batch(tars):
    batch = take(loader_of(tars), 1)[0]
    assert batch["images"].shape == (3, 3, 8, 8) and batch["images"].dtype == torch.uint8
    assert batch["view_params"].shape == (3, NUM_VIEW_PARAMS)
    assert batch["timestep_uniform"].shape == (3,) and 0 <= batch["timestep_uniform"].min() < 1
    assert batch["noise"].shape == (3, *LATENT) and batch["noise"].dtype == torch.float32
    assert len(set(batch["keys"])) == 3
    numbers = [int(key.rpartition("/")[2]) for key in batch["keys"]]
    assert batch["images"][:, 0, 0, 0].tolist() == numbers  # the right pixels under the right key


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 8, 12])
def test_every_sample_once_per_epoch(tars, world_size, epoch):
    """7 shards for 1 to 12 ranks: shards are dealt out, or all ranks read all of them."""
    assert len(epoch_keys(tars, world_size=world_size, epoch=epoch)) == 46  # the helper refuses doubles


@pytest.mark.parametrize("shards", [[46], [20, 1, 25]])
@pytest.mark.parametrize("workers", [2, 5])
def test_every_sample_once_through_real_workers(tmp_path, shards, workers):
    """Fewer shards than workers, and than ranks x workers, and ranks that run out of their epoch at different times."""
    tars, world_size = write_tars(tmp_path, shards), 2
    seen: Counter[str] = Counter()
    lengths = []
    for rank in range(world_size):
        mine = list(epoch_samples(tars, world_size=world_size, rank=rank))
        lengths.append(len(mine))
        found = keys_of(take(loader_of(tars, rank=rank, world_size=world_size, num_workers=workers), 20))
        assert found[: len(mine)] == mine  # what follows is of the next epoch
        seen.update(found[: len(mine)])
    assert len(seen) == 46 and set(seen.values()) == {1}
    assert len(shards) == 1 or lengths[0] != lengths[1]


def test_order_differs_between_epochs_and_seeds_and_is_shuffled(tars):
    first = epoch_keys(tars)
    assert first == epoch_keys(tars)
    assert first != epoch_keys(tars, epoch=1)
    assert first != epoch_keys(tars, seed=2)
    assert first[:9] != sorted(first[:9])


def test_ranks_are_disjoint(tars):
    seen = [set(keys_of(take(loader_of(tars, rank=rank, world_size=2), 4))) for rank in range(2)]
    assert not seen[0] & seen[1]


def test_batches_do_not_depend_on_the_workers(tars):
    whole = take(loader_of(tars), 20)
    for workers in (1, 2, 3):
        assert_same(take(loader_of(tars, num_workers=workers), 20), whole)


def test_restart_with_any_workers_is_bit_exact(tars):
    """Stopped after 5, 18 and 31 batches (of 46 / 3 per epoch), and every part has another number of workers."""
    whole = take(loader_of(tars), 42)
    position = StreamPosition()
    done: list[dict] = []
    for stop, workers in ((5, 2), (18, 0), (31, 3), (42, 1)):
        # The position goes through text, as it does in a checkpoint; workers have read ahead of it.
        position = StreamPosition.from_json(position.to_json())
        loader = loader_of(tars, num_workers=workers, position=position)
        done += take(loader, stop - len(done))
        position = loader.position
    assert_same(done, whole)
    assert whole[-1]["cursor"][0] >= 2


def consume(tars: str, folder: Path, workers: int) -> None:
    """Goes on for ever, noting every batch, with the position in a file after every second one."""
    saved = folder / "position.json"
    position = StreamPosition.from_json(saved.read_text()) if saved.exists() else StreamPosition()
    loader = loader_of(tars, num_workers=workers, position=position)
    with open(folder / "log", "a") as log:
        for batch in loader:
            print(position.batches, digest(batch), file=log, flush=True)
            position.update(batch)
            if position.batches % 2 == 0:
                (folder / "new").write_text(position.to_json())
                (folder / "new").replace(saved)
            time.sleep(0.01)


def digest(batch: dict) -> str:
    content = [batch[name].numpy().tobytes() for name in ("images", "view_params", "timestep_uniform", "noise")]
    return hashlib.sha256(b"".join([*content, repr(batch["keys"]).encode()])).hexdigest()


def test_killed_process_goes_on_exactly(tars, tmp_path):
    """SIGKILL at any moment, then another number of workers: every batch, repeated ones too, is the uninterrupted."""
    runs = [2, 3, 0, 1, 1]
    for number, workers in enumerate(runs, start=1):
        process = multiprocessing.get_context("fork").Process(target=consume, args=(tars, tmp_path, workers))
        process.start()
        deadline = time.monotonic() + 60
        while not (tmp_path / "log").exists() or len((tmp_path / "log").read_text().splitlines()) < 9 * number:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        process.join()
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines() if len(line.split()) == 2]
    reached = max(int(index) for index, _ in lines) + 1
    whole = [digest(batch) for batch in take(loader_of(tars), reached)]
    assert {int(index) for index, _ in lines} == set(range(reached)) and reached > 30
    assert all(content == whole[int(index)] for index, content in lines)


@pytest.mark.parametrize("buffer", [1, 7, 1000])
@pytest.mark.parametrize("stop", range(0, 20, 3))
def test_restart_at_every_kind_of_place(tars, stop, buffer):
    """World of 9 over 7 shards: restarts in the mode in which all read all shards."""
    for world_size in (2, 9):
        changes = {"world_size": world_size, "rank": 1, "shuffle_buffer": buffer, "batch_size": 2}
        whole = take(loader_of(tars, **changes), 22)
        loader = loader_of(tars, **changes)
        head = take(loader, stop)
        tail = take(loader_of(tars, position=StreamPosition.from_json(loader.position.to_json()), **changes), 22 - stop)
        assert_same(head + tail, whole)


def test_restart_reads_the_current_block_only(tars, monkeypatch):
    loader = loader_of(tars, batch_size=2)
    take(loader, 18)  # 36 samples are 5 blocks of 7 and one sample
    read = []
    original = type(loader.order.source.shards[0]).samples

    def counting(self, wanted):
        for entry in original(self, wanted):
            read.append(entry.key)
            yield entry

    monkeypatch.setattr(type(loader.order.source.shards[0]), "samples", counting)
    again = loader_of(tars, batch_size=2, position=loader.position)
    read.clear()
    take(again, 1)
    assert len(read) <= 2 * 7  # the block, and the one ahead of it


def test_second_iteration_goes_on_after_what_was_consumed(tars):
    whole = take(loader_of(tars), 6)
    loader = loader_of(tars)
    assert_same(take(loader, 2) + take(loader, 4), whole)


def test_spawned_workers_give_the_same(tars):
    changes = {"num_workers": 1, "world_size": 2, "rank": 1}
    assert_same(
        take(loader_of(tars, multiprocessing_context="spawn", **changes), 5), take(loader_of(tars, **changes), 5)
    )


def test_samples_do_not_depend_on_the_split(tars):
    """The same image in the same epoch has the same crop, view, timestep and noise on any rank."""
    one = epoch_samples(tars)
    other = epoch_samples(tars, rank=1, world_size=2, shuffle_buffer=5)
    assert len(one) == 46 and len(other) > 10
    for key, sample in other.items():
        for name in ("images", "view_params", "timestep_uniform", "noise"):
            assert torch.equal(one[key][name], sample[name])
    noises = torch.cat([sample["noise"] for sample in one.values()])
    assert len(noises.flatten(1).unique(dim=0)) == len(noises)


def test_view_and_crop_settings_leave_noise_alone(tars):
    plain = take(loader_of(tars), 2)
    changed = take(loader_of(tars, views=ViewConfig(hue=0.4), crop_scale=(0.5, 0.6)), 2)
    for one, other in zip(plain, changed, strict=True):
        assert one["keys"] == other["keys"] and torch.equal(one["noise"], other["noise"])
        assert torch.equal(one["timestep_uniform"], other["timestep_uniform"])
        assert not torch.equal(one["view_params"], other["view_params"])


def test_iterating_leaves_the_global_generator_alone(tars):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(loader_of(tars, num_workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"world_size": 4}, "world_size was 2 and is 4"),
        ({"rank": 0}, "rank was 1 and is 0"),
        ({"seed": 5}, "seed"),
        ({"batch_size": 4}, "batch_size"),
    ],
)
def test_restart_with_another_split_is_refused(tars, change, name):
    setting = {"num_workers": 2, "world_size": 2, "rank": 1}
    loader = loader_of(tars, **setting)
    take(loader, 1)
    with pytest.raises(UserError, match=name):
        loader_of(tars, position=StreamPosition.from_json(loader.position.to_json()), **{**setting, **change})


def test_position_of_the_first_release(tars):
    """It had a cursor for each worker; with one worker its order was this one."""
    loader = loader_of(tars)
    whole = take(loader, 6)
    first = loader_of(tars)
    take(first, 4)
    identity = {**first.position.identity, "num_workers": 1}
    old = {"identity": identity, "batches": 4, "cursors": {"0": first.position.cursor.to_list()}}
    assert_same(take(loader_of(tars, position=StreamPosition.from_json(json.dumps(old))), 2), whole[4:])
    old["identity"] = {**identity, "num_workers": 2}
    with pytest.raises(UserError, match="release 0.1 with num_workers=2"):
        StreamPosition.from_json(json.dumps(old))


def test_restart_with_other_data_is_refused(tars, tmp_path):
    loader = loader_of(tars)
    take(loader, 1)
    with pytest.raises(UserError, match="data was"):
        loader_of(write_tars(tmp_path / "other", [9, 5]), position=loader.position)


def test_batch_of_one_is_refused(tars):
    with pytest.raises(ValueError, match="no negatives"):
        loader_of(tars, batch_size=1)


@pytest.mark.skipif(not (SHARED / "data/photos").is_dir(), reason="the folder of shared photographs is absent")
def test_real_photographs_are_seen_exactly_once_by_two_ranks_with_two_workers():
    """4 shards for 2 ranks, 1,980 photographs, the last shard of 480."""
    seen: Counter[str] = Counter()
    for rank in range(2):
        loader = make_loader(
            f"{SHARED}/data/photos/*.tar",
            batch_size=20,
            size=32,
            latent_shape=LATENT,
            seed=3,
            rank=rank,
            world_size=2,
            num_workers=2,
        )
        for batch in loader:  # 1000 and 980 are multiples of 20: no batch straddles two epochs
            loader.position.update(batch)
            if batch["cursor"][0] == 1:
                break
            seen.update(batch["keys"])
            assert batch["images"].float().std() > 1
        assert loader.position.skipped == 0
    assert len(seen) == 1980 and set(seen.values()) == {1}
