"""The benchmark of the data on tiny sizes: what it prints, and that its images are like photographs."""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import benchmark_data

pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight shards of eight images."""
    folder = tmp_path_factory.mktemp("shards")
    benchmark_data.write_shards(folder, 64, 8)
    return folder


def options(**changes: int) -> argparse.Namespace:
    return argparse.Namespace(**{"images": 64, "measured": 64, "workers": 1, "size": 32, "rounds": 1, **changes})


def test_prints_one_object(capsys):
    assert benchmark_data.main(["--images", "128", "--measured", "128", "--rounds", "1", "--size", "16"]) == 0
    found = json.loads(capsys.readouterr().out)
    speed = {side: found["medians"][side]["images_per_second_and_worker"] for side in found["all"]}
    assert found["ratio"] == speed["ours"] / speed["plain"] and set(speed) == {"plain", "ours", "with_views"}
    assert set(found["limits"]) == set(found["within_limits"]) == {"ratio"} and found["aim"] == 1.5
    assert all(row["cpu_milliseconds_per_image"] > 0 for rows in found["all"].values() for row in rows)


@pytest.mark.parametrize("side", ["plain", "ours", "with_views"])
def test_each_side_gives_every_image_once(side, folder, monkeypatch):
    """Images and what belongs to them, of the same sizes on all sides, and not the same image again and again."""
    seen: Counter[bytes] = Counter()
    for images, more in benchmark_data.LOADERS[side](str(folder), options()):
        assert images.shape == (benchmark_data.BATCH, 3, 32, 32)
        assert more.shape[0] == benchmark_data.BATCH and (side == "ours") == (more.ndim == 2)
        seen.update(image.numpy().tobytes() for image in images)
        if side != "ours":  # a view is its image, somewhat changed
            difference = (images.float() - more.float()).abs().mean() / images.float().abs().mean()
            assert 0 < difference < 0.5
    assert sum(seen.values()) == len(seen) == 64


def test_images_are_like_photographs(folder):
    """512 px of photographs take some 40 to 120 kB at this quality, and their spectrum falls with the frequency."""
    with tarfile.open(folder / "00000.tar") as tar:
        assert tar.getnames()[:3] == ["000000000.jpg", "000000000.txt", "000000000.json"]
        files = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    assert all(Image.open(io.BytesIO(file)).size == (512, 512) for file in files)
    assert 40_000 < np.mean([len(file) for file in files]) < 120_000
    grey = torch.tensor(np.array(Image.open(io.BytesIO(files[0])).convert("L"))).float()
    power = torch.fft.fft2(grey - grey.mean()).abs().square()[1:129, 0]
    assert power[:16].mean() > 30 * power[64:].mean()


@pytest.mark.parametrize("wrong", [["--workers", "0"], ["--rounds", "0"], ["--measured", "20"], ["--images", "20"]])
def test_wrong_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        benchmark_data.main(wrong)
    assert "must be at least" in capsys.readouterr().err
