"""A run as a function from speech to features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from data2vec.core import Data2Vec, Experiment
from data2vec.core.config import NormOrder, TargetsConfig, TransformerConfig
from data2vec.core.errors import CheckpointError, SampleError
from data2vec.core.overrides import to_yaml
from data2vec.core.training import checkpoint
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
    with pytest.raises(SampleError, match="10 samples at 16 kHz; at least 45"):
        encoder([clip[:10]])
    with pytest.raises(SampleError, match="silent"):
        encoder([np.zeros(500)])
    with pytest.raises(SampleError, match="not finite"):
        encoder([np.full(500, np.nan)])


def test_one_clip_is_a_batch_of_one_and_none_a_batch_of_none(run: Path, tmp_path: Path, clip: np.ndarray) -> None:
    soundfile.write(tmp_path / "noise.wav", clip, 16_000, subtype="FLOAT")
    encoder = load_encoder(run, device="cpu")
    expected = encoder([clip])
    for one in (clip, torch.from_numpy(clip), tmp_path / "noise.wav", str(tmp_path / "noise.wav")):
        torch.testing.assert_close(encoder(one), expected)
        assert [len(frames) for frames in encoder.frames(one)] == [(800 - RECEPTIVE) // HOP + 1]
        assert [tuple(waveform.shape) for waveform in encoder.prepare(one)] == [(800,)]
    torch.testing.assert_close(encoder(one for one in (clip, clip)), encoder(np.stack([clip, clip])))
    assert encoder([]).shape == (0, 16)
    assert encoder.features([]).x.shape == (0, 0, 16)
    assert encoder.frames([]) == encoder.prepare([]) == []
    for wrong in (3, None, [3.0], [None]):
        with pytest.raises(SampleError, match="a clip is a path or a waveform"):
            encoder(wrong)  # type: ignore[arg-type]


def test_no_run_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run there"):
        load_encoder(tmp_path)
