"""kNN and linear probes against scikit-learn on its digits; pooling; the table."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from data2vec.core.batch import Batch
from data2vec.core.errors import ConfigError, DataError
from data2vec.core.evaluation.embedding import embedding_map
from data2vec.core.evaluation.features import Pooled, extract, extract_all
from data2vec.core.evaluation.knn import TEMPERATURE, knn_accuracy, knn_predict, nearest
from data2vec.core.evaluation.linear import few_labels, fit_linear, linear_accuracy
from data2vec.core.evaluation.probe import EvaluationResult, evaluate
from data2vec.core.settings.pretraining import EvaluationConfig


@pytest.fixture(scope="module")
def digits() -> tuple[Pooled, Pooled]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[:1200]
    x = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    y = torch.tensor(data.target).long()[order]
    return Pooled(x[:900], y[:900]), Pooled(x[900:], y[900:])


def _batches(x: torch.Tensor, size: int) -> list[Batch]:
    return [
        Batch("toy", part, torch.arange(len(part)), torch.arange(len(part)), keys=("k",) * len(part))
        for part in x.split(size)
    ]


def test_knn_votes_as_scikit_learn_with_the_same_weights(digits: tuple[Pooled, Pooled]) -> None:
    train, test = digits
    reference = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / TEMPERATURE))
    reference.fit(train.x.numpy(), train.labels.numpy())
    expected = reference.predict(test.x.numpy())
    assert (knn_predict(train, test.x, k=20).numpy() == expected).mean() > 0.99


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 9), st.integers(1, 300))
def test_tiles_do_not_change_the_neighbours(queries: int, rows: int, k: int, cells: int) -> None:
    generator = torch.Generator().manual_seed(queries * 1000 + rows)
    a, b = torch.randn(queries, 5, generator=generator), torch.randn(rows, 5, generator=generator)
    k = min(k, rows)
    values, index = nearest(a, b, k, max_cells=cells)
    expected = (a @ b.T).topk(k, dim=1)
    torch.testing.assert_close(values, expected.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((a.unsqueeze(1) * b[index]).sum(-1), values, rtol=1e-5, atol=1e-5)


def test_linear_probe_finds_the_minimum_that_scikit_learn_finds(digits: tuple[Pooled, Pooled]) -> None:
    train, test = digits
    probe = fit_linear(train, seed=0)
    standard = ((train.x - probe.mean) / probe.scale).numpy()
    reference = LogisticRegression(C=1 / (probe.l2 * len(train)), max_iter=2000, tol=1e-6)
    reference.fit(standard, train.labels.numpy())
    expected = reference.predict_proba(((test.x - probe.mean) / probe.scale).numpy())
    found = probe.logits(test.x).softmax(dim=1).numpy()
    assert np.abs(found - expected).max() < 0.02
    assert linear_accuracy(train, test) == pytest.approx(reference.score(
        ((test.x - probe.mean) / probe.scale).numpy(), test.labels.numpy()), abs=0.01)  # fmt: skip


def test_linear_probe_with_more_dimensions_than_samples(digits: tuple[Pooled, Pooled]) -> None:
    train, test = digits
    few = few_labels(train, 40, seed=1)
    assert len(few) == 40 < few.x.shape[1]
    assert torch.bincount(few.labels).tolist() == [4] * 10
    assert linear_accuracy(few, test) > 0.6


def test_probes_are_deterministic(digits: tuple[Pooled, Pooled]) -> None:
    train, _ = digits
    small = few_labels(train, 100, seed=3)
    assert torch.equal(few_labels(train, 100, seed=3).x, small.x)
    assert not torch.equal(few_labels(train, 100, seed=4).x, small.x)
    assert torch.equal(fit_linear(small, seed=5).weight, fit_linear(small, seed=5).weight)


@pytest.mark.parametrize(
    ("labels", "message"),
    [([1, 1, 1, 1], "class 1"), ([0, 1, 2, 3], "too few"), ([0, 1, -1, 1], "needs a label"), ([], "no labelled")],
)
def test_linear_probe_names_what_is_wrong(labels: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit_linear(Pooled(torch.randn(len(labels), 3), torch.tensor(labels, dtype=torch.int64)))


def test_a_class_without_training_samples_is_named() -> None:
    train = Pooled(torch.randn(8, 3), torch.tensor([0, 1] * 4))
    with pytest.raises(DataError, match="class 7"):
        linear_accuracy(train, Pooled(torch.randn(2, 3), torch.tensor([0, 7])))


@pytest.mark.parametrize("count", [1, 99])
def test_few_labels_refuses_a_count_that_cannot_be_drawn(count: int) -> None:
    with pytest.raises(DataError, match=f"few_labels={count}"):
        few_labels(Pooled(torch.randn(8, 3), torch.tensor([0, 1] * 4)), count, seed=0)


def test_extraction_pools_valid_positions_and_stops_in_time() -> None:
    x = torch.randn(10, 4, 3)
    padding = torch.zeros(4, dtype=torch.bool)
    padding[2:] = True

    def padded(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        values = batch.inputs.clone()
        values[:, 2:] = torch.inf  # what stands on padding must not matter
        return values, padding.expand(len(batch), 4)

    read: list[Batch] = []

    def stream():
        for batch in _batches(x, 4):
            read.append(batch)
            yield batch

    encoders = {"plain": lambda batch: batch.inputs, "padded": padded, "pooled": lambda batch: batch.inputs[:, 0]}
    found = extract_all(encoders, stream(), max_samples=6)
    assert len(read) == 2
    torch.testing.assert_close(found["plain"].x, x[:6].mean(1))
    torch.testing.assert_close(found["padded"].x, x[:6, :2].mean(1))
    torch.testing.assert_close(found["pooled"].x, x[:6, 0])
    assert found["plain"].labels.tolist() == [0, 1, 2, 3, 0, 1]


def test_extraction_refuses_nothing_and_nonsense() -> None:
    with pytest.raises(DataError, match="no samples"):
        extract(lambda batch: batch.inputs, [], max_samples=5)
    with pytest.raises(DataError, match="not finite"):
        extract(lambda batch: batch.inputs / 0, _batches(torch.randn(4, 3), 2), max_samples=5)


def test_table_of_encoders(digits: tuple[Pooled, Pooled]) -> None:
    train, test = digits
    noise = Pooled(torch.randn(900, 8), train.labels), Pooled(torch.randn(300, 8), test.labels)
    lines: list[str] = []
    result = evaluate(
        {"teacher": train, "noise": noise[0]}, {"teacher": test, "noise": noise[1]},
        EvaluationConfig(few_labels=60), lines.append,
    )  # fmt: skip
    teacher, other = result.rows
    assert teacher.knn == knn_accuracy(train, test)
    assert teacher.linear > 0.9 > 0.3 > other.linear
    assert teacher.linear_few < teacher.linear
    assert 1 <= other.rank <= 8
    assert EvaluationResult.from_json(json.loads(json.dumps(result.to_json()))) == result
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result.to_rich())
    assert "teacher" in console.export_text()
    assert any(line.startswith("noise") for line in lines)


def test_without_labels_only_the_rank_is_given() -> None:
    blind = Pooled(torch.randn(40, 4), torch.full((40,), -1))
    result = evaluate({"teacher": blind}, {"teacher": blind}, EvaluationConfig())
    assert result.rows[0].knn is None
    assert result.rows[0].rank > 1
    assert "no labels" in result.notes[0]


def test_what_cannot_be_probed_is_noted() -> None:
    one = Pooled(torch.randn(40, 4), torch.zeros(40, dtype=torch.int64))
    result = evaluate({"teacher": one}, {"teacher": one}, EvaluationConfig(few_labels=20))
    assert result.rows[0].linear is None
    assert result.rows[0].knn == 1.0
    assert any("class 0" in note for note in result.notes)


def test_an_unknown_task_names_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="knn, linear, rank"):
        evaluate({}, {}, EvaluationConfig(tasks=("knnn",)))


def test_embedding_map_is_repeatable_and_survives_odd_input(digits: tuple[Pooled, Pooled]) -> None:
    train, _ = digits
    one = embedding_map(train.x, train.labels, max_points=60, seed=2)
    two = embedding_map(train.x, train.labels, max_points=60, seed=2)
    assert one.points.shape == (60, 2)
    assert torch.equal(one.points, two.points)
    assert embedding_map(train.x[:12], train.labels[:12]).method == "PCA"
    for odd in (torch.zeros(5, 3), torch.randn(1, 3), torch.randn(5, 1)):
        points = embedding_map(odd, torch.full((len(odd),), -1)).points
        assert points.shape == (len(odd), 2)
        assert points.isfinite().all()
