"""The page of a fine-tuned classifier: scores, confusions, and the mistakes that it was surest of."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.table import Table
from sklearn.metrics import confusion_matrix

from data2vec.core.batch import Batch
from data2vec.core.data.dataset import EvaluationData, TrainData
from data2vec.core.exhibit import Panel
from data2vec.core.files import write_atomically
from data2vec.core.finetuning.classification import ClassificationTask as Task
from data2vec.core.finetuning.scores import Predictions, scores
from data2vec.core.modality import Modality
from data2vec.core.report.comparison import comparison_panel
from data2vec.core.report.figures import STYLE
from data2vec.core.report.gather import duration, facts
from data2vec.core.report.page import Report, write_report
from data2vec.core.report.pictures import figure_svg, image
from data2vec.core.settings.finetuning import Classification, LabelKind
from data2vec.core.settings.overrides import tree
from data2vec.core.training.monitor import read_metrics
from data2vec.core.training.progress import Progress

_MISTAKES = 12
_DRAWN_CLASSES = 30  # more are listed, not drawn
_PAIRS = 10
_NAMES = {
    "accuracy": "accuracy", "top5": "accuracy of the best five", "macro_f1": "F1, mean of classes", "f1": "F1",
    "matthews": "Matthews correlation", "mean_average_precision": "average precision, mean of classes",
    "micro_f1": "F1", "pearson": "Pearson correlation", "spearman": "Spearman correlation",
    "squared_error": "squared error", "validation_loss": "validation loss", "wer": "word error rate",
    "cer": "letter error rate",
}  # fmt: skip
_SHARES = ("accuracy", "top5", "wer", "cer")


def score_text(key: str, value: float) -> str:
    """A score for people."""
    return f"{100 * value:.1f} %" if key in _SHARES else f"{value:.3f}"


def write_classification_report(
    path: Path,
    recipe: Classification,
    task: Task,
    name: str,
    train: TrainData,
    validation: EvaluationData,
    found: Predictions,
    *,
    update: int,
    progress: Progress,
    folder: Path,
    device: torch.device,
) -> Table:
    """Write the page and, beside it with the ending ``.json``, its scores; returns them as a table for a terminal.

    Args:
        path: of the page.
        recipe: settled settings.
        task: with the weights that are judged.
        name: the modality.
        train, validation: samples that were learnt from, and that judge.
        found: predictions for ``validation``.
        update: of the weights that are judged.
        progress: of the run.
        folder: the run's.
        device: of the task.

    Raises:
        OSError: it cannot be written.
    """
    values = scores(found)
    result = {
        "update": update, "scores": values, "classes": list(recipe.labels.classes),
        "train_samples": train.total, "validation_samples": len(found),
    }  # fmt: skip
    write_atomically(path.with_suffix(".json"), (json.dumps(result, indent=1) + "\n").encode())
    main = recipe.scores[0]
    parameters = sum(parameter.numel() for parameter in task.parameters())
    origin = f"from {recipe.source} ({recipe.weights})" if recipe.source else "from scratch"
    report = Report(
        title=recipe.name,
        subtitle=f"{name}, fine-tuned {origin} on {train.total:,} labelled samples: {progress.update:,} updates of "
        f"{recipe.train.described_batch} in {duration(progress.seconds)}",
        kind=recipe.kind,
        lead=_lead(found, values, update, progress.update),
        tiles=[(score_text(key, values[key]), _NAMES[key]) for key in recipe.scores if key in values],
        config=tree(recipe),
        history=read_metrics(folder / "metrics.jsonl"),
        panels=[*comparison_panel(folder), *_panels(found, recipe, recipe.modalities[name], validation)],
        facts=facts(recipe.train, device, update=progress.update, seconds=progress.seconds, parameters=parameters),
    )
    write_report(path, report)
    table = Table(caption=f"{len(found):,} validation samples, weights of update {update:,}", caption_justify="left")
    for key in recipe.scores:
        if key in values:
            table.add_column(_NAMES[key], justify="right", style="bold" if key == main else None)
    table.add_row(*(score_text(key, values[key]) for key in recipe.scores if key in values))
    return table


def _lead(found: Predictions, values: dict[str, float], update: int, last: int) -> str:
    best = "" if update == last else f", with the weights of update {update:,}, the best of {last:,}"
    if found.kind is LabelKind.CLASS:
        commonest = float(torch.bincount(found.targets).max()) / len(found)
        return (
            f"The class of {score_text('accuracy', values['accuracy'])} of {len(found):,} validation samples is named "
            f"rightly{best}; always naming the commonest gives {100 * commonest:.1f} %."
        )
    return f"Scores on {len(found):,} validation samples{best}."


def _panels(found: Predictions, recipe: Classification, modality: Modality, validation: EvaluationData) -> list[Panel]:
    names = recipe.labels.classes
    panels = [_confusions(found, names)] if found.kind is LabelKind.CLASS else []
    return [*panels, *_mistakes(found, names, modality, validation, recipe.evaluation.batch)]


def _confusions(found: Predictions, names: Sequence[str]) -> Panel:
    """The confusion matrix as a picture, or its largest parts as a list."""
    matrix = confusion_matrix(found.targets.numpy(), found.outputs.argmax(1).numpy(), labels=range(len(names)))
    if len(names) > _DRAWN_CLASSES:
        pairs = [(int(matrix[row, column]), row, column) for row, column in zip(*np.nonzero(matrix), strict=True)]
        worst = sorted((pair for pair in pairs if pair[1] != pair[2]), reverse=True)[:_PAIRS]
        rows = "".join(
            f"<tr><td>{html.escape(names[row])}</td><td>{html.escape(names[column])}</td><td>{count:,}</td></tr>"
            for count, row, column in worst
        )
        head = "<thead><tr><th>is</th><th>was named</th><th>samples</th></tr></thead>"
        table = f"<table>{head}<tbody>{rows}</tbody></table>"
        return Panel("Confusions", "The classes that are most often taken for each other.", table)
    with rc_context({**STYLE, "axes.grid": False}):
        side = min(8.0, 2.4 + 0.42 * len(names))
        figure = Figure(figsize=(side + 0.6, side), layout="constrained")
        axes = figure.add_subplot()
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        labels = [name if len(name) <= 14 else f"{name[:13]}…" for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=45 if max(map(len, labels)) > 3 else 0, ha="center")
        axes.set_yticks(range(len(names)), labels)
        axes.set_xlabel("named")
        axes.set_ylabel("is")
        for row, column in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if shares[row, column] > 0.6 else "#1b2330"
            axes.text(column, row, f"{matrix[row, column]:,}", ha="center", va="center", color=colour, fontsize=8)
        drawn = image(figure_svg(figure), "confusion matrix")
    return Panel(
        "Confusions", "Rows are the true classes, columns what they were named; the numbers count samples.",
        f'<div style="max-width:{round(72 * (side + 0.6))}px">{drawn}</div>',
    )  # fmt: skip


def _mistakes(
    found: Predictions, names: Sequence[str], modality: Modality, validation: EvaluationData, batch: int
) -> list[Panel]:
    """The samples that were named wrongly with the highest probability, or numbers that are furthest off."""
    if found.kind is LabelKind.CLASS:
        probability, named = found.outputs.max(1)
        badness = torch.where(named != found.targets, probability, -1.0)
        caption = "Named wrongly with the highest probability."
    elif found.kind is LabelKind.NUMBER:
        badness = (found.outputs - found.targets).abs().squeeze(1)
        caption = "Furthest from the right number."
    else:
        badness = found.losses
        caption = "With the highest loss."
    worst = [place for place in badness.argsort(descending=True)[:_MISTAKES].tolist() if badness[place] > 0]
    if not worst:
        return []
    cards = shown_samples(modality, validation, [found.keys[place] for place in worst], batch)
    figures = [
        f'<figure style="margin:0;min-width:0">{cards.get(found.keys[place], "")}'
        f'<figcaption style="font-size:12px;color:#5d6775;padding-top:4px">{html.escape(_said(found, place, names))}'
        "</figcaption></figure>"
        for place in worst
    ]
    grid = "display:grid;gap:18px;grid-template-columns:repeat(auto-fill,minmax(170px,1fr))"
    return [Panel("Mistakes", caption, f'<div style="{grid}">{"".join(figures)}</div>')]


def _said(found: Predictions, place: int, names: Sequence[str]) -> str:
    if found.kind is LabelKind.CLASS:
        probability, named = found.outputs[place].max(0)
        return f"{names[int(named)]} ({100 * probability:.0f} %), is {names[int(found.targets[place])]}"
    if found.kind is LabelKind.NUMBER:
        return f"{float(found.outputs[place, 0]):.2f}, is {float(found.targets[place, 0]):.2f}"
    given = [name for name, value in zip(names, found.outputs[place].tolist(), strict=True) if value >= 0.5]
    right = [name for name, value in zip(names, found.targets[place].tolist(), strict=True) if value >= 0.5]
    return f"{', '.join(given) or 'none'}; is {', '.join(right) or 'none'}"


def shown_samples(modality: Modality, data: EvaluationData, keys: Sequence[str], batch: int) -> dict[str, str]:
    """HTML that shows samples, by key.

    Raises:
        DataError: the data became unreadable.
    """
    wanted: set[str] = set(keys)
    cards: dict[str, str] = {}
    for part in data.evaluation_batches(batch):
        rows = [row for row, key in enumerate(part.keys) if key in wanted]
        if rows:
            chosen: Batch = part.rows(rows)
            cards.update(zip(chosen.keys, modality.exhibit.cards(chosen), strict=True))
        if len(cards) == len(wanted):
            break
    return cards
