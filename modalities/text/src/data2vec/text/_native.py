"""The libraries that fairseq2's native part looks for on the system when it is imported, loaded from wheels before.

fairseq2n opens ``libsndfile.so.1``, which soundfile's wheel has under that name (its soname). oneTBB it looks for
below ``sys.prefix`` alone, where an environment laid over another (``uv run --with``) has none. fairseq2 itself is not
imported: that takes seconds.
"""

from __future__ import annotations

from data2vec.core.native import load_library

# Held so that they stay loaded.
LIBSNDFILE = load_library("soundfile", "libsndfile*")
TBB = load_library("tbb", "libtbb.so.12")
