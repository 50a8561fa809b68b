"""fairseq2's native part finds libsndfile in soundfile's wheel, without a system package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data2vec.core.native import packaged_library

LIBRARIES = """
import json, sys
from pathlib import Path
lines = Path("/proc/self/maps").read_text().splitlines()
mapped = sorted({line.split()[-1] for line in lines if "sndfile" in line.rsplit("/", 1)[-1]})
print(json.dumps({"mapped": mapped, "modules": sorted(sys.modules)}))
"""


def run(program: str) -> dict[str, Any]:
    """What a fresh process that runs ``program`` has loaded."""
    done = subprocess.run(
        [sys.executable, "-c", program + LIBRARIES], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    loaded: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return loaded


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_fairseq2_uses_the_wheels_library_and_no_other() -> None:
    path = packaged_library("soundfile", "libsndfile*")
    assert path is not None
    loaded = run("import data2vec.speech\nimport fairseq2n\nimport fairseq2n.bindings\n")
    assert [Path(library).resolve() for library in loaded["mapped"]] == [path.resolve()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_without_it_the_systems_library_is_used_or_there_is_none() -> None:
    """The check above can fail: fairseq2n alone never takes the wheel's library."""
    program = "try:\n    import fairseq2n, fairseq2n.bindings\nexcept OSError as error:\n    print(error)\n"
    assert str(packaged_library("soundfile", "libsndfile*")) not in run(program)["mapped"]


def test_importing_the_package_is_light() -> None:
    modules = set(run("import data2vec.speech\n")["modules"])
    assert "data2vec.speech" in modules
    assert not {"fairseq2", "fairseq2n", "matplotlib", "scipy", "soundfile", "transformers"} & modules
