"""libsndfile for fairseq2's native part, from soundfile's wheel, so that no system package is needed.

fairseq2n opens ``libsndfile.so.1`` when it is imported and fails where the dynamic linker finds none. The library in
soundfile's wheel carries that very name inside (its soname), and a library that is already loaded under a name is
what the linker gives to whoever asks for the name. So importing this module before fairseq2, which
``import data2vec.speech`` does, is enough. fairseq2 itself is not imported: that takes seconds.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from ctypes import CDLL, RTLD_GLOBAL
from pathlib import Path


def packaged_library() -> Path | None:
    """The libsndfile in soundfile's wheel; None where soundfile was installed without one."""
    spec = importlib.util.find_spec("_soundfile_data")
    if spec is None or spec.origin is None:
        return None
    arm = platform.machine().lower() in ("arm64", "aarch64")
    suffix = "dylib" if sys.platform == "darwin" else "so"
    path = Path(spec.origin).parent / f"libsndfile_{'arm64' if arm else 'x86_64'}.{suffix}"
    return path if path.is_file() else None


def load_libsndfile() -> CDLL | None:
    """Load it for the whole process; None where there is none that fits, and fairseq2 looks for the system's."""
    path = packaged_library()
    if path is None:
        return None
    try:
        return CDLL(str(path), mode=RTLD_GLOBAL)
    except OSError:  # of another architecture or C library than this system's
        return None


def load_tbb() -> CDLL | None:
    """Load oneTBB from its wheel, too: fairseq2n looks below ``sys.prefix`` alone, where an environment that is laid
    over another (``uv run --with``) has none. None where the wheel is missing, and fairseq2n says so.
    """
    try:
        files = importlib.metadata.files("tbb") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == "libtbb.so.12":
            try:
                return CDLL(str(Path(str(file.locate())).resolve()), mode=RTLD_GLOBAL)
            except OSError:
                return None
    return None


LIBSNDFILE = load_libsndfile()  # held so that it stays loaded
TBB = load_tbb()
