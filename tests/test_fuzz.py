"""Mutated shards, indexes, configurations and checkpoints: a counted skip or one clear error, and nothing else happens.

`uv run pytest tests/test_fuzz.py --fuzz-cases 10000` tries more cases of each target, `--fuzz-first N --fuzz-cases 1`
repeats case N.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import shutil
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch import Tensor

from data2vec.core import Experiment
from data2vec.core.batch import Batch
from data2vec.core.data import fetch
from data2vec.core.data.fetch import ShardCache
from data2vec.core.data.index import ShardIndex
from data2vec.core.data.pipeline import TrainData
from data2vec.core.data.shards import index_folder, verify
from data2vec.core.errors import CheckpointError, ConfigError, DataError
from data2vec.core.loading import load_run
from data2vec.core.overrides import apply_overrides, flatten, from_yaml, to_yaml, tree, validate
from data2vec.core.testing import load_module
from data2vec.core.training import checkpoint
from data2vec.core.training.build import build_engine, build_model
from data2vec.core.training.pieces import Piece
from data2vec.core.training.ranks import Ranks
from data2vec.core.training.trainer import Trainer, hide

fuzzing = load_module("fuzzing", Path(__file__).with_name("fuzzing.py"))
scenarios = load_module("scenarios_of_fuzzing", Path(__file__).with_name("scenarios.py"))

MODALITIES = ("vision", "speech", "text")
SAMPLES = 6
BLOCK = fuzzing.BLOCK
pick = fuzzing.pick
Rng = np.random.Generator


# Valid things to begin with.


def image(rng: Rng, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(file, format=kind)
    return file.getvalue()


def clip(rng: Rng, kind: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, rng.normal(size=int(rng.integers(1_500, 4_500))).clip(-4, 4) / 5, 16_000, format=kind)
    return file.getvalue()


def tokens(rng: Rng) -> bytes:
    from data2vec.text.loader import pack_ids

    return pack_ids([0, *rng.integers(5, 260, int(rng.integers(8, 20))).tolist(), 2], 261)


def sample(rng: Rng, modality: str, number: int) -> dict[str, bytes]:
    label = {"cls": str(number % 3).encode()}
    odd = number % 2
    if modality == "vision":
        return {"jpg": image(rng, "JPEG"), **label} if odd else {"png": image(rng, "PNG"), **label}
    if modality == "speech":
        return {"wav": clip(rng, "WAV"), **label} if odd else {"flac": clip(rng, "FLAC"), "frames": b"0 1\n800 2\n"}
    return {"txt": f"document {number} has words".encode(), **label} if odd else {"tokens": tokens(rng), **label}


def shard(modality: str) -> bytes:
    """A tar file as other programs write it."""
    import tarfile

    rng, out = fuzzing.generator(modality, 0), io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number in range(SAMPLES):
            for extension, content in sample(rng, modality, number).items():
                info = tarfile.TarInfo(f"{number:04d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def experiment_of(modality: str) -> Experiment:
    experiment: Experiment = scenarios.scenario(modality)
    return experiment.replace(data={"workers": 0}, train={"batch": 4})


class Place:
    """Where the cases run: ``run`` is the only folder that they may write to, ``sentinel`` what evil content makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "outer" / "run"
        self.shards = self.run / "shards"
        self.evil = fuzzing.Evil(folder / "sentinel")
        (folder / "beside.txt").write_text("untouched")
        self.fresh()
        self.before = self._others()

    def fresh(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        self.shards.mkdir(parents=True)

    def _others(self) -> dict[str, bytes | None]:
        return {
            str(path): path.read_bytes() if path.is_file() else None
            for path in self.folder.rglob("*")
            if not path.is_relative_to(self.run)
        }

    def check(self) -> None:
        assert self._others() == self.before


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


class Offline:
    def open(self, request: Any, timeout: float) -> Any:
        raise ConnectionRefusedError(f"no network for {request.full_url}")


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting, and no network."""
    monkeypatch.setattr(ShardCache, "_wait", lambda self, attempt: None)
    monkeypatch.setattr(fetch, "_opener", Offline)


@pytest.fixture(scope="module")
def shards() -> dict[str, bytes]:
    return {modality: shard(modality) for modality in MODALITIES}


def fuzz(request: pytest.FixtureRequest, target: str, place: Place, case: Callable[[Rng], Any]) -> list[Any]:
    """Run the cases; all that went wrong is reported together. Returns the outcomes."""
    first, count = request.config.getoption("--fuzz-first"), request.config.getoption("--fuzz-cases")
    outcomes, failures = [], {}
    for number in range(first, first + count):
        try:
            outcomes.append(case(fuzzing.generator(target, number)))
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
            text = "".join(traceback.format_exception(error, chain=False)[-8:])
            failures.setdefault(kind, []).append((number, text))
        if number % 50 == 0 or number == first + count - 1:
            place.check()
    report = "\n".join(f"cases {[n for n, _ in found][:8]}: {kind}\n{found[0][1]}" for kind, found in failures.items())
    assert not failures, f"{target}: {sum(map(len, failures.values()))} of {count} cases\n{report}"
    return outcomes


# Shards.


def read_all(spec: str, experiment: Experiment, folder: Path) -> tuple[int, int]:
    """Samples that are read and skipped by an evaluation, after a batch of training."""
    ((_, modality),) = experiment.modalities.items()
    data = TrainData.open(spec, modality, data=experiment.data, seed=0, cache=folder / "cache")
    batches = list(data.for_evaluation().evaluation_batches(4))
    read, broken = sum(map(len, batches)), sum(len(batch.broken) for batch in batches)
    assert read + broken == data.total
    for batch in batches:
        check_batch(batch)
    with contextlib.suppress(DataError):  # both are broken
        check_batch(next(data.batches(0, 2)))
    return read, broken


def check_batch(batch: Batch) -> None:
    assert torch.isfinite(batch.inputs.float()).all()
    assert len(batch.ids) == len(batch.labels) == len(batch) > 0
    for line in batch.broken:
        fuzzing.check_message(line)
        assert line.isprintable()


def mutate_shard(rng: Rng, data: bytes, evil: Any) -> bytes:
    valid = data
    for _ in range(int(rng.choice((1, 1, 1, 2, 3)))):
        match int(rng.integers(8)):
            case 0:
                data = pick(rng, fuzzing.BYTES)(rng, data)
            case 1:
                data = fuzzing.blocks(rng, data)
            case 2 | 3:
                data = fuzzing.headers(rng, data, evil)
            case 4:
                data = fuzzing.extended(rng, data)
            case 5 | 6 if data is valid:  # the library that writes them anew can loop for ever on others
                data = fuzzing.members(rng, data, evil)
            case _:
                data = pick(rng, (gzip.compress(data), evil.contents(rng), fuzzing.flip(rng, data)))
    return data


def put(rng: Rng, place: Path, data: bytes, evil: Any) -> None:
    """Write a file, or now and then something that is none."""
    place.unlink(missing_ok=True)
    match int(rng.integers(60)):
        case 0:
            place.symlink_to(place)
        case 1:
            place.symlink_to(pick(rng, ("/dev/zero", "/dev/null", "/etc/passwd", "/", "gone", evil.sentinel)))
        case 2:
            place.mkdir()
        case 3:
            os.mkfifo(place)
        case _:
            place.write_bytes(data)


def test_shards(request: pytest.FixtureRequest, place: Place, shards: Mapping[str, bytes]) -> None:
    def case(rng: Rng) -> Any:
        place.fresh()
        modality = pick(rng, MODALITIES)
        mutated = mutate_shard(rng, shards[modality], place.evil)
        good, bad = place.shards / "train-000000.tar", place.shards / "train-000001.tar"
        good.write_bytes(shards[modality])
        way = int(rng.integers(4))
        if way == 0:  # the index is of what was there before
            bad.write_bytes(shards[modality])
            index_folder(place.shards, modality)
        put(rng, bad, mutated, place.evil)

        def run() -> tuple[int, int]:
            if way == 1:
                index_folder(place.shards, modality)
                assert all(map(str.isprintable, verify(place.shards)))
            spec = bad if way == 3 else place.shards
            return read_all(str(spec), experiment_of(modality), place.run)

        return fuzzing.guarded(run, place.run, (DataError,))

    outcomes = fuzz(request, "shards", place, case)
    if len(outcomes) >= 100:  # mutations go neither all too far nor nowhere
        read = [outcome.value for outcome in outcomes if outcome.value]
        assert 0.2 < len(read) / len(outcomes) < 0.9
        assert sum(broken > 0 for _, broken in read) > len(outcomes) // 20


# Indexes.

INDEX_TOKENS = ("NaN", "-1", "1e999", "null", "true", "[" * 50_000, '{"a":' * 50_000, "9" * 5_000,
                "9" * 4_200, '"..\\u0000"',
                '"../../a.tar"', "\ufeff", "//", '"\\ud800.tar"', ",", "}", "{}",
                "[]", '"/etc/a.tar"', "0x10")  # fmt: skip


def test_indexes(request: pytest.FixtureRequest, place: Place, shards: Mapping[str, bytes]) -> None:
    texts = {}
    for modality in MODALITIES:
        place.fresh()
        for number in range(2):
            (place.shards / f"train-{number:06d}.tar").write_bytes(shards[modality])
        index_folder(place.shards, modality, ["one", "two", "three"])
        texts[modality] = (place.shards / "index.json").read_text()

    def case(rng: Rng) -> Any:
        place.fresh()
        modality = pick(rng, MODALITIES)
        text = texts[modality]
        if rng.random() < 0.4:
            changed = text_of(rng, text)
        else:
            content = json.loads(text)
            for _ in range(int(rng.choice((1, 1, 2, 3)))):
                content = fuzzing.change(rng, content)
            if rng.random() < 0.7 and isinstance(content, dict):
                agree(content)
            changed = json.dumps(content).encode()
        for number in range(2):
            (place.shards / f"train-{number:06d}.tar").write_bytes(shards[modality])
        put(rng, place.shards / "index.json", changed, place.evil)

        def run() -> Any:
            experiment = experiment_of(modality)
            verify(place.shards)
            found = read_all(str(place.shards), experiment, place.run)
            data = TrainData.open(
                str(place.shards), experiment.modalities[modality], data=experiment.data, seed=0, cache=place.run
            )
            for part in data.hold_out(0.3):
                assert part.total
            if modality == "speech":
                next(data.length_batches(0, 9_000))
            return found

        def parse() -> Any:
            index = ShardIndex.parse(changed, "index.json")
            assert index.samples * 512 <= index.size
            return index

        fuzzing.guarded(parse, place.run, (DataError,))
        return fuzzing.guarded(run, place.run, (DataError,))

    outcomes = fuzz(request, "indexes", place, case)
    assert any(outcome.value for outcome in outcomes) or len(outcomes) < 100


def text_of(rng: Rng, text: str) -> bytes:
    if rng.random() < 0.5:
        return pick(rng, fuzzing.BYTES)(rng, text.encode())  # type: ignore[no-any-return]
    return fuzzing.text_mutation(rng, text, INDEX_TOKENS).encode("utf-8", "surrogatepass")


def agree(content: dict[str, Any]) -> None:
    """Make the totals those of the shards, so that more than their check is reached."""
    with contextlib.suppress(TypeError, KeyError, AttributeError, OverflowError):
        content["totals"] = {
            "samples": sum(entry["samples"] for entry in content["shards"]),
            "bytes": sum(entry["bytes"] for entry in content["shards"]),
            "length": sum(sum(entry.get("lengths", ())) for entry in content["shards"]),
        }


# Configurations.

YAML_TOKENS = (
    '!!python/object/apply:os.system ["touch SENTINEL"]', "!!python/name:os.system", "!!python/module:os",
    "!include /etc/passwd",
    "!!binary aGVsbG8=", "!!set {a}", "!!timestamp 2001-01-01", "&a [1]", "*a", "<<: *a", "${oc.env:HOME}", "${name}",
    "$(touch SENTINEL)",
    "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n", "---\n", "...\n", "%YAML 1.1\n", "%TAG ! tag:a,2000:\n",
    "? [a]\n: b\n", "[" * 3000,
    "{a: " * 3000, "- " * 3000, "\t", "\0", "\x1b", "\ud800", "\ufeff", "'", '"\\ud800"', '"\\x00"', "null", "~",
    "on", "1e5", "1e400",
    "-1", "0", ".nan", "-.inf", "9" * 5000, "0x10", "0o17", "1_000", "12:30:45", "2001-01-01", "[1, [2, [3]]]",
    "{a: 1}", "|\n  x", ">-\n x",
    "pipe:touch SENTINEL", "../../x", "???", "core: {}\n", "testing: {}\n", "os: {}\n", "vision: {}\n",
    "text: null\n", "modalities: {}\n",
    "__class__: 1\n", "1: 2\n", "null: 3\n", "x.y: 1\n", "vision.mask: 1\n", "1000000000", "18446744073709551616",
)  # fmt: skip


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
            rng, (pick(rng, yaml_tokens), str(fuzzing.any_value(rng))[:5000], json.dumps(fuzzing.any_value(rng)))
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
            text = fuzzing.text_mutation(rng, to_yaml(experiment), yaml_tokens)
        elif way == 1:
            content = tree(experiment)
            for _ in range(int(rng.integers(1, 4))):
                content = fuzzing.change(rng, content)
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

        return fuzzing.guarded(run, place.run, (ConfigError,))

    def written(path: Path, text: str) -> Experiment:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return from_yaml(path)

    outcomes = fuzz(request, "configurations", place, case)
    valid = sum(outcome.value is not None for outcome in outcomes)
    assert valid > len(outcomes) // 50 or len(outcomes) < 100


# What data.train may say.

SPEC_PARTS = (
    "pipe:touch SENTINEL", "pipe: touch SENTINEL", "s3://bucket/a.tar", "file:///etc/passwd", "file:a.tar",
    "ssh://host/a.tar",
    "gs://b/a", "ftp://host/a", "data:,x", "http://", "http://[", "http://[::1", "http://127.0.0.1:1/a.tar",
    "http://127.0.0.1:x/a.tar",
    "http://127.0.0.1:99999/a.tar", "http://a b/c.tar", "http://127.0.0.1:1/\n.tar", "https://\0/a",
    "http://127.0.0.1:1", "http:///a.tar",
    "http://\udcff/a.tar", "http://127.0.0.1:1/{0..2}.tar", "http://é\u2100.x/a", "hdfs:a", "SHARDS",
    "SHARDS/train-000000.tar",
    "{0..99999999}", "{0..99999999999999999999}", "{1..9}" * 12, "{a,b}" * 40, "{" * 5000, "{" * 5000 + "}" * 5000,
    "{a,{b,{c,{d,e}}}}",
    "{{0..9999}{0..9999},x}", "{00000000000000000000000000..9999999}", "{" + "9" * 5000 + "..1}", "{a..Z}",
    "{1..3..0}", "{1..3..-1}",
    "{,}", "{}", "${WDS_A}", "${HOME}", "$(touch SENTINEL)", "`touch SENTINEL`", "; touch SENTINEL",
    "| touch SENTINEL", "~", "~nobody/a",
    "~root/*", "*", "?", "[a-", "[!]", "**/*.tar", "SHARDS/*.tar", "SHARDS/*.{tar,json}", "../..", "/", "/dev/null",
    "/dev/zero", "/proc/self/mem",
    "\0", "\n", "\ud800", "\udcff", "x" * 5000, "a/" * 3000, "::", " ", "", "[::]", "\\", "{a\\,b}", "%00",
    "SHARDS/fifo", "SHARDS/loop.tar",
)  # fmt: skip


def test_lists_of_shards(request: pytest.FixtureRequest, place: Place, shards: Mapping[str, bytes]) -> None:
    parts = [part.replace("SENTINEL", str(place.evil.sentinel)) for part in SPEC_PARTS]
    parts = [part.replace("SHARDS", str(place.shards)) for part in parts]
    (place.shards / "train-000000.tar").write_bytes(shards["text"])
    os.mkfifo(place.shards / "fifo")
    (place.shards / "loop.tar").symlink_to("loop.tar")
    experiment = experiment_of("text")

    def case(rng: Rng) -> Any:
        count = int(rng.choice((1, 1, 1, 2, 3)))
        spec = pick(rng, ("", "::", "/", "")).join(pick(rng, parts) for _ in range(count))
        if rng.random() < 0.2:
            spec = fuzzing.text_mutation(rng, spec, parts)
        return fuzzing.guarded(lambda: read_all(spec, experiment, place.run), place.run, (DataError,))

    for spec in parts:
        outcome = fuzzing.guarded(lambda spec=spec: read_all(spec, experiment, place.run), place.run, (DataError,))
        assert outcome.error or spec.startswith(str(place.shards)), spec
    fuzz(request, "lists", place, case)


# Checkpoints.


class Quiet:
    def update(self, line: Mapping[str, float], updates: int) -> None:
        pass


class Trained:
    """A run in a folder with checkpoints of its third update: whole, and in the pieces of two ranks."""

    def __init__(self, place: Place, shards: Mapping[str, bytes]) -> None:
        self.place = place
        self.experiment = scenarios.scenario("vision").replace(data={"workers": 0})
        ((self.name, self.modality),) = self.experiment.modalities.items()
        (place.folder / "data").mkdir()
        path = place.folder / "data" / "train-000000.tar"
        path.write_bytes(shards[self.name])
        place.before = place._others()
        self.data = TrainData.open(str(path), self.modality, data=self.experiment.data, seed=0, cache=place.run)
        self.engine = build_engine(build_model(self.experiment, Ranks()), self.experiment, Ranks())
        self.masker = self.modality.build_masker()
        self.batch: Batch = scenarios.batch_of(self.experiment, 0, slice(0, 4))
        self.step(1)  # AdamW makes its state
        self.start = self.copied()
        self.step(2)
        self.step(3)
        self.trainer = self.new_trainer()
        self.files = {kind: self.saved(kind) for kind in ("whole", "pieces")}
        self.reset()

    def new_trainer(self) -> Trainer:
        return Trainer(
            self.experiment, self.engine, {self.name: self.data}, self.place.run,
            configuration={"yaml": to_yaml(self.experiment)}, display=Quiet(),
        )  # fmt: skip

    def step(self, update: int) -> None:
        masked = hide(self.engine.model, self.modality, self.masker, self.batch, seed=0, update=update)
        self.engine.forward_backward(*masked, count=masked[1].count, update=update)
        assert self.engine.step(1e-3, update).isfinite()

    def copied(self) -> dict[str, dict[str, Tensor]]:
        state = self.engine.state()
        return {k: {n: v.clone() for n, v in values.items() if isinstance(v, Tensor)} for k, values in state.items()}

    def reset(self) -> None:
        self.engine.load_state(self.start["model"], self.start["optimiser"])

    def is_as_it_was(self) -> bool:
        now = self.copied()
        return all(
            now[kind].keys() == values.keys() and all(torch.equal(now[kind][n], v) for n, v in values.items())
            for kind, values in self.start.items()
        )

    def saved(self, kind: str) -> dict[str, bytes]:
        """The files of a checkpoint by name."""
        folder = self.place.run / kind
        tensors, generators = checkpoint.random_state(torch.device("cpu"))
        parts = {**self.copied(), "random": {f"0/{name}": value for name, value in tensors.items()}}
        state = {
            "progress": {"positions": {self.name: 12}, "seconds": 1.5, "best": None},
            "health": self.trainer.health.state(),
            "data": {self.name: self.data.fingerprint},
            "configuration": {"yaml": to_yaml(self.experiment)},
        }
        world = 1 if kind == "whole" else 2
        writing = checkpoint.unfinished(folder, "fuzz")
        for rank in range(world):
            mine = parts if world == 1 else {k: halved(values, rank) for k, values in parts.items()}
            checkpoint.write_part(writing, mine, {"random": generators}, rank=rank, world=world)
        written = checkpoint.commit(writing, 3, state, world=world, keep=1)
        return {path.name: path.read_bytes() for path in written.iterdir()}


def halved(values: Mapping[str, Tensor], rank: int) -> dict[str, Tensor | Piece]:
    mine: dict[str, Tensor | Piece] = {}
    for number, (name, value) in enumerate(values.items()):
        if value.numel() < 4:
            mine |= {name: value} if number % 2 == rank else {}
            continue
        middle = value.numel() // 2
        part = slice(0, middle) if rank == 0 else slice(middle, None)
        mine[name] = Piece(value.flatten()[part].clone(), part.start, tuple(value.shape))
    return mine


STATE_TOKENS = (
    *INDEX_TOKENS,
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
                    short = fuzzing.change(rng, short)
                files["state.json"] = json.dumps(restored(short)).encode()
            case 3:
                text = fuzzing.text_mutation(rng, files["state.json"].decode(), STATE_TOKENS)
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
                    files[name] = fuzzing.safetensors(rng, files[name], evil)
                except Exception:  # an earlier mutation left no header
                    files[name] = fuzzing.flip(rng, files[name])
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
            configuration = fuzzing.text_mutation(rng, configuration, YAML_TOKENS)
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
            outcome = fuzzing.guarded(load, place.run, (CheckpointError, ConfigError))
        if ways & 1:
            outcome = restored_outcome(restore)
        return outcome

    def restored_outcome(restore: Callable[[], bool]) -> Any:
        with torch.random.fork_rng(devices=[]):
            kept = random.getstate(), np.random.get_state()
            outcome = fuzzing.guarded(restore, place.run, (CheckpointError,))
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


def continues(trained: Trained, trainer: Trainer) -> bool:
    """Do what the next update and the next checkpoint do with what was restored."""
    progress = trainer.progress
    assert progress.update >= 0
    check_batch(next(trained.data.batches(progress.positions[trained.name], 2)))
    masked = hide(trained.engine.model, trained.modality, trained.masker, trained.batch, seed=0, update=progress.update)
    trained.engine.forward_backward(*masked, count=masked[1].count, update=progress.update)
    trained.engine.step(1e-3, progress.update + 1)
    json.dumps([trainer.health.state(), progress.positions, progress.seconds, progress.best])
    random.gauss(0, 1)
    np.random.randn(3)
    torch.randn(3)
    return True


# What was found, each case alone.


FOUND_SHARDS: dict[str, Callable[[bytes], bytes]] = {
    "a header inside a header, 2,000 times": lambda data: fuzzing.raw_member(b"L", b"a.png\0") * 2_000 + data,
    "digits that a pattern reads again and again": lambda data: fuzzing.raw_member(b"x", b"1" * 400_000) + data,
    "an extended header of a negative size": lambda data: fuzzing.raw_member(b"x", b"", -512) + data,
    "an extended header of a tebibyte": lambda data: fuzzing.raw_member(b"g", b"", 2**40) + data,
    "a map of holes that goes on behind the end": lambda data: fuzzing.with_checksum(
        fuzzing.raw_member(b"S", b"")[:482] + b"\1" + bytes(29)
    ),
}


@pytest.mark.parametrize("name", FOUND_SHARDS)
def test_found_shards(place: Place, shards: Mapping[str, bytes], name: str) -> None:
    path = place.shards / "a.tar"
    path.write_bytes(FOUND_SHARDS[name](shards["vision"]))
    read = lambda: read_all(str(path), experiment_of("vision"), place.run)  # noqa: E731
    outcome = fuzzing.guarded(read, place.run, (DataError,))
    assert str(path) in str(outcome.error)


@pytest.mark.parametrize("name", ["a.tar", "index.json"])
def test_a_pipe_among_the_shards(place: Place, shards: Mapping[str, bytes], name: str) -> None:
    (place.shards / "b.tar").write_bytes(shards["vision"])
    os.mkfifo(place.shards / name)
    read = lambda: read_all(str(place.shards), experiment_of("vision"), place.run)  # noqa: E731
    outcome = fuzzing.guarded(read, place.run, (DataError,))
    assert f"{place.shards / name}: is no regular file" in str(outcome.error)


def test_broken_samples_at_the_end_are_counted(place: Place, shards: Mapping[str, bytes]) -> None:
    """The last batch has no sample that can be used."""
    data = bytearray(shards["vision"])
    for number in range(4, SAMPLES):
        start = data.index(f"{number:04d}.".encode())
        data[start + BLOCK : start + BLOCK + 8] = bytes(8)
    path = place.shards / "a.tar"
    path.write_bytes(data)
    assert read_all(str(path), experiment_of("vision"), place.run) == (4, 2)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"samples": 10**15}, "cannot hold 1000000000000000 samples"),
        ({"samples": 10**15, "bytes": 10**18}, "cannot hold"),
        ({"lengths": [10**30] * SAMPLES}, "has a sample of length 1000"),
    ],
)
def test_found_indexes(place: Place, shards: Mapping[str, bytes], change: dict[str, Any], expected: str) -> None:
    (place.shards / "a.tar").write_bytes(shards["speech"])
    index_folder(place.shards, "speech")
    content = json.loads((place.shards / "index.json").read_text())
    content["shards"][0] |= change
    agree(content)
    with pytest.raises(DataError, match=expected):
        ShardIndex.parse(json.dumps(content).encode(), "index.json")


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

    outcome = fuzzing.guarded(restore, trained.place.run, (CheckpointError,))
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
        header, payload = fuzzing.unpack(trained.files[kind][name])
        spoil(header)
        return {**trained.files[kind], name: fuzzing.pack(header, payload)}

    files = trained.files["whole"]
    step, moment = (
        next(key for key in fuzzing.unpack(files["optimiser.safetensors"])[0] if key.endswith(end))
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
    outcome = fuzzing.guarded(load, trained.place.run, (CheckpointError, ConfigError))
    assert expected in str(outcome.error)
