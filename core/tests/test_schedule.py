"""The learning rate over updates: warm-up, cosine, tri-stage."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data2vec.core.settings.fields import OptimConfig, Schedule
from data2vec.core.training.schedule import learning_rate

ratios = st.floats(0.0, 1.0)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[OptimConfig, int]:
    schedule = draw(st.sampled_from(Schedule))
    warmup = draw(st.integers(0, 20))
    hold = draw(st.integers(0, 20)) if schedule is Schedule.TRI_STAGE else 0
    updates = warmup + hold + draw(st.integers(1, 60))
    config = OptimConfig(
        lr=draw(st.floats(1e-6, 10.0)), schedule=schedule, warmup=warmup, hold=hold,
        start_lr_ratio=draw(ratios), final_lr_ratio=draw(st.one_of(st.just(0.0), st.floats(1e-3, 1.0))),
    )  # fmt: skip
    return config, updates


@settings(max_examples=100)
@given(schedules())
def test_rises_to_the_full_rate_holds_it_and_falls_to_the_final_one(case: tuple[OptimConfig, int]) -> None:
    config, updates = case
    rates = [learning_rate(config, update, updates) for update in range(updates + 1)]
    peak = config.warmup + config.hold
    tolerance = config.lr * 1e-12
    assert all(0.0 <= rate <= config.lr + tolerance for rate in rates)
    assert all(a <= b + tolerance for a, b in itertools.pairwise(rates[: config.warmup]))
    assert all(a >= b - tolerance for a, b in itertools.pairwise(rates[config.warmup :]))
    assert rates[max(config.warmup - 1, 0) : peak + 1] == pytest.approx(
        [config.lr] * (peak + 1 - max(config.warmup - 1, 0))
    )
    assert rates[updates] == pytest.approx(config.lr * config.final_lr_ratio, abs=tolerance)
    assert learning_rate(config, 3 * updates, updates) == pytest.approx(rates[updates], abs=tolerance)


@settings(max_examples=60)
@given(schedules())
def test_no_step_is_larger_than_its_stage_allows(case: tuple[OptimConfig, int]) -> None:
    """Continuity: the slope of a stage bounds every difference of two neighbouring updates."""
    config, updates = case
    rates = [learning_rate(config, update, updates) / config.lr for update in range(updates + 1)]
    decay = updates - config.warmup - config.hold
    steepest = math.pi / 2 if config.schedule is Schedule.COSINE else max(1.0, -math.log(config.final_lr_ratio or 1.0))
    for update, (a, b) in enumerate(itertools.pairwise(rates)):
        slope = (1 - config.start_lr_ratio) / config.warmup if update + 1 < config.warmup else steepest / decay
        assert abs(b - a) <= slope + 1e-9


def test_known_values() -> None:
    cosine = OptimConfig(lr=2.0, schedule=Schedule.COSINE, warmup=4, start_lr_ratio=0.2, final_lr_ratio=0.1)
    assert [learning_rate(cosine, update, 14) for update in range(5)] == pytest.approx([0.8, 1.2, 1.6, 2.0, 2.0])
    assert learning_rate(cosine, 9, 14) == pytest.approx(2.0 * 0.55)
    assert learning_rate(cosine, 14, 14) == pytest.approx(0.2)
    stages = OptimConfig(lr=2.0, schedule=Schedule.TRI_STAGE, warmup=2, hold=6, final_lr_ratio=0.01)
    assert [learning_rate(stages, update, 18) for update in range(9)] == pytest.approx([1.0, *[2.0] * 8])
    assert learning_rate(stages, 13, 18) == pytest.approx(0.2)
    assert learning_rate(stages, 18, 18) == pytest.approx(0.02)
    to_zero = OptimConfig(lr=2.0, schedule=Schedule.TRI_STAGE, final_lr_ratio=0.0)
    assert [learning_rate(to_zero, update, 4) for update in range(5)] == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])


def test_warm_up_as_long_as_the_run() -> None:
    config = OptimConfig(lr=1.0, warmup=5)
    assert [learning_rate(config, update, 5) for update in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
