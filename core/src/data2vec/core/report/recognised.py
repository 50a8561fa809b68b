"""The page of a fine-tuned recogniser: error rates, and the worst transcripts with their alignment and a player."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jiwer
import torch
from rich.table import Table

from data2vec.core.data.dataset import EvaluationData, TrainData
from data2vec.core.exhibit import Panel
from data2vec.core.files import write_atomically
from data2vec.core.finetuning.recognition import RecognitionTask as Task
from data2vec.core.finetuning.transcribing import Transcript, error_rates
from data2vec.core.modality import Modality
from data2vec.core.report.classified import score_text, shown_samples
from data2vec.core.report.comparison import comparison_panel
from data2vec.core.report.gather import duration, facts
from data2vec.core.report.page import Report, write_report
from data2vec.core.settings.finetuning import Recognition
from data2vec.core.settings.overrides import tree
from data2vec.core.training.monitor import read_metrics
from data2vec.core.training.progress import Progress

_WORST, _TYPICAL = 6, 4
_WRONG, _MISSING, _ADDED = "#c0392b", "#8a94a1", "#b8860b"


def write_recognition_report(
    path: Path,
    recipe: Recognition,
    task: Task,
    name: str,
    train: TrainData,
    validation: EvaluationData,
    found: Sequence[Transcript],
    *,
    update: int,
    progress: Progress,
    folder: Path,
    device: torch.device,
) -> Table:
    """Write the page and, beside it with the ending ``.json``, its scores; returns them as a table for a terminal.

    The arguments are those of :func:`data2vec.core.report.classified.write_classification_report`, with transcripts
    in place of predictions.

    Raises:
        OSError: it cannot be written.
    """
    values = error_rates(list(found))
    too_long = sum(one.too_long for one in found)
    result = {
        "update": update, "scores": values, "symbols": list(recipe.letters.symbols), "train_clips": train.total,
        "validation_clips": len(found), "too_long": too_long,
    }  # fmt: skip
    write_atomically(path.with_suffix(".json"), (json.dumps(result, indent=1) + "\n").encode())
    origin = f"from {recipe.source} ({recipe.weights})" if recipe.source else "from scratch"
    lead = _lead(found, values, update, progress.update)
    report = Report(
        title=recipe.name,
        subtitle=f"{name}, fine-tuned {origin} on {train.total:,} transcribed clips: {progress.update:,} updates of "
        f"{recipe.train.described_batch} in {duration(progress.seconds)}",
        kind=recipe.kind,
        lead=lead,
        tiles=[
            (score_text("wer", values["wer"]), "word error rate"),
            (score_text("cer", values["cer"]), "letter error rate"),
            (f"{values['validation_loss']:.2f}", "validation loss of a clip"),
        ],
        config=tree(recipe),
        history=read_metrics(folder / "metrics.jsonl"),
        panels=[*comparison_panel(folder), *_panels(found, recipe.modalities[name], validation, recipe)],
        facts=facts(
            recipe.train, device, update=progress.update, seconds=progress.seconds,
            parameters=sum(parameter.numel() for parameter in task.parameters()),
        ),
    )  # fmt: skip
    write_report(path, report)
    table = Table(caption=f"{len(found):,} validation clips, weights of update {update:,}", caption_justify="left")
    for heading in ("word error rate", "letter error rate", "validation loss", "transcripts too long"):
        table.add_column(heading, justify="right")
    row = [
        score_text("wer", values["wer"]),
        score_text("cer", values["cer"]),
        f"{values['validation_loss']:.3f}",
        str(too_long),
    ]
    table.add_row(*row)
    return table


def _lead(found: Sequence[Transcript], values: Mapping[str, float], update: int, last: int) -> str:
    """The result in a sentence or two."""
    words = sum(len(one.said.split()) for one in found)
    best = "" if update == last else f" by the weights of update {update:,}, the best of {last:,}"
    lead = (
        f"{score_text('wer', values['wer'])} of {words:,} words in {len(found):,} clips are heard wrongly{best}, "
        f"and {score_text('cer', values['cer'])} of the letters, by the likeliest letter of each frame alone."
    )
    too_long = sum(one.too_long for one in found)
    if too_long:
        lead += f" {too_long} transcripts are longer than their clips have frames."
    return lead


def _panels(
    found: Sequence[Transcript], modality: Modality, validation: EvaluationData, recipe: Recognition
) -> list[Panel]:
    """The clips with the most wrong words, and clips from the middle of all."""
    order = sorted(found, key=lambda one: one.word_errors / max(1, len(one.said.split())))
    worst, middle = order[::-1][:_WORST], len(order) // 2
    typical = order[max(0, middle - _TYPICAL // 2) : middle + _TYPICAL // 2]
    keys = [one.key for one in (*worst, *typical)]
    cards = shown_samples(modality, validation, keys, recipe.evaluation.batch)
    caption = "Above what was said, below what was heard: words in red are wrong, in grey missing, in yellow too many."
    return [
        Panel("The worst transcripts", caption, "".join(_card(one, cards) for one in worst)),
        Panel("Transcripts from the middle", caption, "".join(_card(one, cards) for one in typical)),
    ]


def _card(one: Transcript, cards: dict[str, str]) -> str:
    style = "display:grid;grid-template-columns:minmax(180px,320px) 1fr;gap:18px;align-items:center;margin:0 0 18px"
    words = f'<div style="overflow-x:auto">{aligned(one.said, one.heard)}</div>'
    return f'<div style="{style}"><div>{cards.get(one.key, "")}</div>{words}</div>'


def aligned(said: str, heard: str) -> str:
    """Two transcripts as a table, the words that belong together one above the other."""
    words = jiwer.process_words([said], [heard])
    above: list[str] = []
    below: list[str] = []
    for chunk in words.alignments[0]:
        left = said.split()[chunk.ref_start_idx : chunk.ref_end_idx]
        right = heard.split()[chunk.hyp_start_idx : chunk.hyp_end_idx]
        colour = {"substitute": _WRONG, "delete": _MISSING, "insert": _ADDED}.get(chunk.type, "inherit")
        for place in range(max(len(left), len(right))):
            above.append(_cell(left, place, _MISSING if chunk.type == "delete" else "inherit"))
            below.append(_cell(right, place, colour))
    rows = "".join(f"<tr>{''.join(cells)}</tr>" for cells in (above, below))
    return f'<table style="width:auto">{rows}</table>'


def _cell(words: Sequence[str], place: int, colour: str) -> str:
    word = html.escape(words[place]) if place < len(words) else "–"  # noqa: RUF001
    return f'<td style="text-align:left;color:{colour};padding:2px 8px">{word}</td>'
