"""Mutated configurations and overrides: one clear error, and nothing else happens."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data2vec.core import Experiment
from data2vec.core.errors import ConfigError
from data2vec.core.settings.overrides import apply_overrides, flatten, from_yaml, to_yaml, tree, validate
from data2vec.core.testing import load_module

HERE = Path(__file__).parent
guard = load_module("fuzz_guard", HERE / "guard.py")
mutations = load_module("fuzz_mutations", HERE / "mutations.py")
material = load_module("fuzz_material", HERE / "material.py")

Rng = np.random.Generator
Place, fuzz = material.Place, material.fuzz
pick, scenarios = material.pick, material.scenarios
YAML_TOKENS = mutations.YAML_TOKENS


def plain_text(rng: Rng, content: Any) -> str:
    """JSON is YAML; block style where the values allow it."""
    text = json.dumps(content, ensure_ascii=bool(rng.integers(2)))
    if rng.random() < 0.5 and isinstance(content, dict):
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in content.items())
    return text


def test_configurations(request: pytest.FixtureRequest, place: Place) -> None:
    experiments = [scenarios.scenario(name) for name in ("vision", "vision_v2", "speech", "text_v2", "alternating")]
    yaml_tokens = [token.replace("SENTINEL", str(place.evil.sentinel)) for token in YAML_TOKENS]

    def override(rng: Rng, experiment: Experiment) -> str:
        key = pick(rng, list(flatten(tree(experiment))))
        value = pick(
            rng, (pick(rng, yaml_tokens), str(mutations.any_value(rng))[:5000], json.dumps(mutations.any_value(rng)))
        )
        if rng.random() < 0.1:
            return str(
                pick(rng, (key, f"={value}", f"{key[:-1]}={value}", f"{key}.a={value}", value, f"{key}[0]={value}"))
            )
        return f"{key}={value}"

    def case(rng: Rng) -> Any:
        place.fresh()
        experiment = pick(rng, experiments)
        overrides = [override(rng, experiment) for _ in range(int(rng.integers(1, 4)))]
        way = int(rng.integers(4))
        if way == 0:
            text = mutations.text_mutation(rng, to_yaml(experiment), yaml_tokens)
        elif way == 1:
            content = tree(experiment)
            for _ in range(int(rng.integers(1, 4))):
                content = mutations.change(rng, content)
            text = plain_text(rng, content)
        else:
            text = to_yaml(experiment)

        again = rng.random() < 0.2  # reading back takes as long as all the rest

        def run() -> Experiment:
            found = experiment
            if way < 2 or again:
                found = from_yaml(text) if way < 3 else written(place.run / "config.yaml", text)
            if way >= 2:
                found = apply_overrides(found, overrides)
            validate(found)
            if again:
                assert from_yaml(to_yaml(found)) == found
            return found

        return guard.guarded(run, place.run, (ConfigError,))

    def written(path: Path, text: str) -> Experiment:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return from_yaml(path)

    outcomes = fuzz(request, "configurations", place, case)
    valid = sum(outcome.value is not None for outcome in outcomes)
    assert valid > len(outcomes) // 50 or len(outcomes) < 100


def test_a_pipe_for_a_configuration(place: Place) -> None:
    path = place.run / "config.yaml"
    os.mkfifo(path)
    outcome = guard.guarded(lambda: from_yaml(path), place.run, (ConfigError,))
    assert "is no regular file" in str(outcome.error)
