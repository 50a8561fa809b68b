"""Overrides, configuration files and the checks on settings."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data2vec.core.errors import ConfigError
from data2vec.core.settings.fields import NormOrder, OptimConfig, Schedule, Switch, TransformerConfig
from data2vec.core.settings.overrides import apply_overrides, differences, flatten, from_yaml, to_yaml, tree, validate
from data2vec.core.settings.pretraining import Experiment, TargetsConfig
from data2vec.core.settings.tree import dump
from data2vec.core.testing import load_module

made = load_module("toy_settings", Path(__file__).with_name("toy_settings.py"))
BASE, Kind, Toy, ToyMask, override, toy = made.BASE, made.Kind, made.Toy, made.ToyMask, made.override, made.toy


def problems_of(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        override(*overrides)
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("optim.betas=[0.9,0.95]", "optim.betas", (0.9, 0.95)),
        ("optim.betas=[0, 0.95]", "optim.betas", (0.0, 0.95)),
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("optim.lr=1", "optim.lr", 1.0),
        ("optim.clip=3", "optim.clip", 3.0),
        ("optim.clip=null", "optim.clip", None),
        ("optim.schedule=tri_stage", "optim.schedule", Schedule.TRI_STAGE),
        ("transformer.norm_order=post", "transformer.norm_order", NormOrder.POST),
        ("train.updates=1e5", "train.updates", 100_000),
        ("train.updates=400_000", "train.updates", 400_000),
        ("train.compile=on", "train.compile", Switch.ON),
        ("train.compile=off", "train.compile", Switch.OFF),
        ("train.activation_checkpointing=true", "train.activation_checkpointing", True),
        ("train.activation_checkpointing=off", "train.activation_checkpointing", False),
        ("train.micro_batch=16", "train.micro_batch", 16),
        ("data.train=/x/train-{0000..0999}.tar", "data.train", "/x/train-{0000..0999}.tar"),
        ("data.train={0..3}.tar", "data.train", "{0..3}.tar"),
        ("data.train='{0..3}.tar'", "data.train", "{0..3}.tar"),
        ("data.train=https://host/a b#c: d=e.tar", "data.train", "https://host/a b#c: d=e.tar"),
        ("data.train=null", "data.train", None),
        ("data.train='null'", "data.train", "null"),
        ("data.train='unclosed", "data.train", "'unclosed"),
        ("name=1e5", "name", "1e5"),
        ("name=on", "name", "on"),
        ("name=null", "name", "null"),
        ("evaluation.layers=7", "evaluation.layers", "7"),
        ("evaluation.tasks=[knn,rank]", "evaluation.tasks", ("knn", "rank")),
        ("evaluation.tasks=[]", "evaluation.tasks", ()),
        ("toy_settings.mask.kind=inverse_block", "toy_settings.mask.kind", Kind.INVERSE),
        ("toy_settings.mask.spans=[1,2,3]", "toy_settings.mask.spans", (1, 2, 3)),
        ("toy_settings.layers=[[10,0.1],[3,2]]", "toy_settings.layers", ((10, 0.1), (3, 2.0))),
        ("toy_settings.kinds=[block,inverse_block]", "toy_settings.kinds", (Kind.BLOCK, Kind.INVERSE)),
        ("toy_settings.predictor.width=384", "toy_settings.predictor.width", 384),
    ],
)
def test_a_value_gets_the_declared_type(text: str, key: str, expected: object) -> None:
    value: Any = override(text)
    for part in key.split("."):
        value = value.modalities[part] if part in BASE.modalities else getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)
    assert [changed for changed, _, _ in differences(BASE, override(text))] in ([key], [])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("optim.lr=fast", "optim.lr=fast: expected a number"),
        ("optim.lr=null", "optim.lr=null: expected a number"),
        ("optim.lr=.nan", "optim.lr=.nan: expected a number"),
        ("optim.lr=inf", "optim.lr=inf: expected a number"),
        ("optim.lr=[1]", "optim.lr=[1]: expected a number"),
        ("optim.lr=", "optim.lr=: expected a number"),
        ("optim.lr={a: 1}", "optim.lr={'a': 1}: expected a number"),
        ("optim.clip=x", "optim.clip=x: expected a number or null"),
        ("train.updates=1.5", "train.updates=1.5: expected a whole number"),
        ("train.updates=true", "train.updates=true: expected a whole number"),
        ("train.micro_batch=many", "train.micro_batch=many: expected a whole number or null"),
        ("train.activation_checkpointing=2", "train.activation_checkpointing=2: expected true or false"),
        ("transformer.norm_order=PRE", "transformer.norm_order=PRE: expected one of pre, post"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: expected a list of 2: a number, a number"),
        ("optim.betas=0.9", "optim.betas=0.9: expected a list of 2: a number, a number"),
        ("evaluation.tasks=knn", "evaluation.tasks=knn: expected a list, each text"),
        ("toy_settings.kinds=[round]", "toy_settings.kinds=[round]: expected a list, each one of block, inverse_block"),
        ("name=???", "name=???: expected text"),
        ("data.train=${oc.env:HOME}/x", "data.train=${oc.env:HOME}/x: ${...} is not supported; write the value out"),
        ("optim.lrr=1", "optim.lrr=1: no such setting; did you mean optim.lr?"),
        ("lr=1", "lr=1: no such setting; did you mean optim.lr?"),
        ("mask.ratio=1", "mask.ratio=1: no such setting; did you mean toy_settings.mask.ratio?"),
        ("toy_settings.mask.rat=1", "toy_settings.mask.rat=1: no such setting; did you mean toy_settings.mask.ratio?"),
        ("zzzzzz=1", "zzzzzz=1: no such setting; --print-config lists them all"),
        ("transformer=3", "transformer=3: a group of settings; set one of them, such as transformer.depth"),
        ("modalities=3", "modalities=3: no such setting"),
        ("optim.lr", "optim.lr: not of the form key=value"),
        ("=3", "=3: not of the form key=value"),
    ],
)
def test_a_wrong_override_is_one_clear_problem(text: str, problem: str) -> None:
    found = problems_of(text)
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_all_problems_of_a_command_line_are_reported_together() -> None:
    found = problems_of("optim.lr=fast", "optim.lrr=1", "nonsense", "train.seed=1", "train.seed=2", "optim.warmup=x")
    assert found == [
        "optim.lrr=1: no such setting; did you mean optim.lr?",
        "nonsense: not of the form key=value",
        "train.seed: given 2 times",
        "optim.lr=fast: expected a number",
        "optim.warmup=x: expected a whole number",
    ]


def test_nothing_is_changed_but_what_was_named() -> None:
    changed = override("optim.lr=0.5", "toy_settings.flip=true")
    assert differences(BASE, changed) == [("toy_settings.flip", False, True), ("optim.lr", 0.0005, 0.5)]
    assert override() == BASE
    assert type(changed) is Experiment
    assert toy(changed).flip


def test_differences_name_settings_that_only_one_side_has() -> None:
    found = differences(BASE, Experiment(name="base"))
    assert ("toy_settings.mask.ratio", 0.6, None) in found
    assert all(key.startswith("toy_settings.") for key, _, _ in found)


def test_tree_is_plain_and_flatten_keeps_its_order() -> None:
    plain = tree(BASE)
    assert list(plain)[:3] == ["name", "toy_settings", "student_sees"]
    assert plain["toy_settings"]["mask"] == {"kind": "block", "ratio": 0.6, "spans": [4, 8]}
    assert type(plain["toy_settings"]["mask"]["kind"]) is str
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2], "e": {}}


LEAVES = flatten(tree(BASE))


@pytest.mark.parametrize("key", LEAVES)
def test_every_setting_accepts_its_own_printed_value(key: str) -> None:
    assert override(f"{key}={dump(LEAVES[key]).strip()}") == BASE


def finite(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_infinity=False)


TEXT = st.text(max_size=30).filter(lambda text: "${" not in text and text != "???")


@st.composite
def experiments(draw: st.DrawFn) -> Experiment:
    depth, heads = draw(st.integers(1, 48)), draw(st.integers(1, 16))
    updates = draw(st.integers(10, 10**7))
    mask = ToyMask(draw(st.sampled_from(Kind)), draw(finite(0, 1)), tuple(draw(st.lists(st.integers(), max_size=4))))
    modality = Toy(
        mask=mask,
        layers=tuple(draw(st.lists(st.tuples(st.integers(), finite(-1e9, 1e9)), max_size=3))),
        kinds=tuple(draw(st.lists(st.sampled_from(Kind), max_size=3))),
        label=draw(TEXT),
        maximum=draw(st.none() | st.integers(max_value=1)),
        flip=draw(st.booleans()),
    )
    return Experiment(
        name=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
        modalities={"toy_settings": modality},
        transformer=TransformerConfig(
            depth=depth,
            width=heads * draw(st.integers(1, 64)),
            heads=heads,
            norm_order=draw(st.sampled_from(NormOrder)),
            layer_scale=draw(st.none() | finite(1e-30, 1)),
        ),
        targets=TargetsConfig(top_k=draw(st.integers(1, depth))),
        optim=OptimConfig(lr=draw(finite(1e-300, 1e300)), warmup=draw(st.integers(0, updates))),
        data=dataclasses.replace(
            BASE.data, train=draw(st.none() | TEXT.filter(str.strip)), max_broken=draw(finite(0, 1))
        ),
        train=dataclasses.replace(BASE.train, updates=updates, compile=draw(st.sampled_from(Switch))),
    )


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(experiments())
def test_yaml_round_trip(experiment: Experiment) -> None:
    validate(experiment)
    text = to_yaml(experiment)
    again = from_yaml(text)
    assert again == experiment
    assert to_yaml(again) == text
    assert differences(experiment, again) == []


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(experiments())
def test_printed_values_of_any_experiment_are_overrides(experiment: Experiment) -> None:
    overrides = [f"{key}={dump(value).removesuffix(chr(10))}" for key, value in flatten(tree(experiment)).items()]
    assert apply_overrides(BASE, overrides) == experiment


def test_yaml_is_read_from_a_file_and_settings_left_out_keep_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("name: small\noptim: {lr: 1e-4}\ntrain: {compile: on}\ntoy_settings:\n  mask:\n    ratio: 1\n")
    read = from_yaml(path)
    assert read.name == "small"
    assert read.optim == OptimConfig(lr=1e-4)
    assert read.train.compile is Switch.ON
    assert toy(read) == Toy(mask=ToyMask(ratio=1.0))


def test_problems_of_a_file_are_reported_together() -> None:
    text = "optim: {lr: fast, lrr: 1}\ntransfomer: {depth: 3}\nsmell: {}\nname: 1.5\nmodalities: {}\ntoy_settings: 3\n"
    with pytest.raises(ConfigError) as caught:
        from_yaml(text)
    assert caught.value.problems == [
        "transfomer: no such setting; did you mean transformer?",
        "smell: no such modality is installed (no package data2vec.smell defines it)",
        "modalities: a modality's settings stand at the top level under its name",
        "optim.lrr=1: no such setting; did you mean optim.lr?",
        "toy_settings=3: a group of settings; set one of them, such as toy_settings.mask.kind",
        "optim.lr=fast: expected a number",
        "name=1.5: expected text",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.mkdir [DIRECTORY]", "tag"),
        ("name: !!python/object/apply:os.mkdir [DIRECTORY]", "tag"),
        ("name: !!python/object/new:os.system ['mkdir DIRECTORY']", "tag"),
        ("name: !!python/name:os.system", "tag"),
        ("? !!python/object/apply:os.mkdir [DIRECTORY]\n: 1", "tag|single word"),
        ("name: !anything x", "tag"),
        ("name: !!str x", "tag"),
        ("%TAG ! tag:yaml.org,2002:python/\n---\nname: !name:os.system", "tag"),
        ("name: ${oc.env:HOME}", "not supported"),
        ("${oc.env:HOME}: 1", "not supported"),
        ("evaluation: {tasks: ['${name}']}", "not supported"),
        ("a: &a [1]\nb: [*a, *a]", "anchors"),
        ("optim: {lr: 1, lr: 2}", "twice"),
        ("name: a\nname: b", "twice"),
        ("--- {}\n--- {}", "second document"),
        ("[" * 100_000, "levels deep"),
        ("{a: " * 100_000, "levels deep"),
        ("train: {seed: " + "9" * 10_000 + "}", "valid YAML|whole number"),
        ("name: [", "valid YAML"),
        ("name: a\x00b", "valid YAML"),
        ("name: \ta: b: c", "valid YAML"),
        ("", "expected settings"),
        ("[]", "expected settings"),
        ("just words", "expected settings"),
        ("optim: null", "a group of settings"),
        ("optim: {lr: {a: 1}}", "expected a number"),
        ("os: {}", "no such modality|did you mean"),
        ("'../x': {}", "no such modality"),
        ("1: {}", "no such modality"),
    ],
)
def test_hostile_yaml_is_refused_and_nothing_happens(text: str, message: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    with pytest.raises(ConfigError, match=message):
        from_yaml(text.replace("DIRECTORY", str(made)))
    assert not os.path.lexists(made)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=" \n-:{}[]&*!?|>'\"%@#,$ab01~.e", max_size=40))
def test_any_text_is_read_or_refused_in_one_way(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(from_yaml(text), Experiment)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(LEAVES)), st.text(max_size=20))
def test_any_override_is_applied_or_refused_in_one_way(key: str, text: str) -> None:
    with contextlib.suppress(ConfigError):
        changed = override(f"{key}={text}")
        assert {name for name, _, _ in differences(BASE, changed)} <= {key}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: cannot be read"):
        from_yaml(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read"):
        from_yaml(tmp_path / "binary.yaml")
