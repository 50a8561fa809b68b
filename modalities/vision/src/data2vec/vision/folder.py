"""A folder of images, as it becomes shards: what is in it, its classes, and a key for each image."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from data2vec.core.data.folder import count_left_out, list_files, unique_key
from data2vec.core.errors import DataError, SampleError
from data2vec.vision.image import convert, encode, file_formats, is_grey, read_image

# What a file's name promises. What it holds is decided by its content.
_ENDINGS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".avif": "AVIF",
}
_MEMBERS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: several JPEG images, one behind another
_BEGINNINGS = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WEBP"}


@dataclass(frozen=True)
class ImageFile:
    """One image: its key in a shard (unique in its folder, no dots), and its class number where there are classes."""

    key: str
    path: Path
    label: int | None

    def describe(self) -> str:
        """Changes when the file does."""
        try:
            status = self.path.stat()
        except OSError as error:  # a link without a target: whoever reads it says so
            return f"{self.key} {self.path} {self.label} {error.strerror}"
        return f"{self.key} {self.path} {self.label} {status.st_size} {status.st_mtime_ns}"


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder in the order of their paths; ``class_names`` is empty where they lie flat.

    ``left_out``: how many other files there are, by ending (:class:`data2vec.core.data.folder.Listing`).
    """

    images: tuple[ImageFile, ...]
    class_names: tuple[str, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)


def list_image_folder(folder: Path) -> ImageFolder:
    """Find the images of a folder, at any depth, by the endings of their names; links are followed.

    The sorted names of the subfolders that hold images are the classes. A folder without such subfolders is flat.

    Raises:
        DataError: no such folder, no images in it, or images both in the folder itself and in class subfolders.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images")
    endings = tuple(ending for ending, name in _ENDINGS.items() if name in file_formats())
    found = list_files(folder, lambda name: name.endswith(endings))
    if not found.paths:
        others = f"; it has {count_left_out(found.left_out)}" if found.left_out else ""
        raise DataError(f"{folder}: has no images ({', '.join(endings)}){others}")
    tops = [path.relative_to(folder).parts for path in found.paths]
    flat = sum(len(parts) == 1 for parts in tops)
    if 0 < flat < len(tops):
        raise DataError(
            f"{folder}: has {flat} images beside class subfolders with {len(tops) - flat}; "
            "move them into a class, or all into one flat folder"
        )
    class_names = () if flat else tuple(sorted({parts[0] for parts in tops}))
    numbers = {name: number for number, name in enumerate(class_names)}
    keys: set[str] = set()
    images = []
    for path, parts in zip(found.paths, tops, strict=True):
        key = unique_key(parts, keys)
        images.append(ImageFile(key, path, numbers[parts[0]] if class_names else None))
    return ImageFolder(tuple(images), class_names, found.left_out)


def read_image_file(image: ImageFile, *, verify: bool = True, max_size: int | None = None) -> dict[str, bytes]:
    """The members of a sample: the image, and ``cls`` with its class number.

    The image is the file as it is, under the ending of what it holds, where a shard may hold that. Any other is
    written anew as a PNG, as the decoder sees it.

    Args:
        image: what to read.
        verify: decode it as training will.
        max_size: re-encode an image whose short side is longer than this many pixels, to this.

    Raises:
        SampleError: it cannot be read, or training could not decode it.
    """
    try:
        data = image.path.read_bytes()
    except OSError as error:
        raise SampleError(f"{image.path}: cannot be read ({error.strerror})") from None
    kind = _promised(image.path, data)
    if verify or max_size is not None or kind not in _MEMBERS:
        kind, data = _checked(data, f"{image.path}:", max_size)
    member = _MEMBERS[kind]
    return {member: data} if image.label is None else {member: data, "cls": str(image.label).encode()}


def _promised(path: Path, data: bytes) -> str:
    """The format that the first bytes say, or else the name."""
    by_content = (kind for beginning, kind in _BEGINNINGS.items() if data.startswith(beginning))
    return next(by_content, _ENDINGS[os.path.splitext(path.name)[1].lower()])


def _checked(data: bytes, what: str, max_size: int | None) -> tuple[str, bytes]:
    """The format and the bytes that go into a shard."""
    stored = read_image(data, what, file_formats())
    image = convert(stored, 1 if is_grey(stored) else 3, what)
    kind, short = stored.format or "", min(image.size)
    if max_size is not None and short > max_size:
        width, height = (max(1, round(side * max_size / short)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    elif kind in _MEMBERS:
        return kind, data
    kind = "JPEG" if kind == "MPO" else kind if kind in _MEMBERS else "PNG"
    return kind, encode(image, kind)
