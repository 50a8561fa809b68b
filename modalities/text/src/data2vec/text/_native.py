"""The one native library that fairseq2 does not bring along: libsndfile.

fairseq2n loads ``libsndfile.so.1`` when it is imported, also for text, and fails on a machine without it. The wheel
of soundfile carries that library. Once it is loaded, the dynamic linker finds it under its soname, so fairseq2 works
without any system package. Import this module before the first import of fairseq2.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import platform
from pathlib import Path

_SYSTEM_NAME = "libsndfile.1.dylib" if platform.system() == "Darwin" else "libsndfile.so.1"


def bundled_libsndfile() -> Path | None:
    """The library in soundfile's wheel, or None where that is not installed or carries none."""
    spec = importlib.util.find_spec("_soundfile_data")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    found = sorted(path for folder in folders for path in Path(folder).glob("libsndfile*") if path.is_file())
    return found[0] if found else None


def load_libsndfile() -> Path | None:
    """Make libsndfile available to this process: the system's where there is one, else soundfile's.

    Returns:
        The bundled library if that was loaded. Where there is neither, nothing happens, and the import of fairseq2
        says how to install the system's.
    """
    for name in (_SYSTEM_NAME, bundled_libsndfile()):
        if name is not None:
            try:
                ctypes.CDLL(str(name), mode=ctypes.RTLD_GLOBAL)
            except OSError:  # there is none, or it is of another architecture than this process
                continue
            return name if isinstance(name, Path) else None
    return None


def load_tbb() -> None:
    """Load oneTBB from its wheel, too: fairseq2n looks below ``sys.prefix`` alone, where an environment that is laid
    over another (``uv run --with``) has none. Where the wheel is missing, fairseq2n says so.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, OSError):
        for file in importlib.metadata.files("tbb") or []:
            if file.name == "libtbb.so.12":
                ctypes.CDLL(str(Path(str(file.locate())).resolve()), mode=ctypes.RTLD_GLOBAL)


load_libsndfile()
load_tbb()
