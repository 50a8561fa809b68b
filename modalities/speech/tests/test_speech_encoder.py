"""A run as a function from speech to features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from data2vec.core import Data2Vec, Experiment
from data2vec.core.checkpoints import checkpoint
from data2vec.core.errors import CheckpointError, SampleError
from data2vec.core.settings.fields import NormOrder, TransformerConfig
from data2vec.core.settings.overrides import to_yaml
from data2vec.core.settings.pretraining import TargetsConfig
from data2vec.speech import AudioConfig, PositionsConfig, Speech, load_encoder

RECEPTIVE, HOP = 25, 20


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has saved one checkpoint."""
    speech = Speech(
        channels=(8, 8),
        kernels=(10, 4),
        strides=(5, 4),
        positions=PositionsConfig(6, 2, 2),
        audio=AudioConfig(min_length=100, max_length=500),
    )
    experiment = Experiment(
        name="tiny",
        modalities={"speech": speech},
        transformer=TransformerConfig(depth=2, width=16, heads=2, norm_order=NormOrder.POST),
        targets=TargetsConfig(top_k=2),
    )
    model = Data2Vec.build(experiment)
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(experiment))
    checkpoint.save(folder / "checkpoints", 3, checkpoint.Checkpoint({"model": model.own_state()}, {}), keep=1)
    return folder


@pytest.fixture
def clip() -> np.ndarray:
    return np.random.default_rng(0).normal(0.05, 0.1, 800).astype(np.float32)


def test_files_arrays_and_tensors_give_the_same_features(run: Path, tmp_path: Path, clip: np.ndarray) -> None:
    soundfile.write(tmp_path / "noise.wav", clip, 16_000, subtype="FLOAT")
    encoder = load_encoder(run, device="cpu")
    assert encoder.run.update == 3
    from_file = encoder([tmp_path / "noise.wav"])
    assert from_file.shape == (1, 16)
    assert from_file.dtype is torch.float32
    torch.testing.assert_close(encoder([clip]), from_file)
    torch.testing.assert_close(encoder([torch.from_numpy(clip)]), from_file)
    torch.testing.assert_close(encoder([100 * clip + 7]), from_file, rtol=1e-3, atol=1e-4)  # normalised


def test_a_clip_is_used_in_full_and_gives_what_it_gives_alone(run: Path, clip: np.ndarray) -> None:
    encoder = load_encoder(run, device="cpu")
    together = encoder.frames([clip, clip[:123], clip[300:]])
    assert [len(frames) for frames in together] == [(n - RECEPTIVE) // HOP + 1 for n in (800, 123, 500)]
    for frames, single in zip(together, (clip, clip[:123], clip[300:]), strict=True):
        torch.testing.assert_close(frames, encoder.frames([single])[0], rtol=1e-5, atol=1e-5)
    pooled = encoder([clip, clip[:123]])
    torch.testing.assert_close(pooled[1], together[1].mean(0), rtol=1e-5, atol=1e-5)


def test_teacher_and_student_start_equal_and_layers_differ(run: Path, clip: np.ndarray) -> None:
    teacher, student = (load_encoder(run, of=of, device="cpu")([clip]) for of in ("teacher", "student"))
    torch.testing.assert_close(teacher, student)
    last = load_encoder(run, layers="last", device="cpu")([clip])
    assert not torch.allclose(teacher, last)


def test_unusable_clips_are_named(run: Path, tmp_path: Path, clip: np.ndarray) -> None:
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    encoder = load_encoder(run, device="cpu")
    for name in ("broken.wav", "absent.wav"):
        with pytest.raises(SampleError, match=name):
            encoder([tmp_path / name])
    with pytest.raises(SampleError, match="one dimension"):
        encoder([np.stack([clip, clip])])
    with pytest.raises(SampleError, match="clip 1 of those given: 10 samples at 16 kHz; at least 45"):
        encoder([clip, clip[:10]])
    with pytest.raises(SampleError, match="silent"):
        encoder([np.zeros(500)])
    with pytest.raises(SampleError, match="not finite"):
        encoder([np.full(500, np.nan)])


def test_one_clip_is_a_batch_of_one_and_none_an_empty_batch(run: Path, tmp_path: Path, clip: np.ndarray) -> None:
    path = tmp_path / "noise.wav"
    soundfile.write(path, clip, 16_000, subtype="FLOAT")
    encoder = load_encoder(run, device="cpu")
    expected = encoder([clip])
    for one in (path, str(path), clip, torch.from_numpy(clip), np.array([str(path)]), (c for c in [clip])):
        assert torch.equal(encoder(one), expected)
    for one in (path, clip):
        assert torch.equal(encoder.features(one).x, encoder.features([one]).x)
        assert [len(waveform) for waveform in encoder.prepare(one)] == [800]
        assert [frames.shape for frames in encoder.frames(one)] == [((800 - RECEPTIVE) // HOP + 1, 16)]
    rows = np.stack([clip, clip[::-1]])  # two dimensions: clips of equal length
    assert torch.equal(encoder(rows), encoder(list(rows)))
    for none in ([], (), iter([]), torch.zeros(0, 800)):
        assert encoder(none).shape == (0, 16)
    assert encoder.features([]).x.shape == (0, 0, 16)
    assert encoder.prepare([]) == encoder.frames([]) == []


def test_integers_mean_their_own_full_scale(run: Path, clip: np.ndarray) -> None:
    encoder = load_encoder(run, device="cpu")
    whole = (clip * 2**15).round().clip(-(2**15), 2**15 - 1)
    for scaled in (whole.astype(np.int16), (whole * 2**16).astype(np.int32), torch.from_numpy(whole).short()):
        torch.testing.assert_close(encoder(scaled), encoder((whole / 2**15).astype(np.float32)), rtol=1e-5, atol=1e-6)
    with pytest.raises(SampleError, match="silent"):
        encoder(np.array([0, 1] * 400, dtype=np.int32))  # of full scale that is nothing


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ([None], r"clip 0 of those given: is of type NoneType; give a file's path, or a waveform"),
        (7, "clip 0 of those given: is of type int"),
        (b"RIFF", "is of type bytes"),
        ([0.1, 0.2], "is of type float"),
        (np.float32(1), "is of type float32"),
        (torch.tensor(1.0), r"one dimension, got \(\)"),
        (np.array([]), "clip 0 of those given: 0 samples at 16 kHz; at least 45"),
        (np.ones(800, bool), "a waveform of bool; give floats"),
        (torch.ones(800, dtype=torch.complex64), "a waveform of complex64; give floats"),
        ([np.full(800, 1e300)], "not finite"),
    ],
)
def test_what_is_no_clip_is_said(run: Path, clips: Any, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        load_encoder(run, device="cpu")(clips)


def test_no_run_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run there"):
        load_encoder(tmp_path)
