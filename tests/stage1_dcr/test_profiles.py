"""`profile=published`: what the published code does, against torchvision applied by hand, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from dcr_mllm.denoiser_headers import denoiser_summary
from dcr_mllm.headers import tower_summary
from stage1_dcr.__main__ import main, parse
from stage1_dcr.config import Stage1Config
from stage1_dcr.profiles import OPENAI_MEAN, OPENAI_STD, known_defects
from stage1_dcr.view_config import ViewConfig
from stage1_dcr.views import augment, draw_view_params, normalise
from tests.fake_models import write_denoiser, write_tower
from tests.stage1_dcr.test_step import BATCH, batch, build

PUBLISHED = {"prediction_type": "velocity", "normalisation": "openai"}
PUBLISHED_VIEWS = {"space": "normalised", "interpolation": "bilinear", "horizontal_flip": 0.5, "vertical_flip": 0.5}


def test_the_profile_is_shown_value_by_value(capsys: pytest.CaptureFixture[str]):
    shown = {}
    for profile in ("recipe", "published"):
        assert main(["openai-l14-224", f"profile={profile}", "--print-config"]) == 0
        shown[profile] = yaml.safe_load(capsys.readouterr().out)
    recipe, published = shown["recipe"], shown["published"]
    assert {key: published[key] for key in PUBLISHED} == PUBLISHED
    assert {key: published["views"][key] for key in PUBLISHED_VIEWS} == PUBLISHED_VIEWS
    # ColorJitter(0.1, 0.1, 0.1, 0.05), RandomResizedCrop(scale=(0.9, 1.0), ratio=(0.9, 1.1))
    jitter = {"brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.05}
    same = jitter | {"crop_scale": [0.9, 1.0], "crop_ratio": [0.9, 1.1]}
    assert {key: published["views"][key] for key in same} == same
    # Nothing else moves.
    changed = {key for key in recipe if recipe[key] != published[key]}
    assert changed == {"profile", "prediction_type", "normalisation", "views"}


def test_what_is_written_wins_over_the_profile(tmp_path: Path):
    config = tmp_path / "own.yaml"
    config.write_text("run: own\ntower: mini\ndenoiser: mini\nprofile: published\nviews: {vertical_flip: 0.25}\n")
    _, own = parse([str(config), "prediction_type=epsilon"])
    assert (own.prediction_type, own.normalisation) == ("epsilon", "openai")
    assert (own.views.vertical_flip, own.views.horizontal_flip, own.views.space) == (0.25, 0.5, "normalised")
    _, none = parse([str(config), "prediction_type=null"])
    assert none.prediction_type is None


def test_views_are_torchvisions_on_normalised_pixels():
    size = 24
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, size, size, generator=generator)
    inputs = normalise(images, OPENAI_MEAN, OPENAI_STD)
    params = draw_view_params(ViewConfig(**PUBLISHED_VIEWS), generator, len(images))
    params[:, 8:] = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
    boxes = [(1, 0, 23, 23), (0, 2, 22, 21), (2, 1, 21, 22), (0, 0, 24, 24)]  # top, left, height, width
    for row, (top, left, h, w) in zip(params, boxes, strict=True):
        row[4:8] = torch.tensor([left + w / 2, top + h / 2, w, h]) / size
    expected = []
    for image, row, (top, left, h, w) in zip(inputs, params, boxes, strict=True):
        image = reference.adjust_brightness(image, float(row[0]))
        image = reference.adjust_contrast(image, float(row[1]))
        image = reference.adjust_saturation(image, float(row[2]))
        image = reference.adjust_hue(image, float(row[3]))
        image = reference.resized_crop(
            image, top, left, h, w, [size, size], interpolation=InterpolationMode.BILINEAR, antialias=True
        )
        image = reference.horizontal_flip(image) if row[8] else image
        expected.append(reference.vertical_flip(image) if row[9] else image)
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))  # torchvision cannot look over the edge of the box
    views = augment(inputs, params, "bilinear")
    torch.testing.assert_close(views[inner], torch.stack(expected)[inner], atol=1e-4, rtol=0)
    # The defect itself: what was darker than the mean is gone.
    assert inputs.min() < -1.5 and views.min() >= 0 and views.max() <= 1


@pytest.mark.parametrize("space", ["pixels", "normalised"])
def test_the_step_makes_its_views_in_the_space_that_the_config_names(
    tiny_clip: Path, tiny_denoiser: Path, space: str, monkeypatch: pytest.MonkeyPatch
):
    step = build(tiny_clip, tiny_denoiser, views=ViewConfig(space=space))
    seen = []
    read = step._read
    monkeypatch.setattr(step, "_read", lambda tower, pixels, **kw: (seen.append(pixels), read(tower, pixels, **kw))[1])
    inputs = batch()
    step(**inputs)
    pixels = inputs["images"].float() / 255
    statistics = step._statistics
    plain = normalise(pixels, statistics.mean, statistics.std)
    if space == "pixels":
        view = normalise(augment(pixels, inputs["view_params"]), statistics.mean, statistics.std)
    else:
        view = augment(plain, inputs["view_params"])
    assert torch.equal(seen[0][:BATCH], plain) and torch.equal(seen[0][BATCH:], view)
    assert (view.min() < -1) == (space == "pixels")


def test_openai_statistics_for_every_tower(tiny_siglip: Path, tiny_denoiser: Path):
    from dcr_mllm.launch import decide
    from stage1_dcr.train import Stage1

    config = Stage1Config(tower=str(tiny_siglip), denoiser=str(tiny_denoiser), data="x", normalisation="openai")
    statistics = Stage1(config, decide("fp32", "none")).statistics
    assert (statistics.mean, statistics.std) == (OPENAI_MEAN, OPENAI_STD)
    own = Stage1(Stage1Config(tower=str(tiny_siglip), denoiser=str(tiny_denoiser), data="x"), decide("fp32", "none"))
    assert own.statistics.mean == (0.5, 0.5, 0.5) and own.statistics.size == statistics.size


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_each_known_defect_is_said_once_and_only_where_it_is_one(kind: str, prediction_type: str, tmp_path: Path):
    tower = tower_summary(write_tower(tmp_path / "t", kind))
    denoiser = denoiser_summary(write_denoiser(tmp_path / "d", prediction_type=prediction_type))

    def defects(**settings: object) -> str:
        config = Stage1Config(tower="t", denoiser="d", data="mini", **settings)  # type: ignore[arg-type]
        lines = known_defects(config, tower, denoiser)
        assert all(line.startswith("known defect: ") and "\n" not in line for line in lines)
        return "\n".join(lines)

    assert defects() == ""
    published = defects(**PUBLISHED, views=ViewConfig(**PUBLISHED_VIEWS))  # type: ignore[arg-type]
    assert published.count("the velocity") == (prediction_type == "epsilon")
    assert published.count("clamped to [0, 1]") == published.count("upside down (0.5)") == 1
    assert published.count("OpenAI's mean and std") == (kind == "siglip")
    # It is the choice that is wrong, whoever made it.
    assert "mirrored (probability 0.1)" in defects(views=ViewConfig(horizontal_flip=0.1))


def test_the_run_says_it_before_training(
    tiny_clip: Path, tiny_denoiser: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    models = [f"tower={tiny_clip}", f"denoiser={tiny_denoiser}", f"runs_dir={tmp_path}"]
    assert main(["mini", "profile=published", *models, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("known defect: ") == 3  # this tower was trained with OpenAI's statistics
