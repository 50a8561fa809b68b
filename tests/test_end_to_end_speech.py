"""Speech as a user trains it: a folder of audio to shards, to a run, its report, its features; also after a stop."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from data2vec.core.data.shards.index import ShardIndex
from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.settings.overrides import apply_overrides, from_yaml
from data2vec.core.testing import load_script
from data2vec.core.training.monitor import read_metrics
from data2vec.speech import Speech, load_encoder

ROOT = Path(__file__).resolve().parents[1]
RATE = 16_000
BUDGET = 32_000  # samples of one forward pass
TINY = (
    "speech.channels=[16,16,16,16,16,16,16]", "speech.positions.depth=1", "speech.positions.width=3",
    "speech.positions.groups=2", "speech.audio.min_length=2000", "speech.audio.max_length=8000",
    "transformer.depth=2", "transformer.width=32", "transformer.heads=2", "targets.top_k=2", "optim.warmup=1",
    "optim.hold=0", "optim.lr=1e-3", "train.updates=6", f"train.micro_length={BUDGET}",
    f"train.batch_length={2 * BUDGET}", "train.log_every=1", "train.device=cpu", "data.workers=0",
    "evaluation.few_labels=8", "evaluation.tasks=[rank]",
)  # fmt: skip
TASKS = "evaluation.tasks=[knn,rank,positions]"
V2 = ("speech.predictor.layers=1", "speech.predictor.width=16", "speech.predictor.groups=2", "speech.mask.masks=2")


def tiny(*arguments: str) -> list[str]:
    """The arguments, after those of ``TINY`` that they do not give."""
    given = {argument.partition("=")[0] for argument in arguments}
    return [*(argument for argument in TINY if argument.partition("=")[0] not in given), *arguments]


def command(module: ModuleType, *arguments: str) -> int:
    """The exit code of an experiment."""
    try:
        module.main(module.experiment, module.sample, argv=tiny(*arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def two_tones(generator: np.random.Generator, length: int, label: int) -> np.ndarray:
    """(L,) noise, with a low tone in its first half and a tone in its second half that is the clip's class."""
    times = np.arange(length) / RATE
    pitch = np.where(np.arange(length) < length // 2, 200.0, (900.0, 3000.0)[label])
    clip = 0.3 * np.sin(2 * np.pi * pitch * times) + 0.05 * generator.standard_normal(length)
    return clip.astype(np.float32)


def flac(clip: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, clip, RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def write_shards(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 48), ("validation", 24)):
        with ShardWriter(folder, prefix, "speech", samples_per_shard=20, class_names=("low", "high")) as writer:
            for number in range(count):
                length, label = int(generator.integers(2000, 9000)), number % 2
                members = {
                    "flac": flac(two_tones(generator, length, label)),
                    "cls": str(label).encode(),
                    "frames": f"0 0\n{length // 2} {1 + label}\n".encode(),
                }
                writer.write(f"clip{number:03d}", members)
    return folder


def weights(run: Path, update: int = 6) -> dict[str, torch.Tensor]:
    """Every tensor of the model and the optimiser in the checkpoint of an update."""
    (place,) = (run / "checkpoints").glob(f"update-*{update}")
    return {
        f"{file.stem}/{key}": tensor
        for file in (place / "model.safetensors", place / "optimiser.safetensors")
        for key, tensor in load_file(file).items()
    }


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.fixture(scope="module")
def speech_base() -> ModuleType:
    return load_script(ROOT / "experiments" / "speech_base.py")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("speech") / "shards")


@pytest.fixture(scope="module")
def data(shards: Path) -> tuple[str, str]:
    return f"data.train={shards}/train-*.tar", f"data.validation={shards}/validation-*.tar"


class Finished:
    def __init__(self, folder: Path, out: str) -> None:
        self.folder, self.out = folder, out


@pytest.fixture(scope="module")
def finished(speech_base: ModuleType, data: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder, lines = tmp_path_factory.mktemp("runs") / "speech", list[str]()
    with pytest.MonkeyPatch.context() as patch:
        write = sys.stdout.write
        patch.setattr(sys.stdout, "write", lambda text: (lines.append(text), write(text))[1])
        assert command(speech_base, *data, f"train.folder={folder}", TASKS) == 0
    return Finished(folder, "".join(lines))


def test_a_run_is_trained_evaluated_and_reported(finished: Finished) -> None:
    folder = finished.folder
    assert f"report: {folder}/report.html" in finished.out
    assert "48 speech samples, 6 updates of 64,000 of input length" in finished.out
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["update"] for line in lines] == list(range(1, 7))
    table = json.loads((folder / "report.json").read_text())
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == ["teacher", "student", "random encoder", "log-mel spectrum"]
    assert (table["classes"], table["position_classes"]) == (2, 3)
    for row in rows.values():
        assert all(row[task] is not None for task in ("knn", "rank", "positions"))
    # Which tone, and where it changes, is plain from a spectrum: a probe that read other labels would be at chance.
    assert rows["log-mel spectrum"]["knn"] == 1.0
    assert rows["log-mel spectrum"]["positions"] > 0.9


def test_the_report_shows_and_plays_speech(finished: Finished) -> None:
    page = (finished.folder / "report.html").read_text()
    for part in ("What the student hears", "Frame features", "log-mel spectrum", "positions, 3 classes"):
        assert part in page
    assert page.count('alt="spectrogram"') == 12  # six clips, in both panels
    assert page.count('alt="spectrogram with hidden spans"') == 6
    assert page.count('alt="principal components of the frame features"') == 6
    players = re.findall(r'<audio controls[^>]*src="data:audio/flac;base64,([^"]+)"', page)
    assert len(players) == 6
    heard = [soundfile.read(io.BytesIO(base64.b64decode(player))) for player in players]
    assert all(rate == RATE and 2000 <= len(clip) <= 8000 for clip, rate in heard)
    assert not re.search(r"""(src|href|action)\s*=\s*["']?\s*(https?:)?//""", page, re.IGNORECASE)


def test_the_configuration_reads_back(
    finished: Finished, data: tuple[str, str], speech_base: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny(*data, f"train.folder={finished.folder}", TASKS, "speech.mask.length=5")
    assert command(speech_base, "--print-config", *arguments) == 0
    printed = from_yaml(capsys.readouterr().out)
    assert printed == apply_overrides(speech_base.experiment, arguments)
    speech = printed.modalities["speech"]
    assert isinstance(speech, Speech)
    assert speech.channels == (16,) * 7
    assert speech.mask.length == 5
    assert from_yaml(finished.folder / "config.yaml") == printed.replace(speech={"mask": {"length": 10}})


def test_a_stopped_run_goes_on_bit_for_bit(
    finished: Finished, data: tuple[str, str], speech_base: ModuleType, tmp_path: Path, capsys
) -> None:
    """Batches by length, two of them an update; the first part in a process of its own, the last with a worker."""
    stopped = (*data, f"train.folder={tmp_path}", "train.max_minutes=1e-9")
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "speech_base.py"), *tiny(*stopped)],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stopped (out of time) at update 1 of 6" in done.stdout
    assert command(speech_base, *stopped) == 0
    assert "stopped (out of time) at update 2 of 6" in capsys.readouterr().out
    assert command(speech_base, *stopped[:-1], "data.workers=1") == 0
    assert "continuing from update 2 of 6" in capsys.readouterr().out
    expected = weights(finished.folder)
    assert_same(expected, weights(tmp_path))
    losses = [[line["loss"] for line in read_metrics(run / "metrics.jsonl")] for run in (finished.folder, tmp_path)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 6


def test_the_second_version_from_a_folder_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files by `tools/shard.py speech`; no validation shards; masks of 2.0; stopped and continued."""
    audio, out = tmp_path / "audio", tmp_path / "shards"
    generator = np.random.default_rng(1)
    for number in range(40):
        clip = two_tones(generator, int(generator.integers(2500, 8000)), number % 2)
        path = audio / ("low", "high")[number % 2] / f"{number}.{('flac', 'wav', 'ogg')[number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, clip, RATE)
    assert load_script(ROOT / "tools" / "shard.py").main(["speech", str(audio), str(out), "--workers", "1"]) == 0
    assert ShardIndex.load(out).samples == 40
    module = load_script(ROOT / "experiments" / "speech_base_v2.py")
    arguments = (*V2, f"data.train={out}/train-*.tar", "evaluation.tasks=[knn]", "evaluation.neighbours=3")
    arguments = (*arguments, "train.updates=3", "train.checkpoint_every=2", "train.keep=3")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command(module, *arguments, f"train.folder={whole}") == 0
    for update in (1, 2):
        capsys.readouterr()
        assert command(module, *arguments, f"train.folder={parts}", "train.max_minutes=1e-9") == 0
        assert f"stopped (out of time) at update {update} of 3" in capsys.readouterr().out
    assert_same(weights(whole, 2), weights(parts, 2))
    page = (whole / "report.html").read_text()
    assert page.count('alt="spectrogram with hidden spans"') == 2 * page.count("<audio controls")  # two masks of each
    table = json.loads((whole / "report.json").read_text())
    assert all(row["knn"] is not None for row in table["rows"])


def test_the_evaluation_tool(finished: Finished, tmp_path: Path, shards: Path) -> None:
    tool, out = load_script(ROOT / "tools" / "evaluate.py"), tmp_path / "table.json"
    arguments = [str(finished.folder), "--tasks", "knn,linear,rank,positions", "--device", "cpu", "--json", str(out)]
    assert tool.main(arguments) == 0
    table, reported = json.loads(out.read_text()), json.loads((finished.folder / "report.json").read_text())
    for row, known in zip(table["rows"], reported["rows"], strict=True):
        assert row["linear"] is not None
        assert row["linear_few"] is not None
        linear = {"linear": None, "linear_few": None, "linear_few_std": None}
        assert row | linear == known  # the saved weights give what the run gave
    arguments[2] = "knn,positions"
    assert tool.main([*arguments, "--data", f"{shards}/validation-*.tar"]) == 0
    table = json.loads(out.read_text())
    assert 1 <= table["test_samples"] < 24
    assert all(row["positions"] is not None for row in table["rows"])


def test_a_clip_has_its_features_whatever_is_beside_it(finished: Finished, tmp_path: Path) -> None:
    """After the shards are gone; files at any rate and waveforms at 16 kHz."""
    run = shutil.copytree(finished.folder, tmp_path / "elsewhere")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"(train|validation): .*\.tar'?", r"\1: /gone/x.tar", text))
    assert "/gone/x.tar" in (run / "config.yaml").read_text()
    encoder = load_encoder(run, device="cpu")
    generator = np.random.default_rng(2)
    short, long = two_tones(generator, 2345, 0), two_tones(generator, 11_000, 1)
    path = tmp_path / "long.flac"
    path.write_bytes(flac(long))
    together = encoder.frames([torch.from_numpy(short), path])
    assert [x.shape for x in together] == [(7, 32), (34, 32)]  # longer than audio.max_length: nothing is cropped
    alone = [encoder.frames([torch.from_numpy(short)])[0], encoder.frames([path])[0]]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    mean = encoder([torch.from_numpy(short), path])
    torch.testing.assert_close(mean, torch.stack([x.mean(dim=0) for x in alone]), rtol=1e-4, atol=1e-5)
    assert (mean[0] - mean[1]).norm() > 1e-3
