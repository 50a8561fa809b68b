"""The result of a benchmark, as a table and as JSON."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """A table: its heading, its columns (key of a row: heading) and rows, and what else belongs to the figures."""

    command: str
    title: str
    columns: dict[str, str]
    rows: list[Row]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def to_rich(self) -> Group:
        """For a terminal; numbers get three digits."""
        table = Table()
        for heading in self.columns.values():
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(_shown(row.get(key)) for key in self.columns))
        return Group(Text(self.title), table, *(Text(note) for note in self.notes))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"command": self.command, "settings": self.settings, "machine": machine(), "rows": self.rows}


def machine() -> dict[str, Any]:
    """Describe what a figure depends on: processor, cores that may be used, GPU, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(), "cores": cores, "threads": torch.get_num_threads(), "gpu": gpu,
        "torch": torch.__version__, "python": sys.version.split()[0],
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
