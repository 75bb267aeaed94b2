"""The image stream: every sample once per epoch, bit-exact restarts, what a sample is."""

from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcr_mllm.errors import UserError
from stage1_dcr.images import StreamPosition, collate, decode, draw_crop, make_loader
from stage1_dcr.position import Cursor
from stage1_dcr.view_config import ViewConfig
from stage1_dcr.views import NUM_VIEW_PARAMS, draw_view_params
from tests.stage1_dcr.image_data import LATENT, assert_same, encode, epoch_keys, keys_of, loader_of, take, write_tars

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
@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 3), (2, 2), (3, 4), (8, 2)])
def test_every_sample_once_per_epoch(tars, world_size, workers, epoch):
    """7 shards for 1 to 16 consumers: shards are dealt out, or all consumers read all of them."""
    keys = epoch_keys(tars, world_size=world_size, workers=workers, epoch=epoch)
    assert len(keys) == 46 and len(set(keys)) == 46


def test_every_sample_once_through_real_workers(tars):
    """Batches straddle epochs, so the first 46 of the samples are not an epoch; per consumer they are."""
    expected = {rank: loader_of(tars, rank=rank, world_size=2, num_workers=2).dataset for rank in range(2)}
    first_epoch: list[str] = []
    for rank, stream in expected.items():
        per_worker: dict[int, list[str]] = {0: [], 1: []}
        for batch in take(loader_of(tars, rank=rank, world_size=2, num_workers=2), 20):
            per_worker[batch["cursor"][0]] += batch["keys"]
        for role, keys in per_worker.items():
            length = 0
            for _, cursor in stream._samples(role, Cursor()):
                if cursor[0] > 0:
                    break
                length += 1
            assert len(keys) >= length
            first_epoch += keys[:length]
    assert len(first_epoch) == len(set(first_epoch)) == 46


def test_order_differs_between_epochs_and_seeds_and_is_shuffled(tars):
    first = epoch_keys(tars, world_size=1, workers=0)
    assert first == epoch_keys(tars, world_size=1, workers=0)
    assert first != epoch_keys(tars, world_size=1, workers=0, epoch=1)
    assert first != epoch_keys(tars, world_size=1, workers=0, seed=2)
    assert first[:9] != sorted(first[:9])


def test_ranks_are_disjoint(tars):
    seen = [set(keys_of(take(loader_of(tars, rank=rank, world_size=2), 4))) for rank in range(2)]
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_restart_is_bit_exact(tars, workers):
    """Killed after 5, 18 and 31 batches (of 46 / 3 per epoch): in a block, in another role's turn, in another epoch."""
    whole = take(loader_of(tars, num_workers=workers), 42)
    assert {batch["cursor"][0] for batch in whole} == set(range(max(workers, 1)))
    position = StreamPosition()
    done: list[dict] = []
    for stop in (5, 18, 31, 42):
        # The position goes through text, as it does in a checkpoint; workers have read ahead of it.
        position = StreamPosition.from_json(position.to_json())
        loader = loader_of(tars, num_workers=workers, position=position)
        done += take(loader, stop - len(done))
        position = loader.position
    assert_same(done, whole)
    assert max(batch["cursor"][1] for batch in whole) >= 2


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
    original = type(loader.dataset.source.shards[0]).samples

    def counting(self, wanted):
        for entry in original(self, wanted):
            read.append(entry.key)
            yield entry

    monkeypatch.setattr(type(loader.dataset.source.shards[0]), "samples", counting)
    again = loader_of(tars, batch_size=2, position=loader.position)
    read.clear()
    take(again, 1)
    assert len(read) == 7


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
    """The same image in the same epoch has the same crop, view, timestep and noise on any rank and worker."""

    def by_key(**changes):
        stream, found = loader_of(tars, **changes).dataset, {}
        for role in range(stream.num_workers):
            for sample, cursor in stream._samples(role, Cursor()):
                if cursor[0] > 0:
                    break
                found[sample["key"]] = [sample[name] for name in ("image", "view_params", "timestep_uniform", "noise")]
        return found

    one, other = by_key(), by_key(rank=1, world_size=2, num_workers=2, shuffle_buffer=5)
    assert len(one) == 46 and len(other) > 10
    for key, values in other.items():
        assert all(torch.equal(left, right) for left, right in zip(one[key], values, strict=True))
    noises = torch.stack([values[3] for values in one.values()])
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
        ({"num_workers": 1}, "num_workers was 2 and is 1"),
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


def test_restart_with_other_data_is_refused(tars, tmp_path):
    loader = loader_of(tars)
    take(loader, 1)
    with pytest.raises(UserError, match="data was"):
        loader_of(write_tars(tmp_path / "other", [9, 5]), position=loader.position)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "LA", "RGBA", "CMYK", "I;16"])
def test_modes(mode):
    fmt = "TIFF" if mode == "CMYK" else "PNG"
    if mode == "I;16":
        file = io.BytesIO()
        Image.fromarray(np.full((9, 12), 300, dtype=np.uint16)).save(file, "PNG")
        data = file.getvalue()
    else:
        data = encode(60, mode, fmt)
    image = decode(data)
    assert image.shape == (3, 9, 12) and image.dtype == torch.uint8


def test_photo_that_lies_on_its_side_is_turned_upright():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(file, "JPEG", exif=exif)
    assert decode(file.getvalue()).shape == (3, 20, 10)


def test_cut_jpeg_is_an_error():
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "JPEG")
    with pytest.raises(OSError):
        decode(file.getvalue()[: len(file.getvalue()) // 2])


def test_crop_has_the_distribution_of_torchvision():
    from torchvision.transforms import v2

    height, width, scale, ratio = 60, 80, (0.4, 1.0), (3 / 4, 4 / 3)
    generator = torch.Generator().manual_seed(0)
    ours = torch.tensor([draw_crop(height, width, scale, ratio, generator) for _ in range(3000)]).double()
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(8, scale=scale, ratio=ratio)
    draws = [transform.make_params([torch.zeros(3, height, width)]) for _ in range(3000)]
    theirs = torch.tensor([[p[name] for name in ("top", "left", "height", "width")] for p in draws]).double()
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=1.0, rtol=0)
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=1.0, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (7, 7)])
def test_crop_of_extreme_shapes_is_inside(height, width):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        top, left, h, w = draw_crop(height, width, (0.9, 1.0), (3 / 4, 4 / 3), generator)
        assert h >= 1 and w >= 1 and 0 <= top <= height - h and 0 <= left <= width - w


def test_batch_of_one_is_refused(tars):
    with pytest.raises(ValueError, match="no negatives"):
        loader_of(tars, batch_size=1)
    sample = {
        "image": torch.zeros(3, 8, 8, dtype=torch.uint8),
        "view_params": draw_view_params(ViewConfig(), torch.Generator()),
        "timestep_uniform": torch.tensor(0.5),
        "noise": torch.zeros(LATENT),
        "key": "a",
        "cursor": [0] * 8,
    }
    with pytest.raises(ValueError, match="no negatives"):
        collate([sample])
    assert collate([sample, sample])["keys"] == ["a", "a"]


@pytest.mark.skipif(not (SHARED / "data/photos").is_dir(), reason="the folder of shared photographs is absent")
def test_real_photographs_are_seen_exactly_once_by_two_ranks_with_two_workers():
    """4 shards, 4 consumers, 1,980 photographs: each consumer has a shard, the last of 480 images."""
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
        ended: set[int] = set()
        for batch in loader:  # 500 and 480 are multiples of 20: no batch straddles two epochs
            loader.position.update(batch)
            if batch["cursor"][1] == 0:
                seen.update(batch["keys"])
                assert batch["images"].float().std() > 1
            else:
                ended.add(batch["cursor"][0])
            if len(ended) == 2:
                break
        assert loader.position.skipped == 0
    assert len(seen) == 1980 and set(seen.values()) == {1}
