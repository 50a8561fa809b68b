"""Fixtures and limits of every test of the workspace: see "Checks" in CONTRIBUTING.md."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported: small tensors gain nothing from threads, and several processes run at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Some containers forbid Python to keep compiled modules; each of the many processes that tests start would then spend
# seconds on compiling the same ones.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    os.environ["PYTHONPYCACHEPREFIX"] = str(Path(__file__).parent / ".pytest_cache" / "bytecode")

# What a shell starts in the background ignores Ctrl-C, and so would all processes of tests that send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests of several ranks fork them from one server: what it imports is not imported again by each of them.
multiprocessing.set_forkserver_preload([
    "data2vec.core.testing", "data2vec.core.run.cli", "data2vec.core.engines.zero",
    "data2vec.vision", "data2vec.speech",
    "data2vec.text", "deepspeed", "torch.utils.tensorboard", "pytest",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # of every engine: compiles at import, which takes seconds
])  # fmt: skip

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process per core, at most four, as each takes 2 GiB with the ranks it starts; none for tests named singly."""
    return 0 if any("::" in argument for argument in config.args) else min(4, os.cpu_count() or 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-cases", type=int, default=60, metavar="N",
        help="mutations that each test of tests/fuzz tries (default: %(default)s)",
    )  # fmt: skip
    parser.addoption(
        "--fuzz-first", type=int, default=0, metavar="N",
        help="number of the first of them, to repeat one or to go on from others (default: %(default)s)",
    )  # fmt: skip
