"""The report's figures: training curves and the embedding map, as SVG data URIs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from data2vec.core.evaluation.embedding import Embedding
from data2vec.core.report.pictures import figure_svg

_COLOURS = ("#1f5fae", "#d9822b", "#3a8f5d", "#8c5aa8")
_MOST_POINTS = 600  # of a curve; more would swell the page and not be seen
STYLE: Any = {  # matplotlib types the keys as a Literal of every setting
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "Helvetica", "DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b8c0ca",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff3",
    "grid.linewidth": 0.8,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": "#1b2330",
    "xtick.color": "#5d6775",
    "ytick.color": "#5d6775",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class _Curve:
    """One chart: its title, what to say below it, and the metrics in it with their names."""

    title: str
    caption: str
    keys: Mapping[str, str]
    log: bool = False
    percent: bool = False
    smooth: bool = False
    from_zero: bool = False


_COMMON_TITLES = ("Learning rate", "Gradient norm", "Throughput", "Waiting for data")
_CURVES = (
    _Curve("Loss", "Regression of the teacher's targets at masked positions.", {"loss": "loss"}, smooth=True),
    _Curve(
        "Spread",
        "Standard deviation of targets and predictions. Near zero is collapse: the run stops below the dashed lines.",
        {"target_spread": "targets", "prediction_spread": "predictions"},
        from_zero=True,
    ),
    _Curve(
        "Effective rank of the teacher",
        "Dimensions in use; a fall towards 1 is an early sign of collapse.",
        {"teacher_rank": "rank"},
        from_zero=True,
    ),
    _Curve(
        "kNN accuracy",
        "Of the frozen features, measured while training.",
        {"teacher_knn": "teacher", "student_knn": "student"},
        percent=True,
    ),
    _Curve("Learning rate", "As the schedule set it.", {"learning_rate": "rate"}, from_zero=True),
    _Curve("Teacher decay", "Share of the old teacher that each update keeps.", {"teacher_decay": "decay"}),
    _Curve("Gradient norm", "Before clipping; logarithmic.", {"gradient_norm": "norm"}, log=True, smooth=True),
    _Curve(
        "Extractor spread",
        "Standard deviation of the feature extractor's output.",
        {"extractor_spread": "spread"},
        from_zero=True,
    ),
    _Curve("Throughput", "Samples per second.", {"samples_per_second": "samples/s"}, smooth=True, from_zero=True),
    _Curve(
        "Waiting for data",
        "Share of the time that training stood still for the next batch.",
        {"data_wait": "share"},
        percent=True,
        smooth=True,
        from_zero=True,
    ),
)


_TUNING = (
    _Curve(
        "Loss", "Of the training samples as they are learnt from, and of the validation samples.",
        {"loss": "training", "validation_loss": "validation"}, smooth=True,
    ),
    _Curve(
        "Accuracy", "Training samples are judged as they are learnt from: augmented and mixed.",
        {"accuracy": "validation", "loss_accuracy": "training"}, percent=True, smooth=True,
    ),
    _Curve("Average precision", "Validation samples, the mean over classes.", {"mean_average_precision": "mean"}),
    _Curve("Correlation", "Of the validation samples.", {"pearson": "Pearson", "spearman": "Spearman"}),
    _Curve("Error rates", "Of the validation clips.", {"wer": "words", "cer": "letters"}, percent=True, from_zero=True),
)  # fmt: skip
_COMMON = tuple(curve for curve in _CURVES if curve.title in _COMMON_TITLES)
_BY_KIND = {"pretraining": _CURVES}


def series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Updates and finite values of one metric, in order; of an update logged twice (a resumed run) the last counts."""
    values: dict[int, float] = {}
    for line in history:
        update, value = line.get("update"), line.get(key)
        numbers = isinstance(update, int | float) and isinstance(value, int | float)
        if numbers and math.isfinite(update) and math.isfinite(value):  # type: ignore[arg-type]
            values[int(update)] = float(value)  # type: ignore[arg-type]
    updates = sorted(values)
    return np.array(updates, dtype=np.float64), np.array([values[u] for u in updates], dtype=np.float64)


def curves(
    history: Sequence[Mapping[str, Any]], thresholds: Mapping[str, float], kind: str = "pretraining"
) -> list[tuple[str, str, str]]:
    """(SVG data URI, title, caption) of every chart that has a value.

    Args:
        history: the lines of ``metrics.jsonl``.
        thresholds: values below which the run stops, by metric; drawn as dashed lines.
        kind: of training; it decides which charts there are.
    """
    drawn = []
    for curve in _BY_KIND.get(kind, (*_TUNING, *_COMMON)):
        points = {name: series(history, key) for key, name in curve.keys.items()}
        limits = {name: thresholds[key] for key, name in curve.keys.items() if key in thresholds}
        found = {name: one for name, one in points.items() if len(one[0])}
        if found:
            drawn.append((_chart(curve, found, limits), curve.title, curve.caption))
    return drawn


def _chart(
    curve: _Curve,
    found: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    limits: Mapping[str, float],
) -> str:
    with rc_context(STYLE):
        figure = Figure(figsize=(4.3, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for (name, (x, y)), colour in zip(found.items(), _COLOURS, strict=False):
            x, y = _thin(x), _thin(y)
            if curve.smooth and len(y) >= 30:
                axes.plot(x, y, color=colour, alpha=0.28, linewidth=0.9)
                y = _smooth(y)
            axes.plot(x, y, color=colour, label=name, marker="o" if len(x) == 1 else None, markersize=4)
            if name in limits:
                axes.axhline(limits[name], color=colour, linestyle=(0, (4, 3)), linewidth=0.9)
        axes.set_title(curve.title)
        axes.set_xlabel("update", color="#5d6775")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(x=0.02)
        if curve.log and all((y > 0).all() for _, y in found.values()):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
            plain = FuncFormatter(lambda value, _: f"{value:.6g}")
            axes.yaxis.set_major_formatter(PercentFormatter(1.0) if curve.percent else plain)
            if curve.from_zero:
                axes.set_ylim(bottom=0.0)
        if len(found) > 1:
            axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1.0, 0.98), borderaxespad=0, handlelength=1.2)
        return figure_svg(figure)


def _thin(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most ``_MOST_POINTS`` values, each the mean of neighbours."""
    if len(values) <= _MOST_POINTS:
        return values
    return np.array([part.mean() for part in np.array_split(values, _MOST_POINTS)])


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over a centred window of a twentieth of the curve; at the ends over what there is."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, stop = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    smooth: NDArray[np.float64] = (total[stop] - total[start]) / (stop - start)
    return smooth


def class_colours(labels: Sequence[int]) -> dict[int, str]:
    """A colour for each class; unknown (-1) is grey."""
    known = sorted({label for label in labels if label >= 0})
    if len(known) <= 10:
        palette = [to_hex(colormaps["tab10"](i)) for i in range(len(known))]
    elif len(known) <= 20:
        palette = [to_hex(colormaps["tab20"](i)) for i in range(len(known))]
    else:
        palette = [to_hex(colormaps["hsv"](i / len(known))) for i in range(len(known))]
    return {**dict(zip(known, palette, strict=True)), -1: "#9aa4b1"}


def scatter(embedding: Embedding) -> str:
    """The embedding map as an SVG data URI; no text of the data is in it."""
    points = embedding.points.numpy()
    labels = embedding.labels.tolist()
    colours = class_colours(labels)
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.4), layout="constrained")
        axes = figure.add_subplot()
        size = float(np.clip(9000 / max(len(points), 1), 6, 26))
        axes.scatter(
            points[:, 0], points[:, 1], s=size, c=[colours[max(label, -1)] for label in labels], alpha=0.8, linewidths=0
        )
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_axis_off()
        return figure_svg(figure)
