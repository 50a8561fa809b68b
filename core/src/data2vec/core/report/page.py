"""The report of a run: one self-contained HTML page without scripts that opens from disk.

Everything that comes from data or settings is escaped; only a panel's HTML, which a modality package makes, is taken
as it is.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from data2vec.core.evaluation.embedding import Embedding
from data2vec.core.evaluation.probe import EvaluationResult, Row, percent
from data2vec.core.exhibit import Panel
from data2vec.core.files import write_atomically
from data2vec.core.report.figures import class_colours, curves, scatter, series

_LEARNED = ("teacher", "student")  # rows of the probe table that the run trained; the rest is for comparison
_LEGEND_LIMIT = 40


@dataclass(frozen=True)
class Report:
    """The contents of a page; anything may be missing.

    ``title``; ``subtitle``: what ran, in one line. ``kind``: of training. ``lead``: the result in one sentence.
    ``tiles``: values and their names. ``config``: settings by section, values plain or nested.
    ``history``: the lines of ``metrics.jsonl``. ``thresholds``: values of a metric below which the run stops
    (``target_spread``, ``prediction_spread``). ``facts``: duration, samples, parameters, device, versions, seed.
    """

    title: str
    subtitle: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    thresholds: Mapping[str, float] = field(default_factory=dict)
    evaluation: EvaluationResult | None = None
    panels: Sequence[Panel] = ()
    embedding: Embedding | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "pretraining"
    lead: str = ""
    tiles: Sequence[tuple[str, str]] = ()


def write_report(path: Path, report: Report) -> None:
    """Write the page, replacing an older one whole: a reader never sees half a page."""
    template = files("data2vec.core.training").joinpath("report_template.html").read_text(encoding="utf-8")
    page = string.Template(template).substitute(title=escape(report.title), body=_body(report))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode("utf-8", "replace"))


def _body(report: Report) -> str:
    parts = [f"<header><h1>{escape(report.title)}</h1>"]
    if report.subtitle:
        parts.append(f'<p class="soft">{escape(report.subtitle)}</p>')
    parts.append("</header>")
    parts.append(_headline(report))
    if report.evaluation is not None and report.evaluation.rows:
        parts.append(_probes(report.evaluation))
    parts.append(_curves(report))
    for panel in report.panels:
        parts.append(f'<h2>{escape(panel.title)}</h2><p class="soft">{escape(panel.caption)}</p>{panel.html}')
    if report.embedding is not None and len(report.embedding.points):
        parts.append(_embedding(report.embedding))
    if report.facts:
        parts.append(f"<h2>The run</h2>{_definitions(report.facts)}")
    if report.config:
        parts.append(_settings(report.config))
    return "\n".join(part for part in parts if part)


def _main_row(evaluation: EvaluationResult) -> Row | None:
    found = [row for name in _LEARNED if (row := evaluation.row(name)) is not None]
    return found[0] if found else None


def _headline(report: Report) -> str:
    tiles: list[tuple[str, str]] = list(report.tiles)
    sentence = report.lead
    if report.evaluation is not None and (main := _main_row(report.evaluation)) is not None:
        sentence = _verdict(report.evaluation, main)
        scores = {
            f"kNN accuracy, {main.name}": percent(main.knn),
            f"linear probe, {report.evaluation.few_labels} labels": percent(main.linear_few),
            f"linear probe, {report.evaluation.train_samples:,} labels": percent(main.linear),
            f"effective rank of {main.dims}": None if main.rank is None else f"{main.rank:.1f}",
        }
        tiles += [(value, name) for name, value in scores.items() if value is not None]
    updates, losses = series(report.history, "loss")
    if len(updates):
        change = f"{losses[0]:.2g} → {losses[-1]:.2g}" if len(updates) > 1 else f"{losses[-1]:.2g}"
        tiles.append((change, f"loss, update {int(updates[0]):,} to {int(updates[-1]):,}"))
    cells = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(n)}</span></div>' for v, n in tiles)
    lead = f'<p class="lead">{escape(sentence)}</p>' if sentence else '<p class="lead"></p>'
    return lead + (f'<div class="tiles">{cells}</div>' if cells else "")


def _verdict(evaluation: EvaluationResult, main: Row) -> str:
    if main.knn is None:
        return ""
    compared = []
    for row in evaluation.rows:
        if row.name not in _LEARNED and row.knn is not None:
            points = 100 * (main.knn - row.knn)
            side = "above" if points >= 0 else "below"
            compared.append(f"{abs(points):.1f} points {side} {row.name} ({percent(row.knn)})")
    comparison = f": {' and '.join(compared)}" if compared else ""
    found = (
        f"Nearest neighbours in the {main.name}'s features name the class of {percent(main.knn)} of the test samples"
    )
    return f"{found}{comparison}."


def _probes(evaluation: EvaluationResult) -> str:
    headings, rows = evaluation.cells()
    charts = [
        _bars(f"kNN, k = {evaluation.neighbours}", [(row.name, row.knn) for row in evaluation.rows]),
        _bars(f"Linear probe, {evaluation.few_labels} labels", [(r.name, r.linear_few) for r in evaluation.rows]),
        _bars(f"Linear probe, {evaluation.train_samples:,} labels", [(r.name, r.linear) for r in evaluation.rows]),
    ]
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(
        f"<tr{_learned(row[0])}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    about = "Accuracy of simple classifiers on frozen features, beside encoders that learnt nothing."
    if evaluation.test_samples:
        about += f" {evaluation.test_samples:,} test samples, {evaluation.classes} classes"
        about += f"; always naming the commonest gives {percent(evaluation.majority)}." if evaluation.majority else "."
    notes = "".join(f'<p class="notes">{escape(note)}</p>' for note in evaluation.notes)
    return (
        f'<h2>What the features are worth</h2><p class="soft">{escape(about)}</p>'
        f'<div class="bars">{"".join(charts)}</div>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{notes}'
    )


def _learned(name: str) -> str:
    return ' class="learned"' if name in _LEARNED else ""


def _bars(title: str, values: Sequence[tuple[str, float | None]]) -> str:
    known = [(name, value) for name, value in values if value is not None]
    if not known:
        return ""
    lines = "".join(
        f'<div class="bar{" learned" if name in _LEARNED else ""}">'
        f'<span class="name" title="{escape(name)}">{escape(name)}</span>'
        f'<span class="track"><span class="fill" style="display:block;width:{100 * value:.1f}%"></span></span>'
        f'<span class="value">{percent(value)}</span></div>'
        for name, value in known
    )
    return f"<div><h3>{escape(title)}</h3>{lines}</div>"


def _curves(report: Report) -> str:
    drawn = curves(report.history, report.thresholds, report.kind)
    if not drawn:
        return ""
    figures = "".join(
        f'<figure><img src="{uri}" alt="{escape(title)} over updates">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for uri, title, caption in drawn
    )
    return f'<h2>Training</h2><div class="curves">{figures}</div>'


def _embedding(embedding: Embedding) -> str:
    labels = embedding.labels.tolist()
    colours = class_colours(labels)
    known = sorted({label for label in labels if label >= 0})
    legend = ""
    if known and len(known) <= _LEGEND_LIMIT:
        entries = []
        for label in known:
            named = label < len(embedding.class_names)
            name = embedding.class_names[label] if named else f"class {label}"
            entries.append(f'<li><span class="dot" style="background:{colours[label]}"></span>{escape(name)}</li>')
        legend = f'<ul class="legend">{"".join(entries)}</ul>'
    colour = "coloured by class, which training never saw" if known else "without labels"
    caption = (
        f"{embedding.method} of {len(labels):,} samples' features, {colour}. Distances between far points mean little."
    )
    return (
        f'<h2>Map of the features</h2><p class="soft">{escape(caption)}</p>'
        f'<div class="map"><figure><img src="{scatter(embedding)}" alt="map of the features"></figure>{legend}</div>'
    )


def _settings(config: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    sections = [f"<section>{_definitions(plain)}</section>"] if plain else []
    for name, values in config.items():
        if isinstance(values, Mapping):
            sections.append(f"<section><h3>{escape(str(name))}</h3>{_definitions(_flat(values))}</section>")
    return (
        f'<h2>Settings</h2><details><summary>All settings of this run</summary><div class="settings">'
        f"{''.join(sections)}</div></details>"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _definitions(values: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(_plain(value))}</dd>" for key, value in values.items())
    return f"<dl>{items}</dl>"


def _plain(value: Any) -> str:
    if value is None:
        return "–"  # noqa: RUF001
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(one) for one in value)
    return str(value)
