"""The objective and the spread that shows a collapse, alone and over ranks."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data2vec.core.distributed.ranks import Ranks
from data2vec.core.pretraining.objective import regression_loss
from data2vec.core.task import LOSS, Moments
from data2vec.core.testing import run_distributed
from data2vec.core.training.health import HealthCheck
from data2vec.core.training.monitor import Monitor


def reference_loss(prediction: Tensor, target: Tensor, beta: float, scale: float) -> Tensor:
    """Equation 3 of paper 1, written out in float64; torch's smooth L1 has the same convention."""
    difference = prediction.double() - target.double()
    if beta == 0.0:
        loss = difference.square()
    else:
        small = difference.abs() <= beta
        loss = torch.where(small, 0.5 * difference.square() / beta, difference.abs() - 0.5 * beta)
    return loss.sum(-1) * scale


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 7),
    width=st.integers(1, 9),
    beta=st.sampled_from([0.0, 0.25, 1.0, 2.0]),
    scale=st.sampled_from([None, 0.5, 1.0]),
)
def test_loss_equals_the_formula(seed: int, rows: int, width: int, beta: float, scale: float | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    prediction, target = 2 * torch.randn(2, rows, width, generator=generator)
    loss = regression_loss(prediction, target, beta=beta, scale=scale)
    expected = reference_loss(prediction, target, beta, 1 / math.sqrt(width) if scale is None else scale)
    assert loss.shape == (rows,)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_loss_is_float32_and_has_its_gradient_in_any_precision() -> None:
    prediction = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    loss = regression_loss(prediction, torch.randn(3, 4), beta=1.0, scale=None)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert prediction.grad is not None
    assert prediction.grad.dtype == torch.bfloat16
    assert bool(prediction.grad.abs().sum() > 0)


def spread(x: Tensor) -> Tensor:
    return Moments.of(x).spread()


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31), rows=st.integers(2, 20), width=st.integers(1, 5), offset=st.floats(-1e3, 1e3),
    cut=st.integers(1, 19),
)  # fmt: skip
def test_spread_is_the_standard_deviation_however_the_rows_are_cut(
    seed: int, rows: int, width: int, offset: float, cut: int
) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) + offset
    expected = torch.sqrt(x.double().var(0) + 1e-6).mean()
    torch.testing.assert_close(spread(x).double(), expected, rtol=1e-5, atol=1e-7)
    parts = Moments.of(x[:cut]) + Moments.of(x[cut:])  # of two micro-batches, one of them empty at times
    torch.testing.assert_close(parts.spread().double(), expected, rtol=1e-5, atol=1e-7)


def test_spread_of_a_collapse_and_of_one_row_is_about_zero() -> None:
    assert float(spread(torch.full((8, 3), 5.0))) == pytest.approx(1e-3, rel=1e-4)
    assert float(spread(torch.randn(1, 3))) == pytest.approx(1e-3, rel=1e-4)
    x = torch.randn(4, 3, requires_grad=True)
    assert not spread(x).requires_grad


def _line_of_my_rows(rows: list[Tensor], folder: str) -> dict[str, object]:
    """The log line of an update in which this rank saw its rows."""
    rank = dist.get_rank()
    assert os.environ["RANK"] == str(rank)
    ranks = Ranks(rank, dist.get_world_size())
    monitor = Monitor(Path(folder), HealthCheck((LOSS,), collapse_after=1, warmup=0), ranks=ranks)
    monitor.add(1, {"loss": torch.tensor(1.5 + rank)}, {"target_spread": Moments.of(rows[rank])}, samples=1, waited=0.0)
    line = monitor.flush()
    monitor.close()
    return {"rank": rank, "loss": line["loss"], "spread": line["target_spread"]}


def test_spread_over_ranks_is_that_of_all_rows(tmp_path: Path) -> None:
    """Two ranks that each collapsed to a point of their own have a spread; ranks may hold unequally many rows."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(3, 5, generator=generator) + 4, torch.randn(6, 5, generator=generator)]
    results = run_distributed(_line_of_my_rows, 2, rows, str(tmp_path))
    assert [result["rank"] for result in results] == [0, 1]
    for result in results:
        assert result["loss"] == 4.0
        assert result["spread"] == pytest.approx(float(spread(torch.cat(rows))), rel=1e-6)
        assert result["spread"] > 1.5 * float(spread(rows[0]))


def _first_rank_fails() -> None:
    if dist.get_rank() == 0:
        raise ValueError("rank 0 has a reason")
    dist.barrier()  # would wait for ever


def _sleep() -> None:
    time.sleep(600)


def test_an_error_of_a_rank_and_a_hang_reach_the_caller() -> None:
    with pytest.raises(RuntimeError, match="rank 0 has a reason"):
        run_distributed(_first_rank_fails, 2)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="did not finish"):
        run_distributed(_sleep, 1, timeout=1.0)
    assert time.monotonic() - started < 30
