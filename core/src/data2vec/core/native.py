"""Native libraries in Python wheels: loaded from there, so that no package of the system is needed.

A library that is already loaded under a name (its soname) is what the dynamic linker gives to whoever asks for the
name. So a library that a third package looks for can come from any wheel, if that is loaded first.
"""

from __future__ import annotations

import importlib.metadata
from ctypes import CDLL, RTLD_GLOBAL
from pathlib import Path


def packaged_library(distribution: str, pattern: str) -> Path | None:
    """Find a library among the files of an installed distribution.

    Args:
        distribution: its name, such as ``soundfile``.
        pattern: of the file's name, such as ``libsndfile*``.

    Returns:
        The first match; None where the distribution is missing or was installed without it.
    """
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())).resolve() for file in files if Path(file.name).match(pattern))
    return next((path for path in sorted(found) if path.is_file()), None)


def load_library(distribution: str, pattern: str) -> CDLL | None:
    """Load a library of :func:`packaged_library` for the whole process, visible to all that is loaded later.

    Returns:
        The library; hold it as long as it is needed. None where there is none that fits this system: whoever needs it
        then looks for the system's own, and says so where that is missing.
    """
    path = packaged_library(distribution, pattern)
    if path is None:
        return None
    try:
        return CDLL(str(path), mode=RTLD_GLOBAL)
    except OSError:  # of another architecture or C library than this system's
        return None
