"""Variants of an experiment state only what differs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data2vec.core.errors import ConfigError
from data2vec.core.settings.fields import OptimConfig, TransformerConfig
from data2vec.core.settings.pretraining import Experiment


@dataclass(frozen=True)
class Inner:
    ratio: float = 0.6
    kind: str = "block"


@dataclass(frozen=True)
class Plain:
    size: int = 32
    inner: Inner = field(default_factory=Inner)


BASE = Experiment(name="base", modalities={"plain": Plain(), "second": Plain(size=8)})


def test_a_dict_changes_only_the_named_fields() -> None:
    large = BASE.replace(name="large", transformer={"depth": 24, "width": 1024}, plain={"inner": {"ratio": 0.75}})
    assert large.name == "large"
    assert large.transformer == TransformerConfig(depth=24, width=1024)
    assert large.modalities == {"plain": Plain(inner=Inner(ratio=0.75)), "second": Plain(size=8)}
    assert large.optim == BASE.optim
    assert BASE.transformer.depth == 12, "the base stays as it was"


def test_a_section_may_be_replaced_whole() -> None:
    assert BASE.replace(optim=OptimConfig(lr=1.0)).optim == OptimConfig(lr=1.0)
    assert BASE.replace(plain=Plain(size=3)).modalities["plain"] == Plain(size=3)


def test_modalities_and_one_of_them_may_change_together() -> None:
    changed = BASE.replace(modalities={"plain": Plain(size=1)}, plain={"inner": {"kind": "span"}})
    assert changed.modalities == {"plain": Plain(size=1, inner=Inner(kind="span"))}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"transformr": {}}, "transformr: no such setting"),
        ({"transformer": {"dept": 3}}, "transformer.dept: no such setting"),
        ({"plain": {"inner": {"ration": 1}}}, "plain.inner.ration: no such setting"),
        ({"third": {}}, "third: no such setting"),
    ],
)
def test_an_unknown_name_is_refused(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BASE.replace(**changes)
    assert caught.value.problems == [problem]


def test_all_unknown_names_of_a_section_are_reported() -> None:
    with pytest.raises(ConfigError) as caught:
        BASE.replace(optim={"a": 1, "b": 2})
    assert caught.value.problems == ["optim.a: no such setting", "optim.b: no such setting"]


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(TransformerConfig)]), st.integers(1, 9)))
def test_replacing_in_one_step_or_many_is_the_same(changes: dict[str, int]) -> None:
    stepwise = BASE
    for key, value in changes.items():
        stepwise = stepwise.replace(transformer={key: value})
    assert BASE.replace(transformer=changes) == stepwise
    assert BASE.replace() == BASE
