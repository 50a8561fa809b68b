"""libsndfile for fairseq2's native part, from soundfile's wheel, so that no system package is needed.

fairseq2n opens ``libsndfile.so.1`` when it is imported and fails where the dynamic linker finds none. The library in
soundfile's wheel carries that very name inside (its soname), and a library that is already loaded under a name is
what the linker gives to whoever asks for the name. So importing this module before fairseq2, which
``import data2vec.speech`` does, is enough. fairseq2 itself is not imported: that takes seconds.
"""

from __future__ import annotations

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


LIBSNDFILE = load_libsndfile()  # held so that it stays loaded
