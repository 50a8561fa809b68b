"""A folder of images, as it becomes shards: what is in it, its classes, and a key for each image."""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from data2vec.core.errors import DataError, SampleError

EXTENSIONS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_QUALITY = 95  # of re-encoded JPEG and WebP


@dataclass(frozen=True)
class ImageFile:
    """One image: its key in a shard (unique in its folder, no dots), and its class number where there are classes."""

    key: str
    path: Path
    label: int | None

    def describe(self) -> str:
        """Changes when the file does."""
        status = self.path.stat()
        return f"{self.key} {self.path} {self.label} {status.st_size} {status.st_mtime_ns}"


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder in the order of their paths; ``class_names`` is empty where they lie flat."""

    images: tuple[ImageFile, ...]
    class_names: tuple[str, ...]


def list_image_folder(folder: Path) -> ImageFolder:
    """Find the jpg, jpeg, png and webp files of a folder, at any depth; hidden files and folders are skipped.

    The sorted names of the subfolders that hold images are the classes. A folder without such subfolders is flat.

    Raises:
        DataError: no such folder, no images in it, or images both in the folder itself and in class subfolders.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images")
    paths = sorted(_image_paths(folder), key=lambda path: path.relative_to(folder).parts)
    if not paths:
        raise DataError(f"{folder}: has no images ({', '.join(EXTENSIONS)})")
    tops = [path.relative_to(folder).parts for path in paths]
    flat = sum(len(parts) == 1 for parts in tops)
    if 0 < flat < len(paths):
        raise DataError(
            f"{folder}: has {flat} images beside class subfolders with {len(paths) - flat}; "
            "move them into a class, or all into one flat folder"
        )
    class_names = () if flat else tuple(sorted({parts[0] for parts in tops}))
    numbers = {name: number for number, name in enumerate(class_names)}
    keys: set[str] = set()
    images = []
    for path, parts in zip(paths, tops, strict=True):
        key = _unique_key(parts, keys)
        images.append(ImageFile(key, path, numbers[parts[0]] if class_names else None))
    return ImageFolder(tuple(images), class_names)


def read_image_file(image: ImageFile, *, verify: bool = True, max_size: int | None = None) -> dict[str, bytes]:
    """The members of a sample: the image as it is, and ``cls`` with its class number.

    Args:
        image: what to read.
        verify: check that it is an image.
        max_size: re-encode an image whose short side is longer than this many pixels, to this.

    Raises:
        SampleError: it cannot be read, or is no image.
    """
    try:
        data = image.path.read_bytes()
        extension = EXTENSIONS[image.path.suffix.lower()]
        if verify:
            with Image.open(io.BytesIO(data), formats=tuple(_FORMATS.values())) as picture:
                picture.verify()
        if max_size is not None:
            data = _shrunk(data, _FORMATS[extension], max_size)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises nearly everything on damaged files
        raise SampleError(f"{image.path}: is no usable image ({error})") from None
    return {extension: data} if image.label is None else {extension: data, "cls": str(image.label).encode()}


def _shrunk(data: bytes, image_format: str, max_size: int) -> bytes:
    with Image.open(io.BytesIO(data), formats=tuple(_FORMATS.values())) as picture:
        short = min(picture.size)
        if short <= max_size:
            return data
        upright = ImageOps.exif_transpose(picture)
        if image_format == "JPEG" and upright.mode not in ("RGB", "L"):
            upright = upright.convert("RGB")
        width, height = (max(1, round(side * max_size / short)) for side in upright.size)
        smaller = upright.resize((width, height), Image.Resampling.LANCZOS)
        target = io.BytesIO()
        smaller.save(target, image_format, **({} if image_format == "PNG" else {"quality": _QUALITY}))
        return target.getvalue()


def _image_paths(folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    paths = []
    for root, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [
            Path(root, name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS
        ]
    return paths


def _unique_key(parts: tuple[str, ...], taken: set[str]) -> str:
    """A key from a relative path: no dots and nothing that a tar file or WebDataset reads in a way of its own."""
    stem = (*parts[:-1], os.path.splitext(parts[-1])[0])
    base = "/".join(re.sub(r"[^\w-]", "_", part) for part in stem)
    if base.startswith("__"):
        base = f"x{base}"
    key, number = base, 2
    while key in taken:
        key, number = f"{base}-{number}", number + 1
    taken.add(key)
    return key
