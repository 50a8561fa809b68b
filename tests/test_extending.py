"""The page on a modality of one's own, followed literally."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The files of the page in a folder of their own, and recordings of three kinds."""
    files = dict(re.findall(r"^`([\w./]+)`\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    assert len(files) == 8
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    generator = np.random.default_rng(0)
    for kind, frequency in (("slow", 1.0), ("steady", 3.0), ("fast", 8.0)):
        folder = tmp_path / "RECORDINGS" / kind
        folder.mkdir(parents=True)
        for number in range(40):
            time = np.linspace(0, 2 * np.pi, 70)[:, None]
            values = np.sin(frequency * time + generator.uniform(0, 6, 3)) + 0.2 * generator.normal(size=(70, 3))
            np.savetxt(folder / f"{number:02d}.csv", values, delimiter=",")
    (tmp_path / "RECORDINGS" / "slow" / "notes.txt").write_text("left out")
    (tmp_path / "RECORDINGS" / "slow" / "short.csv").write_text("1,2,3\n")
    return tmp_path


def run(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of the page, with the interpreter in the place of ``uv run``."""
    search = os.pathsep.join([str(project / "modalities" / "series" / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *words], cwd=project, env={**os.environ, "PYTHONPATH": search},
        text=True, capture_output=True, timeout=300,
    )  # fmt: skip


def test_the_page_adds_a_modality_that_trains(project: Path) -> None:
    sharded, verified, trained = re.findall(r"^    uv run (.*)$", PAGE, re.MULTILINE)
    words = shlex.split(sharded)
    done = run(project, str(ROOT / words[0]), *words[1:])
    assert done.returncode == 0, done.stderr
    assert "122 files found: 121 written, 0 skipped, 1 left out (1 .txt)" in done.stdout
    done = run(project, str(ROOT / verified.split()[0]), *verified.split()[1:])
    assert done.returncode == 0, done.stderr
    done = run(project, *shlex.split(trained), "train.updates=30", "data.max_broken=0.1", "evaluation.tasks=[knn,rank]")
    assert done.returncode == 0, done.stderr
    assert "update 30/30" in done.stdout
    assert "raw readings" in done.stdout
    assert "short: has 1 x 3 readings; 64 x 3 are needed" in done.stderr
    assert (project / "runs" / "series_small" / "report.html").is_file()


def test_settings_of_the_page_are_checked(project: Path) -> None:
    done = run(project, "experiments/series_small.py", "data.train=x.tar", "series.patch=5", "series.mask.ratio=2")
    assert done.returncode == 2
    assert "series.mask.ratio=2.0: must be above 0 and below 1" in done.stderr
    assert "series.length=64: must be a multiple of series.patch=5" in done.stderr


def test_the_page_touches_two_entries_elsewhere() -> None:
    """What the page names outside of the package is there to be extended."""
    settings = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^members = \["core", "modalities/speech", ', settings, re.MULTILINE)
    assert 'layers = ["speech | vision | text", "core"]' in settings
