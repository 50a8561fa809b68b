"""Commands of experiments and tools that tests run in their own process, and what those print and leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType

import pytest


class Commands:
    """Runs an experiment in a folder.

    Args:
        experiment: the experiment's module.
        defaults: arguments that every command gets unless it gives others.
        folder: ``train.folder``, unless a command names another one.
        capsys: catches what is printed.
        tools: modules of tools by name.
        leaves: all that a refused command may leave in the folder; None: anything but results.
    """

    def __init__(
        self,
        experiment: ModuleType,
        defaults: Sequence[str],
        folder: Path,
        capsys: pytest.CaptureFixture[str],
        *,
        tools: Mapping[str, ModuleType] = MappingProxyType({}),
        leaves: Sequence[str] | None = None,
    ) -> None:
        self.experiment, self.folder, self.capsys = experiment, folder, capsys
        self.defaults, self.tools, self.leaves = defaults, tools, leaves

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """The exit code and what went to both streams."""
        given = {argument.partition("=")[0] for argument in arguments}
        defaults = (*self.defaults, f"train.folder={self.folder}")
        others = [argument for argument in defaults if argument.partition("=")[0] not in given]
        with pytest.raises(SystemExit) as ended:
            self.experiment.main(self.experiment.experiment, self.experiment.sample, argv=(*others, *arguments))
        out, err = self.capsys.readouterr()
        return int(ended.value.code or 0), out, err

    def refused(self, *arguments: str) -> str:
        """The one error of a command that must fail, which leaves no checkpoint, no report and nothing half-written."""
        code, out, err = self(*arguments)
        assert code == 2, out
        assert err.count("error:") == 1
        assert "Traceback" not in out + err
        assert not (self.folder / "checkpoints").exists()
        assert not (self.folder / "report.html").exists()
        assert not list(self.folder.rglob("*.tmp*"))
        if self.leaves is not None:
            found = sorted(path.name for path in self.folder.iterdir()) if self.folder.exists() else []
            assert found == sorted(self.leaves)
        return err

    def tool(self, name: str, *arguments: str) -> tuple[int, str, str]:
        """The exit code of a tool and what went to both streams."""
        code: int = self.tools[name].main(list(arguments))
        out, err = self.capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err
