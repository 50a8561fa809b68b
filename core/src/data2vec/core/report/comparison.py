"""The comparison of a fine-tuned run with others of the same task, as a panel of its page."""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data2vec.core.exhibit import Panel

FILE_NAME = "comparison.json"
_CAPTION = (
    "Mean and standard deviation over seeds, which draw the labels, the order of samples and what is not pretrained. "
    "Each row was trained on the same labels and judged by the same samples."
)


def comparison_panel(folder: Path) -> list[Panel]:
    """The panel of the comparison that lies in a run's folder; none where there is none that can be read."""
    try:
        content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        return [Panel("What pretraining is worth", _CAPTION, _table(content))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _table(content: Mapping[str, Any]) -> str:
    columns: Sequence[str] = content["columns"]
    head = "".join(f"<th>{html.escape(column)}</th>" for column in ("", *columns))
    rows = "".join(
        f"<tr><td>{html.escape(row['name'])}</td>"
        + "".join(f"<td>{html.escape(mean_and_deviation(row['values'].get(column, ())))}</td>" for column in columns)
        + "</tr>"
        for row in content["rows"]
    )
    command = f'<p class="notes">{html.escape(content["command"])}</p>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{command}'


def mean_and_deviation(values: Sequence[float]) -> str:
    """``84.5 ± 1.5 %`` of several shares; a dash of none."""
    if not values:
        return "–"  # noqa: RUF001
    mean = 100 * statistics.fmean(values)
    return f"{mean:.1f} %" if len(values) == 1 else f"{mean:.1f} ± {100 * statistics.stdev(values):.1f} %"
