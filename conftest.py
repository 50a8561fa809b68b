"""What holds for every test of the workspace: see "Checks" in CONTRIBUTING.md."""

from __future__ import annotations

import os

from hypothesis import settings

# Before torch is imported: small tensors gain nothing from many threads, and several processes may run at once.
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
