"""Decoding: every kind of image, every kind of broken one, and the same result for the same seed."""

from __future__ import annotations

import io
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data2vec.core.batch import Sample
from data2vec.core.errors import SampleError
from data2vec.vision.loader import AugmentConfig, ImageDecoder, centre_crop, decode_image

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def sample(data: bytes, extension: str = "png", **members: bytes) -> Sample:
    return Sample(key="a", shard="train-000000.tar", id=1, members={extension: data, **members})


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def decoder(size: int = 32, channels: int = 3, augment: AugmentConfig | None = None, crop: float = 1.0) -> ImageDecoder:
    return ImageDecoder(size, channels, (0.5,) * channels, (0.25,) * channels, augment, crop)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_kind_of_png(mode, channels):
    if mode == "I;16":
        image = Image.fromarray(np.full((40, 60), 128 * 257, dtype=np.uint16))
    else:
        image = Image.new("RGB", (60, 40), (128, 128, 128)).convert(mode, palette=Image.Palette.ADAPTIVE)
    example = decoder(channels=channels)(sample(encoded(image)), 0)
    assert example.inputs.shape == (channels, 32, 32)
    assert example.inputs.dtype is torch.float32
    if mode != "1":  # black and white has no grey, so it is dithered
        torch.testing.assert_close(example.inputs, torch.full((channels, 32, 32), (128 / 255 - 0.5) / 0.25))


@pytest.mark.parametrize(("extension", "kind"), [("jpg", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_every_format(extension, kind):
    image = decode_image(sample(encoded(Image.fromarray(NOISE), kind), extension), 3)
    assert (image.mode, image.size) == ("RGB", (60, 40))


def test_cmyk():
    image = Image.new("CMYK", (40, 40), (0, 0, 0, 0))
    assert decode_image(sample(encoded(image, "JPEG"), "jpg"), 3).getpixel((3, 3)) == (255, 255, 255)


def test_transparent_parts_become_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode_image(sample(encoded(image)), 3).getpixel((3, 3)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert decode_image(sample(encoded(palette, transparency=0)), 3).getpixel((3, 3)) == (255, 255, 255)
    assert decode_image(sample(encoded(palette)), 3).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", encoded(Image.fromarray(NOISE))[:2000], encoded(Image.fromarray(NOISE), "JPEG")[:300]],
)
def test_broken_images(data):
    with pytest.raises(SampleError, match=rf"png of {len(data)} bytes is no usable image: \w"):
        decoder()(sample(data), 0)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_damaged_images_never_raise_anything_else(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))
    content = bytearray(encoded(Image.fromarray(NOISE), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        example = decoder()(sample(bytes(content), kind.lower() if kind != "JPEG" else "jpg"), 0)
    except SampleError:
        return
    assert torch.isfinite(example.inputs).all()


def test_other_formats_are_refused():
    with pytest.raises(SampleError, match="no usable image"):
        decoder()(sample(encoded(Image.fromarray(NOISE), "BMP")), 0)
    with pytest.raises(SampleError, match="members are cls, gif, expected one of jpg, jpeg, png, webp"):
        decoder()(sample(b"", "gif", cls=b"1"), 0)


@pytest.mark.parametrize(("members", "label"), [({"cls": b" 12\n"}, 12), ({}, None), ({"cls": b"cat"}, None)])
def test_labels(members, label):
    assert decoder()(sample(encoded(Image.fromarray(NOISE)), **members), 0).label == label


def test_evaluation_takes_the_centre():
    gradient = np.tile(np.arange(60, dtype=np.uint8), (40, 1))
    assert (np.asarray(centre_crop(Image.fromarray(gradient), 40, 1.0)) == gradient[:, 10:50]).all()
    half = np.asarray(centre_crop(Image.fromarray(gradient), 20, 0.5))
    assert (half == gradient[:20, 20:40]).all()
    assert centre_crop(Image.new("L", (5, 900)), 16, 0.875).size == (16, 16)


def test_an_image_of_the_right_size_is_left_alone():
    pixels = NOISE[:32, :32]
    off = AugmentConfig(crop_scale=None, translate=0, flip=0.0, colour_jitter=0.0)
    for augment in (None, off):
        inputs = decoder(augment=augment)(sample(encoded(Image.fromarray(pixels))), 0).inputs
        expected = (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - 0.5) / 0.25
        torch.testing.assert_close(inputs, expected)


@pytest.mark.parametrize(
    "augment", [AugmentConfig(), AugmentConfig(crop_scale=None, translate=4, flip=0.0, colour_jitter=0.0)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_is_a_function_of_the_seed(augment, channels):
    raw = sample(encoded(Image.fromarray(NOISE)))
    decode = decoder(channels=channels, augment=augment)
    first = [decode(raw, seed).inputs for seed in range(12)]
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    state = torch.random.get_rng_state()
    copy = pickle.loads(pickle.dumps(decode))
    second = [copy(raw, seed).inputs for seed in range(12)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert sum(torch.equal(first[0], other) for other in first[1:]) <= 1
    assert torch.equal(torch.random.get_rng_state(), state)


def test_translation_moves_by_whole_pixels():
    pixels = np.zeros((32, 32), dtype=np.uint8)
    pixels[16, 16] = 255
    decode = ImageDecoder(32, 1, (0.0,), (1.0,), AugmentConfig(None, 3, 0.0, 0.0), 1.0)
    places = set()
    for seed in range(60):
        inputs = decode(sample(encoded(Image.fromarray(pixels))), seed).inputs
        assert inputs.sum() == 1.0
        places.add(tuple((inputs[0].nonzero()[0] - 16).tolist()))
    assert {abs(y) for y, _ in places} == {abs(x) for _, x in places} == {0, 1, 2, 3}
