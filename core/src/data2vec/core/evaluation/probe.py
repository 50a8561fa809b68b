"""Several encoders side by side: kNN, linear probes and effective rank of the same samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from rich.table import Table

from data2vec.core.errors import ConfigError, DataError
from data2vec.core.evaluation.features import Pooled
from data2vec.core.evaluation.knn import knn_accuracy
from data2vec.core.evaluation.linear import few_label_accuracy, linear_accuracy
from data2vec.core.evaluation.rank import effective_rank, spread
from data2vec.core.settings.pretraining import EvaluationConfig

TASKS = ("knn", "linear", "rank", "positions")
FEW_LABEL_DRAWS = 5


@dataclass(frozen=True)
class Row:
    """The scores of one encoder. Accuracies are shares (0 to 1), None where not measured.

    ``linear_few`` and ``linear_few_std``: mean and standard deviation over class-balanced draws. ``rank``: effective
    rank of ``dims`` dimensions; ``spread``: standard deviation over samples, mean of the dimensions. ``positions``: a
    linear probe of single positions.
    """

    name: str
    dims: int
    knn: float | None = None
    linear_few: float | None = None
    linear_few_std: float | None = None
    linear: float | None = None
    rank: float | None = None
    spread: float | None = None
    positions: float | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """A table of encoders. ``majority``: accuracy of always naming the test samples' commonest class."""

    rows: tuple[Row, ...]
    neighbours: int
    few_labels: int
    train_samples: int
    test_samples: int
    classes: int = 0
    majority: float | None = None
    notes: tuple[str, ...] = ()
    position_classes: int = 0
    position_samples: int = 0  # positions that the probe of positions was fitted to
    position_majority: float | None = None

    def row(self, name: str) -> Row | None:
        """The row of that name, if there is one."""
        return next((row for row in self.rows if row.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for ``json.dumps``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`, also after a round trip through JSON text."""
        rows = tuple(Row(**row) for row in values["rows"])
        return cls(**{**values, "rows": rows, "notes": tuple(values["notes"])})

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows as text, without the columns that no row has."""
        columns: list[tuple[str, Callable[[Row], str | None]]] = [
            (f"kNN (k={self.neighbours})", lambda row: percent(row.knn)),
            (f"linear, {self.few_labels} labels", lambda row: percent(row.linear_few, row.linear_few_std)),
            (f"linear, {self.train_samples:,} labels", lambda row: percent(row.linear)),
            (f"positions, {self.position_classes} classes", lambda row: percent(row.positions)),
            ("effective rank", lambda row: None if row.rank is None else f"{row.rank:.1f} of {row.dims}"),
        ]
        kept = [(title, cell) for title, cell in columns if any(cell(row) is not None for row in self.rows)]
        headings = ["features", *(title for title, _ in kept)]
        return headings, [[row.name, *(cell(row) or "–" for _, cell in kept)] for row in self.rows]  # noqa: RUF001

    def to_rich(self) -> Table:
        """The table for a terminal."""
        headings, rows = self.cells()
        table = Table(caption="\n".join(self.notes) or None, caption_justify="left")
        for number, heading in enumerate(headings):
            table.add_column(heading, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row)
        return table


def percent(value: float | None, std: float | None = None) -> str | None:
    """``58.3 %`` or ``58.3 ± 1.2 %``; None for None."""
    if value is None:
        return None
    return f"{100 * value:.1f} %" if std is None else f"{100 * value:.1f} ± {100 * std:.1f} %"


def check_tasks(tasks: tuple[str, ...]) -> None:
    """Raise ConfigError for a task that does not exist."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ConfigError(
            [f"evaluation.tasks={task}: no such task; choose from {', '.join(TASKS)}" for task in unknown]
        )


def evaluate(
    features_train: Mapping[str, Pooled],
    features_test: Mapping[str, Pooled],
    config: EvaluationConfig,
    progress: Callable[[str], None] | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> EvaluationResult:
    """Run ``config.tasks`` on every encoder of ``features_train``.

    kNN and the linear probes use the labelled samples; what cannot be measured (no labels, too few samples for the
    classes) is left out and a note in the result says why.

    Args:
        features_train, features_test: features by encoder name, of the same samples for every encoder.
        progress: called with a short line before each step.

    Raises:
        ConfigError: an unknown task. DataError: no encoder or no sample.
    """
    check_tasks(config.tasks)
    if not features_train or not len(next(iter(features_train.values()))):
        raise DataError("evaluation: there are no features to evaluate")
    report = progress or (lambda _line: None)
    train = {name: one.labelled() for name, one in features_train.items()}
    test = {name: features_test[name].labelled() for name in features_train}
    first_train, first_test = next(iter(train.values())), next(iter(test.values()))
    notes: list[str] = []
    supervised = {task for task in config.tasks if task in ("knn", "linear")}
    if supervised and not (len(first_train) and len(first_test)):
        notes.append("The samples carry no labels, so only the effective rank is given.")
        supervised = set()
    rows = []
    for name, one in features_train.items():
        row = Row(name, dims=one.x.shape[1], spread=float(spread(one.x).mean()))
        if "knn" in supervised:
            report(f"{name}: kNN")
            score = knn_accuracy(train[name], test[name], k=config.neighbours, device=device)
            row = dataclasses.replace(row, knn=score)
        if "linear" in supervised:
            row = _linear(row, train[name], test[name], config, notes, report, seed=seed, device=device)
        if "rank" in config.tasks or not supervised:
            report(f"{name}: effective rank")
            row = dataclasses.replace(row, rank=effective_rank(one.x.to(device)))
        rows.append(row)
    return EvaluationResult(
        rows=tuple(rows),
        neighbours=config.neighbours,
        few_labels=config.few_labels,
        train_samples=len(first_train) or len(next(iter(features_train.values()))),
        test_samples=len(first_test),
        classes=len(first_train.labels.unique()),
        majority=_majority(first_test) if len(first_test) else None,
        notes=tuple(dict.fromkeys(notes)),  # the same for every encoder, so said once
    )


def _majority(test: Pooled) -> float:
    return float(torch.bincount(test.labels).max()) / len(test)


def with_positions(
    table: EvaluationResult,
    train: Mapping[str, Pooled] | None,
    test: Mapping[str, Pooled] | None,
    progress: Callable[[str], None] | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> EvaluationResult:
    """The table with linear probes of single positions, or with a note that there are no labels of positions.

    Args:
        table: rows of encoders; those without features of positions stay as they are.
        train, test: by encoder, from :func:`data2vec.core.evaluation.positions.position_features`.
        progress: called with a short line before each step.
        seed: of the choice of the penalty.
        device: where probes are fitted.
    """
    if not train or not test:
        note = "The samples carry no labels of positions, so there is no probe of positions."
        return dataclasses.replace(table, notes=(*table.notes, note))
    known = next(iter(train.values())).labels.unique()
    rows = []
    for row in table.rows:
        if row.name in train:
            (progress or (lambda _line: None))(f"{row.name}: probe of positions")
            judged = test[row.name].take(torch.isin(test[row.name].labels, known).nonzero().flatten())
            score = linear_accuracy(train[row.name], judged, seed=seed, device=device)
            row = dataclasses.replace(row, positions=score)
        rows.append(row)
    return dataclasses.replace(
        table,
        rows=tuple(rows),
        position_classes=len(known),
        position_samples=len(next(iter(train.values()))),
        position_majority=_majority(next(iter(test.values()))),
    )


def _linear(
    row: Row,
    train: Pooled,
    test: Pooled,
    config: EvaluationConfig,
    notes: list[str],
    report: Callable[[str], None],
    *,
    seed: int,
    device: torch.device | str,
) -> Row:
    try:
        report(f"{row.name}: linear probe, {config.few_labels} labels")
        mean, std = few_label_accuracy(train, test, config.few_labels, draws=FEW_LABEL_DRAWS, seed=seed, device=device)
        row = dataclasses.replace(row, linear_few=mean, linear_few_std=std)
    except DataError as error:
        notes.append(f"Left out, few labels: {error}")
    try:
        report(f"{row.name}: linear probe, all labels")
        row = dataclasses.replace(row, linear=linear_accuracy(train, test, seed=seed, device=device))
    except DataError as error:
        notes.append(f"Left out, all labels: {error}")
    return row
