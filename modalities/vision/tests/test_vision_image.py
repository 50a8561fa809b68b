"""What bytes mean: one picture for the decoder, the encoder and shards, and what costs too much to be decoded."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from data2vec.core.batch import Sample
from data2vec.core.errors import SampleError
from data2vec.vision import image as module
from data2vec.vision.folder import ImageFile, read_image_file
from data2vec.vision.image import convert, encode, file_formats, is_grey, read_image
from data2vec.vision.loader import decode_image

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
SMOOTH = Image.fromarray(NOISE[:2, :2]).resize((60, 40), Image.Resampling.BILINEAR)  # four colours, none the same
WHITE, RED = (255, 255, 255), (255, 0, 0)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def decoded(data: bytes, channels: int = 3) -> Image.Image:
    """What training sees of a file's content."""
    return decode_image(Sample("a", "train-000000.tar", 1, {"jpg": data}), channels)


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def sharded(folder: Path, data: bytes, name: str = "a.jpg", max_size: int | None = None) -> tuple[str, bytes]:
    """The member that a file of this content becomes."""
    path = folder / name
    path.write_bytes(data)
    ((member, content),) = read_image_file(ImageFile("a", path, None), max_size=max_size).items()
    return member, content


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes = b"", *more: bytes) -> bytes:
    """A PNG as it claims to be; ``colour``: 0 grey, 2 RGB, 6 RGBA."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def claiming(width: int, height: int, **options: object) -> bytes:
    """A small JPEG whose header claims another size."""
    data = encoded(Image.fromarray(NOISE), "JPEG", **options)
    start = re.search(rb"\xff[\xc0\xc2]", data).end()
    return data[: start + 3] + struct.pack(">HH", height, width) + data[start + 7 :]


def with_scans(count: int, **options: object) -> bytes:
    """A progressive JPEG whose last scan is there again and again, ``count`` scans in all."""
    data = encoded(Image.fromarray(NOISE), "JPEG", progressive=True, **options)
    last = data.rindex(b"\xff\xda")
    scan = data[data.rindex(b"\xff\xc4", 0, last) : -2]
    return data[:-2] + (count - data.count(b"\xff\xda")) * scan + data[-2:]


def hidden_scans(count: int) -> bytes:
    """The same behind a marker that a decoder drops, but that seems to span them."""
    data = with_scans(count)
    second = data.index(b"\xff\xc4", data.index(b"\xff\xda"))
    return data[:second] + b"\xff\x02\xff\xff" + data[second:]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_everywhere(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(SMOOTH, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as opened:
        right = ImageOps.exif_transpose(opened).convert("RGB")
    assert right.size == ((60, 40) if orientation < 5 else (40, 60))
    assert same(convert(read_image(data, "it", file_formats()), 3, "it"), right)
    assert same(decoded(sharded(tmp_path, data)[1]), right)
    with Image.open(io.BytesIO(data)) as opened:  # given by a user, not yet decoded
        assert same(convert(opened, 3, "it"), right)
    _, shrunk = sharded(tmp_path, data, max_size=20)
    with Image.open(io.BytesIO(shrunk)) as stored:
        assert (stored.size, dict(stored.getexif())) == ((30, 20) if orientation < 5 else (20, 30), {})
    thumbnail = np.asarray(right.resize(stored.size, Image.Resampling.LANCZOS)).astype(int)
    assert abs(np.asarray(decoded(shrunk)) - thumbnail).mean() < 3


def test_damaged_exif_is_no_reason_to_lose_an_image() -> None:
    data = encoded(Image.fromarray(NOISE), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + bytes(9))
    assert decoded(data).size == (60, 40)


def transparent_images() -> dict[str, bytes]:
    """Images whose left half is opaque and red or grey, and the other transparent."""
    alpha = np.zeros((40, 60), np.uint8)
    alpha[:, :30] = 255
    red = Image.new("RGB", (60, 40), RED)
    red.putalpha(Image.fromarray(alpha))
    palette = Image.fromarray((alpha == 0).astype(np.uint8))
    palette.putpalette([*RED, 0, 255, 0])
    keyed = Image.new("RGB", (60, 40), (1, 2, 3))
    keyed.paste(RED, (0, 0, 30, 40))
    grey = Image.new("L", (60, 40), 7)
    grey.paste(128, (0, 0, 30, 40))
    deep = np.full((40, 60), 70, np.uint16)
    deep[:, :30] = 128 * 257
    key = chunk(b"tRNS", struct.pack(">H", 1))
    rows = np.concatenate([np.full((40, 30, 3), [65535, 0, 0]), np.full((40, 30, 3), [300, 600, 900])], 1).astype(">u2")
    coloured = b"".join(b"\0" + row.tobytes() for row in rows)
    return {
        "RGBA": encoded(red),
        "LA": encoded(red.convert("LA")),
        "P, one colour": encoded(palette, transparency=1),
        "P, many": encoded(palette, transparency=b"\xff\0"),
        "GIF": encoded(palette, "GIF", transparency=1),
        "WEBP": encoded(red, "WEBP", lossless=True),
        "RGB, one colour": encoded(keyed, transparency=(1, 2, 3)),
        "L, one grey": encoded(grey, transparency=7),
        "L of 2 bits, one grey": png(60, 40, 2, 0, 40 * (b"\0" + 7 * b"\xaa" + b"\xa5" + 7 * b"\x55"), key),
        "I;16, one grey": encoded(Image.fromarray(deep), transparency=70),
        "RGB of 16 bits, one colour": png(60, 40, 16, 2, coloured, chunk(b"tRNS", struct.pack(">HHH", 300, 600, 900))),
        "TIFF": encoded(red, "TIFF"),
    }


@pytest.mark.parametrize("kind", list(transparent_images()))
def test_what_is_transparent_is_white(tmp_path: Path, kind: str) -> None:
    data = transparent_images()[kind]
    opened = read_image(data, "it", file_formats())
    stored, shrunk = (sharded(tmp_path, data, "a.jpg", size)[1] for size in (None, 20))
    for picture in (
        convert(opened, 3, "it"),
        convert(opened, 1, "it").convert("RGB"),
        decoded(stored),
        decoded(shrunk),
    ):
        width, height = picture.size
        assert picture.getpixel((width - 4, height // 2)) == WHITE
        assert picture.getpixel((4, height // 2)) != WHITE
    assert is_grey(opened) is (kind == "LA" or kind.endswith("one grey"))
    with Image.open(io.BytesIO(shrunk)) as written:
        assert written.mode == ("L" if is_grey(opened) else "RGB")


def test_cmyk_and_ycck() -> None:
    ink = (200, 40, 90, 60)
    right = Image.new("CMYK", (16, 16), ink).convert("RGB").getpixel((8, 8))
    plain = encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
    luma = Image.new("RGB", (1, 1), ink[:3]).convert("YCbCr").getpixel((0, 0))
    planes = tuple(255 - value for value in luma)  # Pillow writes these inverted
    other = bytearray(encoded(Image.new("CMYK", (16, 16), (*planes, ink[3])), "JPEG", quality=100))
    other[other.index(b"Adobe") + 11] = 2  # the planes are YCCK
    for data in (plain, bytes(other)):
        assert np.allclose(decoded(data).getpixel((8, 8)), right, atol=3)


def test_more_than_eight_bits_are_scaled() -> None:
    ramp = np.linspace(0, 65535, 2400).astype(np.uint16).reshape(40, 60)
    right = (ramp >> 8).astype(np.uint8)
    for order in ("<", ">"):
        image = Image.frombytes("I;16" + ("B" if order == ">" else ""), (60, 40), ramp.astype(order + "u2").tobytes())
        assert (np.asarray(convert(image, 1, "it")) == right).all()
    assert (np.asarray(decoded(encoded(Image.fromarray(ramp)), 1)) == right).all()
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in ramp)
    assert (np.asarray(decoded(png(60, 40, 16, 2, rows)))[..., 1] == right).all()
    assert (np.asarray(convert(Image.fromarray(ramp.astype(np.int32)), 1, "it")) == right).all()
    share = Image.fromarray((ramp / 65535).astype(np.float32))
    assert (np.asarray(convert(share, 1, "it")) == np.rint(ramp / 257)).all()
    for values in (ramp.astype(np.float32), np.full((4, 4), np.nan, np.float32), np.full((4, 4), 70000, np.int32)):
        with pytest.raises(SampleError, match=r"it is no usable image: values from .* but they are read from 0 to"):
            convert(Image.fromarray(values), 3, "it")


def test_sixteen_bits_are_stored_as_they_are_and_shrink_to_eight(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 2400).astype(np.uint16).reshape(40, 60)
    data = encoded(Image.fromarray(ramp))
    assert sharded(tmp_path, data, "a.png") == ("png", data)
    with Image.open(io.BytesIO(sharded(tmp_path, data, "a.png", max_size=20)[1])) as small:
        assert (small.mode, small.size) == ("L", (30, 20))
        assert np.asarray(small).max() > 250
    with Image.open(io.BytesIO(sharded(tmp_path, encoded(Image.fromarray(ramp), "TIFF"), "a.tif")[1])) as again:
        assert (np.asarray(again) == ramp >> 8).all()


ANIMATED = ["GIF", "PNG", "WEBP", "TIFF", "MPO"]


@pytest.mark.parametrize("kind", ANIMATED)
def test_the_first_picture_of_several_is_taken(tmp_path: Path, kind: str) -> None:
    several = [Image.new("RGB", (60, 40), colour) for colour in (RED, (0, 255, 0))]
    data = encoded(several[0], kind, save_all=True, append_images=several[1:])
    member, content = sharded(tmp_path, data, "a.gif")
    assert member == {"WEBP": "webp", "MPO": "jpg"}.get(kind, "png")
    assert (content == data) is (kind not in ("GIF", "TIFF"))
    assert np.allclose(decoded(content).getpixel((30, 20)), RED, atol=4)
    assert np.allclose(decoded(sharded(tmp_path, data, "a.gif", 20)[1]).getpixel((15, 10)), RED, atol=4)


@pytest.mark.parametrize("kind", [kind for kind in ("GIF", "BMP", "TIFF", "AVIF") if kind in file_formats()])
def test_formats_that_a_shard_does_not_hold_become_png_without_loss(tmp_path: Path, kind: str) -> None:
    picture = Image.fromarray(NOISE).quantize(64) if kind == "GIF" else Image.fromarray(NOISE)
    data = encoded(picture, kind)
    with pytest.raises(SampleError, match="cannot be identified as JPEG, PNG or WEBP"):
        decoded(data)
    member, content = sharded(tmp_path, data, f"a.{kind.lower()}")
    assert member == "png"
    with Image.open(io.BytesIO(data)) as opened:
        assert same(decoded(content), opened.convert("RGB"))


@pytest.mark.parametrize(("kind", "member"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("BMP", "png")])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif"])
def test_the_content_decides_and_not_the_name(tmp_path: Path, kind: str, member: str, name: str) -> None:
    data = encoded(Image.fromarray(NOISE), kind)
    found, content = sharded(tmp_path, data, name)
    assert (found, content == data) == (member, kind != "BMP")
    if kind != "BMP":
        assert read_image_file(ImageFile("a", tmp_path / name, None), verify=False) == {member: data}


LARGE = {
    "9950 x 9950 are 99,002,500 pixels, but at most 89,478,485": claiming(9950, 9950),
    "1 x 89000000 pixels, but the longest side that is decoded is 65,535": png(1, 89_000_000, 8, 0),
    "9400 x 9400 pixels takes 505 MiB, but at most 384": png(9400, 9400, 16, 2),
    "9400 x 9400 pixels takes 674 MiB, but at most 384": png(9400, 9400, 16, 6),
    "9000 x 9000 pixels takes 463 MiB, but at most 384": claiming(9000, 9000, progressive=True, subsampling=0),
    "2,000 scans, but at most 64": with_scans(2000),
    "2,001 scans, but at most 64": hidden_scans(2001),
    "more than 178,956,970 pixels": png(30_000, 30_000, 8, 2),
}


@pytest.mark.parametrize("message", list(LARGE))
def test_what_costs_too_much_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def decode(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    data, message = LARGE[message], re.escape(message)
    with pytest.raises(SampleError, match=f"jpg of {len(data)} bytes is no usable image: .*{message}"):
        decoded(data)
    with pytest.raises(SampleError, match=rf"a\.jpg: is no usable image: .*{message}"):
        sharded(tmp_path, data)


def test_what_costs_no_more_than_is_allowed_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoded(with_scans(module.MOST_SCANS)).size == (60, 40)
    picture = Image.fromarray(NOISE)
    thumbnails = b"".join(encoded(picture.resize((4, 4)), "JPEG", comment=b"") for _ in range(70))
    assert decoded(encoded(picture, "JPEG", comment=thumbnails)).size == (60, 40)  # their scans are no scans of it
    monkeypatch.setattr(module, "MOST_PIXELS", 60 * 40)
    monkeypatch.setattr(module, "LONGEST_SIDE", 60)
    monkeypatch.setattr(module, "MOST_BYTES", 3 * 60 * 40)
    for kind in ("JPEG", "PNG"):
        assert decoded(encoded(picture, kind)).size == (60, 40)
    monkeypatch.setattr(module, "MOST_BYTES", 3 * 60 * 40 - 1)
    with pytest.raises(SampleError, match="60 x 40 pixels takes 0 MiB"):
        decoded(encoded(picture, "JPEG"))


def test_text_and_profiles_do_not_grow_without_limit() -> None:
    packed = zlib.compress(bytes(20_000_000))
    bombs = [chunk(b"zTXt", b"a\0\0" + packed), chunk(b"iCCP", b"a\0\0" + packed)]
    rows = 40 * (b"\0" + bytes(60))
    for bomb in bombs:
        with pytest.raises(SampleError, match=r"Decompressed data too large"):
            decoded(png(60, 40, 8, 0, rows, bomb))
    many = [chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000))) for _ in range(70)]
    with pytest.raises(SampleError, match="Too much memory used in text chunks"):
        decoded(png(60, 40, 8, 0, rows, *many))


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {})]
)
def test_what_is_cut_off_is_named_alike_by_shards_and_training(
    tmp_path: Path, kind: str, options: dict[str, bool]
) -> None:
    whole = encoded(Image.fromarray(np.tile(NOISE, (4, 4, 1))), kind, **options)
    data = whole[: len(whole) // 2]
    with pytest.raises(SampleError) as stopped:
        sharded(tmp_path, data)
    message = str(stopped.value)
    assert message.startswith(f"{tmp_path / 'a.jpg'}: is no usable image: ")
    assert "<_io" not in message
    if kind != "GIF":
        with pytest.raises(SampleError, match=re.escape(message.partition(": is no ")[2])):
            decoded(data)


def test_what_is_written_holds_nothing_but_pixels() -> None:
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif[ExifTags.Base.Orientation] = 6
    text.add_text("note", "words")
    image = read_image(encoded(Image.fromarray(NOISE), exif=exif, pnginfo=text, icc_profile=b"profile"), "it")
    for kind in ("PNG", "JPEG", "WEBP"):
        with Image.open(io.BytesIO(encode(image, kind))) as written:
            assert not {"exif", "note", "icc_profile"} & written.info.keys()
    assert "exif" in image.info
