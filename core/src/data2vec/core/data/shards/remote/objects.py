"""Files in object stores: ``s3://``, ``gs://`` and ``hf://``, through the fsspec file system of each.

Each comes with an optional library. Credentials, endpoints and anonymous access are the library's own affair: from
its environment variables and files.
"""

from __future__ import annotations

import importlib
from typing import Any

from data2vec.core.data.shards.remote.address import protocol
from data2vec.core.data.shards.remote.body import CHUNK, AbsentError, Body, RefusedError, TroubleError
from data2vec.core.errors import DataError

# For each protocol the library, its file system, the extra of data2vec-core, and where credentials come from.
_LIBRARIES = {
    "s3": ("s3fs", "S3FileSystem", "s3", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true"),
    "gs": ("gcsfs", "GCSFileSystem", "gcs", "GOOGLE_APPLICATION_CREDENTIALS"),
    "hf": ("huggingface_hub", "HfFileSystem", "hf", "HF_TOKEN"),
}
_VERSIONS = ("ETag", "etag", "blob_id", "md5Hash", "generation")  # what the libraries call it


def open_object(url: str, offset: int, version: str, timeout: float) -> Body:
    """A file, from ``offset`` on if it still is the ``version`` of which so much was read, else from its beginning.

    Raises:
        TroubleError: another try may succeed. RefusedError: none will. DataError: the library is not installed.
    """
    path = url.partition("://")[2]
    files = _file_system(url, timeout)
    try:
        files.invalidate_cache()
        about = files.info(path)
        if about.get("type") != "file":
            raise FileNotFoundError("there is no such object")
        found = next((str(about[name]) for name in _VERSIONS if about.get(name)), "")
        begin = offset if version and found == version else 0
        file = files.open(path, "rb", block_size=CHUNK, cache_type="none")
        file.seek(begin)
    except Exception as error:
        raise _judged(url, error) from None
    size = about.get("size")

    def read() -> bytes:
        try:
            content: bytes = file.read(CHUNK)
        except Exception as error:
            raise _judged(url, error) from None
        return content

    return Body(begin, size if isinstance(size, int) else None, found, read, file.close)


def _file_system(url: str, timeout: float) -> Any:
    name = protocol(url)
    module, kind, extra, _ = _LIBRARIES[name]
    try:
        library = importlib.import_module(module)
    except ImportError:
        raise DataError(
            f"{url}: {name}:// needs the library {module}, which is not installed: pip install 'data2vec-core[{extra}]'"
        ) from None
    options: dict[str, Any] = {"use_listings_cache": False}
    if name == "s3":
        options["config_kwargs"] = {"connect_timeout": timeout, "read_timeout": timeout}
    return getattr(library, kind)(**options)  # the library keeps one for each process and thread


def _judged(url: str, error: Exception) -> Exception:
    """Judge what an error of a library, which may be of any kind, means for another try."""
    problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, FileNotFoundError | PermissionError):
        return AbsentError(problem)
    if "Credential" in type(error).__name__:
        return RefusedError(f"{problem}; credentials come from {_LIBRARIES[protocol(url)][3]}")
    return TroubleError(problem)
