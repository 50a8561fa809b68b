"""Images from bytes: one way to pixels for training, evaluation, encoders and shards.

Colour profiles are not applied.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError

from data2vec.core.errors import SampleError

MEMBERS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}  # of a shard, and Pillow's name for each
SHARD_FORMATS = ("JPEG", "PNG", "WEBP")  # no other of Pillow's decoders ever runs on what comes from a shard

# What decoding may cost. All of it is known from headers and markers, before anything is decoded.
MOST_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs
LONGEST_SIDE = 65_535  # of a JPEG; a PNG may claim two thousand million
MOST_BYTES = 384 << 20  # of pixels x channels x bytes, as the decoder holds them
MOST_SCANS = 64  # of a JPEG: each goes over all pixels, and may be as short as 20 bytes; encoders write about ten

_ROWS = 1 << 22  # pixels of 16 or 32 bits that are scaled at a time
_QUALITY = 95  # of JPEG and WebP that are written here
_START_OF_SCAN, _END_OF_IMAGE = b"\xda", b"\xd9"
_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")  # none that may stand inside a scan
_FIRST_WITH_LENGTH, _START_OF_IMAGE = b"\xc0", b"\xd8"
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAY_TURN = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # where Pillow looks for an orientation
_GREY = ("1", "L", "LA", "La", "F")


@lru_cache
def file_formats() -> tuple[str, ...]:
    """The formats that files may have: also those that no shard may hold, as far as the installed Pillow has them."""
    Image.init()
    return tuple(name for name in (*SHARD_FORMATS, "GIF", "BMP", "TIFF", "AVIF") if name in Image.OPEN)


def read_image(data: bytes, what: str, formats: tuple[str, ...] = SHARD_FORMATS) -> Image.Image:
    """Decode an image in full, or the first one of an animation; its pixels are still as they are stored.

    Args:
        data: the content of a file or of a shard's member.
        what: begins the message of an error.
        formats: Pillow's names of those that are accepted; the content decides, whatever the file is called.

    Raises:
        SampleError: it is damaged, incomplete, of another format, or costs more than is allowed here.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=formats)
            _check_cost(image, data)
            image.load()
        _scale_transparent_grey(image, data)
        return image
    except MemoryError:  # is not the image's
        raise
    except Exception as error:  # what Pillow raises for damaged files is not a closed list
        raise SampleError(f"{what} is no usable image: {_reason(error, formats)}") from None


def convert(image: Image.Image, channels: int, what: str) -> Image.Image:
    """The image as one sees it: upright, as RGB (3 channels) or grey (1), on white where it is transparent.

    Integers of more than 8 bits are taken as 0 to 65,535 and floats as 0 to 1.

    Raises:
        SampleError: values outside these, or an image that was opened elsewhere and cannot be decoded.
    """
    mode = "RGB" if channels == 3 else "L"
    try:
        _load(image)
        image = _upright(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _eight_bits(image)
        if image.mode in ("La", "RGBa"):  # multiplied by alpha
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = _on_white(image)
        return image if image.mode == mode else image.convert(mode)
    except MemoryError:
        raise
    except Exception as error:
        raise SampleError(f"{what} is no usable image: {_reason(error)}") from None


def encode(image: Image.Image, kind: str) -> bytes:
    """The bytes of a converted image as JPEG, PNG or WebP, with nothing beside its pixels."""
    bare, target = image.copy(), io.BytesIO()
    bare.info = {}  # what it says of the image it was made from, such as which way up that is
    bare.save(target, kind, **({} if kind == "PNG" else {"quality": _QUALITY}))
    return target.getvalue()


def is_grey(image: Image.Image) -> bool:
    """Tell whether an image is stored without colours."""
    return image.mode in _GREY or image.mode.startswith("I")


def _check_cost(image: ImageFile.ImageFile, data: bytes) -> None:
    """Refuse an opened image whose decoding would take too much time or memory.

    Raises:
        ValueError: it would; the limit and the value are named.
    """
    width, height = image.size
    pixels = width * height
    if max(width, height) > LONGEST_SIDE:
        raise ValueError(f"{width} x {height} pixels, but the longest side that is decoded is {LONGEST_SIDE:,}")
    if pixels > MOST_PIXELS:
        raise ValueError(f"{width} x {height} are {pixels:,} pixels, but at most {MOST_PIXELS:,} are decoded")
    scans = data.count(b"\xff" + _START_OF_SCAN) if image.format in ("JPEG", "MPO") else 1
    if scans > MOST_SCANS or (scans > 1 and pixels * _bytes_of_pixel(image, scans) > MOST_BYTES):
        scans = sum(marker == _START_OF_SCAN for marker in _markers(data))  # without those of thumbnails
    if scans > MOST_SCANS:
        raise ValueError(f"a JPEG of {scans:,} scans, but at most {MOST_SCANS} are decoded")
    size = int(pixels * _bytes_of_pixel(image, scans))
    if size > MOST_BYTES:
        raise ValueError(
            f"decoding {width} x {height} pixels takes {size >> 20:,} MiB, but at most {MOST_BYTES >> 20} are allowed"
        )
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        across, down = (image.tag_v2.get(tag, 1) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
        if across * down > MOST_PIXELS:
            raise ValueError(f"tiles of {across} x {down} pixels, but at most {MOST_PIXELS:,} are decoded")


def _bytes_of_pixel(image: ImageFile.ImageFile, scans: int) -> float:
    """Channels times bytes, as the decoder holds them."""
    channels = len(image.getbands())
    if image.format == "WEBP":
        return 2 * 4  # two canvases of RGBA
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        if scans == 1:
            return channels
        # Several scans add up coefficients of 16 bits, of which there are fewer where colours are subsampled.
        across, down = (max(layer[number] for layer in image.layer) for number in (1, 2))
        return 2 * sum(layer[1] * layer[2] for layer in image.layer) / (across * down)
    if image.mode in ("I", "F"):
        return 4
    sixteen = image.mode.startswith("I;16") or any(";16" in str(part) for tile in image.tile[:1] for part in tile)
    return channels * (2 if sixteen else 1)


def _markers(data: bytes) -> Iterator[bytes]:
    """The markers of a JPEG that its decoder meets, to the end of the image.

    It drops those below the first that has a length and reads on right behind them, so nothing hides there.
    """
    place = 2
    while (found := _MARKER.search(data, place)) and found[1] != _END_OF_IMAGE:
        place = found.end()
        yield found[1]
        if found[1] >= _FIRST_WITH_LENGTH and found[1] != _START_OF_IMAGE:
            place += int.from_bytes(data[place : place + 2], "big")


def _scale_transparent_grey(image: Image.Image, data: bytes) -> None:
    """Give the transparent grey of a PNG of 2 or 4 bits the value that Pillow has given its pixels."""
    key = image.info.get("transparency")
    if image.mode == "L" and isinstance(key, int) and data[12:16] == b"IHDR" and data[24] in (2, 4):
        image.info["transparency"] = key * (255 // (2 ** data[24] - 1))


def _reason(error: Exception, formats: tuple[str, ...] = SHARD_FORMATS) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it cannot be identified as {', '.join(formats[:-1])} or {formats[-1]}"
    if isinstance(error, Image.DecompressionBombError):  # twice its limit
        return f"more than {2 * MOST_PIXELS:,} pixels, but at most {MOST_PIXELS:,} are decoded"
    return str(error).partition("<_io")[0].strip() or type(error).__name__


def _load(image: Image.Image) -> None:
    """Decode what was opened elsewhere."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        image.load()
        return
    name, image.filename = image.filename, ""  # else Pillow maps the file into memory, and forgets to turn the image
    try:
        image.load()
    finally:
        image.filename = name


def _upright(image: Image.Image) -> Image.Image:
    """Turn and mirror as EXIF (or XMP) says; where that part is damaged, the image stays as it lies."""
    if image.format in SHARD_FORMATS and not _MAY_TURN & image.info.keys():
        return image
    try:
        method = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises nearly everything here, and viewers show such an image too
        return image
    if method is None:
        return image
    turned = image.transpose(method)
    turned.info = {key: image.info[key] for key in ("transparency",) if key in image.info}
    return turned


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits with 8: scaled, where Pillow would cut values off at 255."""
    key = image.info.get("transparency")
    values = np.asarray(image)
    grey = np.empty(values.shape, np.uint8)
    step = max(1, _ROWS // values.shape[1])
    for row in range(0, len(values), step):
        part = values[row : row + step]
        if part.dtype.itemsize > 2:
            largest = 1.0 if part.dtype.kind == "f" else 65_535
            if not (part.min() >= 0 and part.max() <= largest):
                raise ValueError(f"values from {part.min()} to {part.max()}, but they are read from 0 to {largest:,}")
        target = grey[row : row + step]
        target[:] = np.rint(part * 255) if part.dtype.kind == "f" else part >> 8
        if isinstance(key, int):
            target[part == key] = 255
    return Image.fromarray(grey)


def _on_white(image: Image.Image) -> Image.Image:
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # a colour of 16 bits, of which Pillow has kept 8
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    layer = image.convert("RGBA")
    white = Image.new("RGB", layer.size, "white")
    white.paste(layer, mask=layer.getchannel("A"))
    return white
