"""From bytes to samples: decoding, the crop, and what a reduced resolution may and may not change."""

from __future__ import annotations

import hashlib
import io
import itertools
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from dcr_mllm.mini.data import write_training_shards
from stage1_dcr.images import make_loader
from stage1_dcr.samples import decode_crop, draw_crop
from tests.stage1_dcr.image_data import encode


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "LA", "RGBA", "CMYK", "I;16"])
def test_modes(mode):
    fmt = "TIFF" if mode == "CMYK" else "PNG"
    if mode == "I;16":
        file = io.BytesIO()
        Image.fromarray(np.full((9, 12), 300, dtype=np.uint16)).save(file, "PNG")
        data = file.getvalue()
    else:
        data = encode(60, mode, fmt)
    image = decode_crop(data, 9, whole)
    assert image.shape == (3, 9, 9) and image.dtype == torch.uint8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [128, 60])
def test_photo_is_turned_upright_before_it_is_cropped(orientation, size):
    """At full resolution and at a half: the box is meant in the upright image."""
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph(180, 320).save(file, "JPEG", exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    seen = []

    def draw_box(height, width):
        seen.append((height, width))
        return 20, 40, 130, 132

    found = decode_crop(file.getvalue(), size, draw_box)
    assert seen == [(upright.height, upright.width)]
    expected = upright.resize((size, size), Image.Resampling.BICUBIC, box=(40, 20, 172, 150))
    assert mean_difference(found, functional.pil_to_tensor(expected)) < 5
    assert mean_difference(found.flip(-1), functional.pil_to_tensor(expected)) > 15


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise whose spectrum falls like that of photographs, with edges."""
    generator = np.random.default_rng(seed)
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequencies[0, 0] = 1
    layers = []
    for _ in range(4):
        layer = np.fft.irfft2(np.fft.rfft2(generator.standard_normal((height, width))) / frequencies, s=(height, width))
        layers.append(layer / layer.std())
    # Colours vary less than brightness, or JPEG, which halves their resolution, would look bad by itself.
    pixels = 128 + 45 * layers[0][..., None] + 12 * np.stack(layers[1:], axis=-1)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (200, 40, 90)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


def whole(height: int, width: int):
    return 0, 0, height, width


def mean_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.float() - other.float()).abs().mean().item()


def full_decode(data: bytes, size: int, box, mode=InterpolationMode.BICUBIC) -> torch.Tensor:
    """The plain way: everything decoded, then torchvision."""
    image = functional.pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))
    return functional.resized_crop(image, *box, [size, size], mode, antialias=True)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_reduced_decoding_differs_from_the_full_one_as_interpolations_do(scale):
    """Odd sizes too. The edges of the crop lie on the coarse grid, so they move by half a coarse pixel at most."""
    size, height, width = 48, scale * 64 + 3, scale * 60 + 1
    data = jpeg(photograph(height, width))
    for seed in range(5):
        box = draw_crop(height, width, (0.7, 1.0), (3 / 4, 4 / 3), torch.Generator().manual_seed(seed))
        assert min(box[2:]) >= scale * size
        found = decode_crop(data, size, lambda *_, box=box: box)
        top, left, h, w = (scale * round(edge / scale) for edge in box)
        box = top, left, min(h, height - top), min(w, width - left)
        expected = full_decode(data, size, box)
        bilinear = mean_difference(full_decode(data, size, box, InterpolationMode.BILINEAR), expected)
        assert 0 < mean_difference(found, expected) < 2.2 * bilinear
        # A crop that is off by a few pixels or by its scale is not close.
        moved = full_decode(data, size, (max(top - scale, 0), left + scale, h - scale, w - scale))
        assert mean_difference(found, moved) > 3 * bilinear


def decoded_sizes(monkeypatch) -> list[tuple[int, int]]:
    sizes = []
    original = functional.pil_to_tensor

    def noting(image):
        sizes.append(image.size)
        return original(image)

    monkeypatch.setattr("stage1_dcr.samples.functional.pil_to_tensor", noting)
    return sizes


@pytest.mark.parametrize(
    ("height", "width", "box", "size", "decoded"),
    [
        (512, 512, (0, 0, 486, 480), 224, (256, 256)),
        (512, 512, (0, 0, 486, 447), 224, (512, 512)),  # half of it would be one pixel short
        (512, 512, (0, 0, 500, 500), 336, (512, 512)),
        (2000, 3001, (0, 0, 1900, 2900), 300, (751, 500)),  # (3001 + 3) // 4
        (2001, 3001, (0, 0, 1900, 2900), 112, (376, 251)),
    ],
)
def test_scale_leaves_the_crop_at_least_the_size(height, width, box, size, decoded, monkeypatch):
    sizes = decoded_sizes(monkeypatch)
    decode_crop(jpeg(Image.new("RGB", (width, height))), size, lambda *_: box)
    assert sizes == [decoded]


@pytest.mark.parametrize("make", ["png", "small jpeg"])
def test_other_images_are_decoded_bit_by_bit_as_ever(make):
    """The miniature's PNGs of any size, and JPEGs that are smaller than twice the crop."""
    image = photograph(150, 170)
    file = io.BytesIO()
    image.save(file, "PNG")
    data, size = (file.getvalue(), 32) if make == "png" else (jpeg(image), 72)
    box = (3, 5, 141, 143)
    assert torch.equal(decode_crop(data, size, lambda *_: box), full_decode(data, size, box))


def test_images_of_the_miniature_keep_their_pixels(tmp_path):
    """The training shards themselves, against the plain way with torchvision's own crop."""
    data = write_training_shards(tmp_path / "mini", num_images=24, num_shards=2)
    images = {}
    for shard in range(2):
        with tarfile.open(tmp_path / "mini" / f"{shard:05d}.tar") as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    images[f"{shard:05d}.tar/{member.name[:-4]}"] = tar.extractfile(member).read()
    loader = make_loader(data, batch_size=8, size=64, latent_shape=(4, 8, 8), seed=3)
    for batch in itertools.islice(loader, 3):
        for key, pixels in zip(batch["keys"], batch["images"], strict=True):
            height, width = Image.open(io.BytesIO(images[key])).size[::-1]
            seed = hashlib.sha256("\0".join(("3", "0", key, "crop")).encode()).digest()
            crop = torch.Generator().manual_seed(int.from_bytes(seed[:8], "big") >> 1)
            box = draw_crop(height, width, (0.9, 1.0), (3 / 4, 4 / 3), crop)
            assert torch.equal(pixels, full_decode(images[key], 64, box))


def test_cut_jpeg_is_an_error():
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "JPEG")
    with pytest.raises(OSError):
        decode_crop(file.getvalue()[: len(file.getvalue()) // 2], 30, whole)


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
