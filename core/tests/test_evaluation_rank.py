"""Properties of the effective rank."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data2vec.core.evaluation.rank import effective_rank, spread


def _random(n: int, d: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(100 * n + d), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.floats(-100, 100))
def test_bounds_and_scale(n: int, d: int, exponent: float) -> None:
    x = _random(n, d)
    rank = effective_rank(x)
    assert 1 - 1e-6 <= rank <= min(n, d) + 1e-6
    assert effective_rank(x * 10**exponent) == pytest.approx(rank, rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(0, 30))
def test_orthonormal_columns_have_full_rank(d: int, extra: int) -> None:
    q = torch.linalg.qr(_random(d + extra, d)).Q
    assert effective_rank(q) == pytest.approx(d, rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 20), st.integers(2, 20))
def test_matches_the_definition_by_singular_values(n: int, d: int) -> None:
    x = _random(n, d)
    p = torch.linalg.svdvals(x)
    p = p / p.sum()
    assert effective_rank(x) == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-5)


def test_collapse_is_rank_one_and_nothing_is_zero() -> None:
    assert effective_rank(torch.ones(50, 8)) == pytest.approx(1.0, abs=1e-4)
    assert effective_rank(torch.zeros(50, 8)) == 0.0


def test_spread_of_each_dimension() -> None:
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert spread(x).tolist() == [1.0, 0.0]
