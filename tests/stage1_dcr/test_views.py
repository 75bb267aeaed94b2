"""Views: parity with torchvision sample by sample, identity, and the traps of augmenting in the wrong space."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from stage1_dcr.view_config import ViewConfig
from stage1_dcr.views import (
    NUM_VIEW_PARAMS,
    VIEW_PARAMS,
    augment,
    draw_uniforms,
    draw_view_params,
    normalise,
    resize,
    view_params,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
NEUTRAL = ViewConfig(brightness=0, contrast=0, saturation=0, hue=0, crop_scale=(1, 1), crop_ratio=(1, 1))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 6, height: int = 20, width: int = 20) -> torch.Tensor:
    images = torch.rand(n, 3, height, width, generator=generator(7))
    images[0] = 0.3  # grey: saturation and spread are zero
    images[1, :, :5] = 0.0
    images[1, :, 5:9] = 1.0
    images[2, 0] = images[2, 1]  # two equal maxima decide the hue's sector
    return images


def neutral(n: int) -> torch.Tensor:
    return draw_view_params(NEUTRAL, generator(), n)


@pytest.mark.parametrize(
    ("name", "adjust", "low", "high"),
    [
        ("brightness", reference.adjust_brightness, 0.2, 1.8),
        ("contrast", reference.adjust_contrast, 0.2, 1.8),
        ("saturation", reference.adjust_saturation, 0.2, 1.8),
        ("hue", reference.adjust_hue, -0.5, 0.5),
    ],
)
def test_color_equals_torchvision(name, adjust, low, high):
    images = pictures()
    params = neutral(len(images))
    params[:, VIEW_PARAMS.index(name)] = low + (high - low) * torch.rand(len(images), generator=generator(1))
    expected = torch.stack(
        [adjust(image, float(value)) for image, value in zip(images, params[:, VIEW_PARAMS.index(name)], strict=True)]
    )
    torch.testing.assert_close(augment(images, params), expected, atol=1e-4, rtol=0)
    assert (expected - images).abs().max() > 0.1


def test_all_color_operations_in_order():
    images = pictures()
    config = ViewConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.3, crop_scale=(1, 1), crop_ratio=(1, 1))
    params = draw_view_params(config, generator(3), len(images))
    expected = []
    for image, row in zip(images, params, strict=True):
        image = reference.adjust_brightness(image, float(row[0]))
        image = reference.adjust_contrast(image, float(row[1]))
        image = reference.adjust_saturation(image, float(row[2]))
        expected.append(reference.adjust_hue(image, float(row[3])))
    torch.testing.assert_close(augment(images, params), torch.stack(expected), atol=1e-4, rtol=0)


def test_crop_equals_torchvision():
    height, width = 20, 30
    images = pictures(3, height, width)
    boxes = [(0, 0, 20, 30), (1, 2, 18, 27), (2, 0, 15, 24)]  # top, left, height, width
    params = neutral(3)
    for row, (top, left, h, w) in zip(params, boxes, strict=True):
        row[4:8] = torch.tensor([(left + w / 2) / width, (top + h / 2) / height, w / width, h / height])
    expected = []
    for image, (top, left, h, w) in zip(images, boxes, strict=True):
        # torchvision cuts before it resizes and so cannot look over the edge of the box: compare away from it.
        cut = reference.resized_crop(
            image, top, left, h, w, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=False
        )
        expected.append(cut.clamp(0, 1))
    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    torch.testing.assert_close(augment(images, params)[inner], torch.stack(expected)[inner], atol=1e-4, rtol=0)


def test_flips():
    images = pictures()
    both = draw_view_params(
        ViewConfig(**{**vars(NEUTRAL), "horizontal_flip": 1.0, "vertical_flip": 1.0}), generator(), len(images)
    )
    torch.testing.assert_close(augment(images, both), images.flip(-1, -2), atol=1e-5, rtol=0)
    only_one = neutral(len(images))
    only_one[0, VIEW_PARAMS.index("horizontal_flip")] = 1
    view = augment(images, only_one)
    torch.testing.assert_close(view[0], images[0].flip(-1), atol=1e-5, rtol=0)
    assert torch.equal(view[1:], images[1:])


def test_flips_are_off_by_default():
    params = draw_view_params(ViewConfig(), generator(), 2000)
    assert params[:, 8:].sum() == 0
    some = draw_view_params(ViewConfig(horizontal_flip=0.5), generator(), 2000)
    assert 0.45 < some[:, 8].mean() < 0.55 and some[:, 9].sum() == 0


def test_neutral_view_is_the_input_bit_for_bit():
    images = pictures(6, 37, 37)
    assert torch.equal(augment(images, draw_view_params(NEUTRAL, generator(5), 6)), images)


def test_default_view_stays_close_and_in_range():
    images = pictures(6, 32, 32)
    view = augment(images, draw_view_params(ViewConfig(), generator(5), 6))
    assert view.shape == images.shape and view.min() >= 0 and view.max() <= 1
    assert not torch.equal(view, images)


def test_dark_view_is_dark_after_normalisation():
    """Augmenting after normalising would clamp to zero whatever is darker than the mean."""
    dark = torch.rand(4, 3, 16, 16, generator=generator(2)) * 0.1
    view = normalise(augment(dark, draw_view_params(ViewConfig(), generator(2), 4)), CLIP_MEAN, CLIP_STD)
    assert view.min() < -1


def test_crop_boxes_are_inside_and_in_range():
    params = draw_view_params(ViewConfig(), generator(4), 5000)
    center, size = params[:, 4:6], params[:, 6:8]
    assert (center - size / 2 >= -1e-6).all() and (center + size / 2 <= 1 + 1e-6).all()
    area, ratio = size.prod(dim=1), size[:, 0] / size[:, 1]
    assert area.min() >= 0.9 - 1e-5 and area.max() <= 1 + 1e-5
    assert ratio.min() >= 0.9 - 1e-5 and ratio.max() <= 1.1 + 1e-5 and ratio.std() > 0.02


def test_params_are_deterministic_and_single_equals_batch_of_one():
    one = draw_view_params(ViewConfig(), generator(9))
    assert one.shape == (NUM_VIEW_PARAMS,)
    assert torch.equal(one, draw_view_params(ViewConfig(), generator(9)))
    assert torch.equal(one, draw_view_params(ViewConfig(), generator(9), 1)[0])
    assert not torch.equal(one, draw_view_params(ViewConfig(), generator(10)))


def test_params_of_a_batch_are_bit_by_bit_those_of_its_samples():
    config = ViewConfig(crop_scale=(0.3, 1.0), crop_ratio=(0.5, 2.0), horizontal_flip=0.5)
    uniforms = torch.stack([draw_uniforms(generator(seed)) for seed in range(67)])
    alone = torch.stack([draw_view_params(config, generator(seed)) for seed in range(67)])
    assert torch.equal(view_params(config, uniforms), alone)


def test_view_of_a_sample_does_not_depend_on_its_batch():
    images = pictures()
    params = draw_view_params(ViewConfig(), generator(1), len(images))
    torch.testing.assert_close(augment(images, params)[2:3], augment(images[2:3], params[2:3]), atol=1e-6, rtol=0)


def test_autocast_does_not_move_pixels():
    images = pictures(4, 64, 64)
    params = draw_view_params(ViewConfig(), generator(1), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        view = augment(images, params)
    assert view.dtype == torch.float32
    torch.testing.assert_close(view, augment(images, params), atol=1e-6, rtol=0)


def test_resize_and_normalise():
    images = pictures(3, 24, 24)
    assert resize(images, 24) is images
    expected = reference.resize(images, [16, 16], interpolation=InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    torch.testing.assert_close(resize(images, 16), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        normalise(images, CLIP_MEAN, CLIP_STD), reference.normalize(images, list(CLIP_MEAN), list(CLIP_STD))
    )


@pytest.mark.parametrize(
    "wrong",
    [{"hue": 0.6}, {"brightness": -0.1}, {"horizontal_flip": 1.5}, {"crop_scale": (1.0, 0.9)}, {"crop_ratio": (0, 1)}],
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ViewConfig(**wrong)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="float"):
        augment(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), neutral(2))
    with pytest.raises(ValueError, match="view parameters"):
        augment(torch.zeros(2, 3, 4, 4), neutral(3))
