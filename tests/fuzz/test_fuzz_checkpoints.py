"""Mutated checkpoints: what is restored can go on, or one clear error changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data2vec.core.checkpoints import checkpoint
from data2vec.core.errors import CheckpointError, ConfigError
from data2vec.core.run.load import load_run
from data2vec.core.settings.overrides import to_yaml
from data2vec.core.testing import load_module

HERE = Path(__file__).parent
guard = load_module("fuzz_guard", HERE / "guard.py")
mutations = load_module("fuzz_mutations", HERE / "mutations.py")
safetensors_files = load_module("fuzz_safetensors_files", HERE / "safetensors_files.py")
material = load_module("fuzz_material", HERE / "material.py")
training = load_module("fuzz_trained", HERE / "trained.py")

Rng = np.random.Generator
Place, fuzz = material.Place, material.fuzz
Trained, continues, pick, put = training.Trained, training.continues, material.pick, material.put


STATE_TOKENS = (
    *mutations.INDEX_TOKENS,
    '"../../model.safetensors"',
    '"update": -1,',
    '"update": 1e3,',
    '"world": 0,',
    "1e400",
    "Infinity",
)


def mutate_checkpoint(rng: Rng, files: dict[str, bytes], evil: Any) -> dict[str, bytes]:
    files = dict(files)
    for _ in range(int(rng.choice((1, 1, 2)))):
        tensors = [name for name in files if name.endswith(".safetensors") and name != "state.json"]
        match int(rng.integers(8)):
            case 0 | 1 | 2:
                content = json.loads(files["state.json"])
                short = shorter(content) if rng.random() < 0.9 else content
                for _ in range(int(rng.choice((1, 1, 2)))):
                    short = mutations.change(rng, short)
                files["state.json"] = json.dumps(restored(short)).encode()
            case 3:
                text = mutations.text_mutation(rng, files["state.json"].decode(), STATE_TOKENS)
                files["state.json"] = text.encode("utf-8", "surrogatepass")
                return files
            case 4 if tensors:
                first, second = pick(rng, tensors), pick(rng, tensors)
                files[first], files[second] = files[second], files[first]
            case 5 if tensors:
                name = pick(rng, tensors)
                files[
                    str(pick(rng, (name.replace("2", "3"), f"../{name}", name.replace("model", "optimiser"), "x.pt")))
                ] = files[name]
            case _ if tensors:
                name = pick(rng, tensors)
                try:
                    files[name] = safetensors_files.safetensors(rng, files[name], evil)
                except Exception:  # an earlier mutation left no header
                    files[name] = mutations.flip(rng, files[name])
    if rng.random() < 0.9:
        try:
            content = json.loads(files["state.json"])
            listed = content["files"]
            for name, data in files.items():
                if name in listed or (name != "state.json" and rng.random() < 0.5):
                    listed[name] = len(data)
            files["state.json"] = json.dumps(content).encode()
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
    return files


_LONG = "the long list"


def shorter(content: Any) -> Any:
    """Without the 625 numbers of Python's generator, which would draw nearly all changes."""
    with contextlib.suppress(TypeError, KeyError, IndexError, AttributeError):
        for local in content["local"]:
            local["random"]["python"][1] = _LONG
    return content


def restored(short: Any) -> Any:
    numbers = list(random.getstate()[1])
    if isinstance(short, dict):
        return {key: restored(value) for key, value in short.items()}
    if isinstance(short, list):
        return [restored(value) for value in short]
    return numbers if isinstance(short, str) and short == _LONG else short


def test_checkpoints(request: pytest.FixtureRequest, place: Place, shards: Mapping[str, bytes]) -> None:
    trained = Trained(place, shards)
    folder = place.run / "checkpoints" / "update-000000003"

    def case(rng: Rng) -> Any:
        place.fresh()
        folder.mkdir(parents=True)
        files = mutate_checkpoint(rng, trained.files[pick(rng, ("whole", "pieces"))], place.evil)
        configuration = to_yaml(trained.experiment)
        ways = int(rng.integers(1, 4))  # 1: restored, 2: loaded without its run, 3: both
        if ways & 2 and rng.random() < 0.5:
            configuration = mutations.text_mutation(rng, configuration, mutations.YAML_TOKENS)
        pointer = (
            pick(rng, ("update-000000003", "../../x", "/etc", "\0", "update-000000003/.."))
            if rng.random() < 0.1
            else ""
        )
        (place.run / "config.yaml").write_text(configuration, errors="surrogatepass")
        if pointer:
            (place.run / "checkpoints" / "latest").write_text(pointer)
        for name, data in files.items():
            if ".." not in name and "/" not in name:
                put(rng, folder / name, data, place.evil)

        def restore() -> bool:
            trainer = trained.new_trainer()
            trainer.restore(checkpoint.load(folder))
            return continues(trained, trainer)

        def load() -> Any:
            return load_run(place.run, device="cpu").model.own_state()

        if ways & 2:
            outcome = guard.guarded(load, place.run, (CheckpointError, ConfigError))
        if ways & 1:
            outcome = restored_outcome(restore)
        return outcome

    def restored_outcome(restore: Callable[[], bool]) -> Any:
        with torch.random.fork_rng(devices=[]):
            kept = random.getstate(), np.random.get_state()
            outcome = guard.guarded(restore, place.run, (CheckpointError,))
            if outcome.error is None:
                trained.reset()
            else:
                assert trained.is_as_it_was()
            random.setstate(kept[0])
            np.random.set_state(kept[1])
        return outcome

    outcomes = fuzz(request, "checkpoints", place, case)
    if len(outcomes) >= 100:
        assert 0.05 < sum(outcome.error is None for outcome in outcomes) / len(outcomes) < 0.7


# What was found, each case alone.


FOUND_STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no update": (lambda state: state.pop("update"), "update=None is no whole number"),
    "text for an update": (lambda state: state.update(update="x"), "update=x is no whole number"),
    "an update below zero": (lambda state: state.update(update=-1), "update=-1 is no whole number"),
    "no ranks": (lambda state: state.update(world=0), "local is not the states of 0 ranks"),
    "a configuration that is none": (lambda state: state.update(configuration=[1]), "configuration holds no settings"),
    "no position": (lambda state: state["progress"].update(positions={}), "vision"),
    "a position below zero": (lambda state: state["progress"]["positions"].update(vision=-5), "vision=-5"),
    "a position beyond all": (lambda state: state["progress"]["positions"].update(vision=10**30), "vision=1000"),
    "no time": (lambda state: state["progress"].update(seconds=float("nan")), "seconds=nan is no number"),
    "a place behind the generator's numbers": (
        lambda state: state["local"][0]["random"]["numpy"].__setitem__(1, 10**6), "no place among 624 numbers"
    ),
    "garbled numbers of a generator": (
        lambda state: state["local"][0]["random"]["python"][1].__setitem__(0, -1), "random states cannot be restored"
    ),
    "garbled health": (lambda state: state.update(health={"low_since": [], "was_healthy": []}), "garbles"),
}  # fmt: skip


@pytest.fixture
def trained(place: Place, shards: Mapping[str, bytes]) -> Trained:
    return Trained(place, shards)


def write_checkpoint(trained: Trained, files: Mapping[str, bytes]) -> Path:
    folder = trained.place.run / "checkpoints" / "update-000000003"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    state = json.loads(files["state.json"])
    state["files"] = {name: len(data) for name, data in files.items() if name != "state.json"}
    for name, data in (files | {"state.json": json.dumps(state).encode()}).items():
        (folder / name).write_bytes(data)
    (trained.place.run / "config.yaml").write_text(to_yaml(trained.experiment))
    return folder


def refused(trained: Trained, folder: Path) -> str:
    def restore() -> None:
        trained.new_trainer().restore(checkpoint.load(folder))

    outcome = guard.guarded(restore, trained.place.run, (CheckpointError,))
    assert trained.is_as_it_was()
    return str(outcome.error)


def test_found_states(trained: Trained) -> None:
    """None of them changes the model."""
    files = trained.files["whole"]
    with torch.random.fork_rng(devices=[]):
        for name, (spoil, expected) in FOUND_STATES.items():
            state = json.loads(files["state.json"])
            spoil(state)
            folder = write_checkpoint(trained, files | {"state.json": json.dumps(state).encode()})
            error = refused(trained, folder)
            assert expected in error, (name, error)


def test_found_tensors(trained: Trained) -> None:
    def spoilt(name: str, spoil: Callable[[dict[str, Any]], Any], kind: str = "whole") -> dict[str, bytes]:
        header, payload = safetensors_files.unpack(trained.files[kind][name])
        spoil(header)
        return {**trained.files[kind], name: safetensors_files.pack(header, payload)}

    files = trained.files["whole"]
    step, moment = (
        next(key for key in safetensors_files.unpack(files["optimiser.safetensors"])[0] if key.endswith(end))
        for end in ("/step", "/exp_avg")
    )
    two = "model-00001-of-00002.safetensors"
    cases: list[tuple[dict[str, bytes], str]] = [
        (spoilt("optimiser.safetensors", lambda h: h.__setitem__(moment + "x", h.pop(moment))), "optimiser state"),
        (spoilt("optimiser.safetensors", lambda h: h[step].update(dtype="I32")), "fits no parameter"),
        (spoilt("optimiser.safetensors", lambda h: h[step].update(shape=[1])), "fits no parameter"),
        (
            spoilt("model.safetensors", lambda h: h.update(__metadata__={"shapes": '{"a": [Infinity]}'})),
            "cannot be read",
        ),
        (spoilt(two, lambda h: h.update(__metadata__={"shapes": '{"a": [-1, -1]}'}), "pieces"), "cannot be read"),
        ({**files, two: files["model.safetensors"]}, "and so does"),
        ({**files, "model.safetensors": trained.place.evil.pickled()}, "cannot be read"),
    ]
    for spoiled, expected in cases:
        error = refused(trained, write_checkpoint(trained, spoiled))
        assert expected in error, error
    trained.place.check()


def test_a_pipe_for_a_state(trained: Trained) -> None:
    folder = write_checkpoint(trained, trained.files["whole"])
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")
    assert "not a readable checkpoint (it has no file state.json)" in refused(trained, folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"transformer": {"depth": 10**9}}, "transformer.depth=1000000000 and transformer.width=20 are more than"),
        ({"transformer": {"width": 10**8}}, "are more than the saved weights have"),
        ({"transformer": {"heads": 0}}, "transformer.heads=0: must be 1 or more"),
    ],
)
def test_a_run_with_another_configuration(trained: Trained, change: dict[str, Any], expected: str) -> None:
    write_checkpoint(trained, trained.files["whole"])
    (trained.place.run / "config.yaml").write_text(to_yaml(trained.experiment.replace(**change)))
    load = lambda: load_run(trained.place.run, device="cpu")  # noqa: E731
    outcome = guard.guarded(load, trained.place.run, (CheckpointError, ConfigError))
    assert expected in str(outcome.error)
