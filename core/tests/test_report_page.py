"""The report: self-contained, escaped, and whole with pieces missing."""

import base64
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from data2vec.core.evaluation.embedding import Embedding
from data2vec.core.evaluation.probe import EvaluationResult, Row
from data2vec.core.exhibit import Panel
from data2vec.core.report.figures import series
from data2vec.core.report.page import Report, write_report
from data2vec.core.report.pictures import figure_svg, gallery, image, png

HOSTILE = "<script>alert('x')</script>\"onload=$\\frac{&"
VOID = {"meta", "img", "br", "link", "input"}


class _Page(HTMLParser):
    """Collects tags and attributes, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _history(count: int) -> list[dict[str, float]]:
    return [
        {"update": 10 * u, "loss": 1 / (u + 1), "target_spread": 0.5, "prediction_spread": 0.4, "learning_rate": 1e-3,
         "gradient_norm": 1.0 + u % 3, "teacher_decay": 0.99, "samples_per_second": 900.0, "data_wait": 0.01}
        for u in range(1, count + 1)
    ]  # fmt: skip


def _evaluation(name: str = "random encoder") -> EvaluationResult:
    rows = (Row("teacher", 8, 0.583, 0.5, 0.012, 0.7, 5.5), Row(name, 8, 0.391, 0.4, 0.01, 0.6, 3.0))
    return EvaluationResult(rows, 20, 200, 4000, 1000, 10, 0.11, (f"note {name}",))


def _write(folder: Path, report: Report) -> tuple[str, _Page]:
    path = folder / "deep" / "report.html"
    write_report(path, report)
    text = path.read_text(encoding="utf-8")
    return text, _Page(text)


def _full(text: str) -> Report:
    labels = torch.tensor([0, 1, -1])
    return Report(
        text, text, {text: {text: text, "nested": {text: (1, text)}}, "plain": None}, _history(700),
        {"target_spread": 0.05}, _evaluation(text), (Panel(text, text, gallery([[("", text)]], columns=4)),),
        Embedding(torch.randn(3, 2), labels, (text, text), text), {text: text},
    )  # fmt: skip


def test_page_is_self_contained_and_has_every_section(tmp_path: Path) -> None:
    text, page = _write(tmp_path, _full("plain"))
    for heading in ("What the features are worth", "Training", "Map of the features", "The run", "Settings"):
        assert heading in page.text
    assert "19.2 points above plain (39.1 %)" in page.text
    addresses = [value for name, value in page.attributes if name in {"src", "href", "srcset", "action", "data"}]
    assert len(addresses) >= 8
    assert all(address.startswith("data:image/") for address in addresses)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert "@import" not in text
    assert "url(" not in text


def test_hostile_names_are_shown_not_run(tmp_path: Path) -> None:
    text, page = _write(tmp_path, _full(HOSTILE))
    assert "<script" not in text
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE in page.text


@pytest.mark.parametrize(
    "report",
    [
        Report("empty"),
        Report("one line", history=_history(1)),
        Report("no labels", evaluation=EvaluationResult((Row("teacher", 8, rank=3.0),), 20, 200, 10, 0, notes=("n",))),
        Report("no teacher", evaluation=EvaluationResult((Row("other", 8, knn=0.5),), 20, 200, 10, 5)),
        Report("no rows", evaluation=EvaluationResult((), 20, 200, 0, 0)),
        Report("bad numbers", history=[{"update": 1, "loss": math.nan, "learning_rate": "x"}, {"loss": 2.0}, {}]),
        Report("many classes", embedding=Embedding(torch.randn(60, 2), torch.arange(60))),
        Report("zero gradient", history=[{"update": u, "gradient_norm": 0.0} for u in range(40)]),
    ],
    ids=lambda report: report.title,
)
def test_page_is_whole_with_pieces_missing(tmp_path: Path, report: Report) -> None:
    _, page = _write(tmp_path, report)
    assert page.tags.count("h1") == 1
    assert report.title in page.text


def test_worse_than_a_reference_is_said(tmp_path: Path) -> None:
    rows = (Row("teacher", 8, knn=0.5), Row("raw pixels", 9, knn=0.9))
    _, page = _write(tmp_path, Report("r", evaluation=EvaluationResult(rows, 20, 200, 10, 5)))
    assert "40.0 points below raw pixels (90.0 %)" in page.text


def test_an_older_page_is_replaced(tmp_path: Path) -> None:
    _write(tmp_path, Report("an older run"))
    _, page = _write(tmp_path, Report("a newer run"))
    assert "an older run" not in page.text
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_a_resumed_run_counts_each_update_once() -> None:
    x, y = series([{"update": 2, "loss": 1.0}, {"update": 1, "loss": 3.0}, {"update": 2, "loss": 0.5}], "loss")
    assert x.tolist() == [1, 2]
    assert y.tolist() == [3.0, 0.5]


def test_png_round_trip() -> None:
    from io import BytesIO

    from matplotlib.image import imread

    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    kind, _, data = png(picture).partition(",")
    assert kind == "data:image/png;base64"
    decoded = imread(BytesIO(base64.b64decode(data)), format="png")[..., :3]
    assert np.array_equal((decoded * 255).round().astype(np.uint8), picture)
    grey = imread(BytesIO(base64.b64decode(png(picture[:, :, 0]).partition(",")[2])), format="png")
    assert np.array_equal((grey[..., 1] * 255).round().astype(np.uint8), picture[:, :, 0])


@pytest.mark.parametrize("shape", [(3,), (4, 4, 4), (1, 4, 4, 3)])
def test_png_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="uint8"):
        png(np.zeros(shape, dtype=np.uint8))


def test_figures_are_the_same_each_time() -> None:
    from matplotlib.figure import Figure

    def draw() -> str:
        figure = Figure(figsize=(2, 1))
        figure.add_subplot().plot([1, 2])
        return figure_svg(figure)

    assert draw() == draw()
    assert image(draw(), 'a "quoted" name').count('"') % 2 == 0
