"""From a shard's sample to an example and a batch: crops, normalisation, labels of clips and frames, padding."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data2vec.core.batch import Example, Sample
from data2vec.core.errors import SampleError
from data2vec.speech.audio import decode
from data2vec.speech.loader import AudioConfig, AudioDecoder, collate_audio, frame_count, length_of

NOISE = np.random.default_rng(0).normal(size=20_000).clip(-4, 4) / 5


def flac(x: np.ndarray, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, x, rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


NOISE_FLAC = flac(NOISE)


def sample(data: bytes = NOISE_FLAC, extension: str = "flac", **members: bytes) -> Sample:
    return Sample(key="a", shard="train-000000.tar", id=7, members={extension: data, **members})


def place_of(crop: torch.Tensor) -> int:
    """Where in the noise a crop that is not normalised begins."""
    whole, x = decode(NOISE_FLAC), crop.numpy()
    starts = np.flatnonzero(whole[: len(whole) - len(x) + 1] == x[0])
    (place,) = [int(start) for start in starts if np.array_equal(whole[start : start + len(x)], x)]
    return place


def decoder(train: bool = False, minimum: int = 400, **audio: object) -> AudioDecoder:
    return AudioDecoder(AudioConfig(**{"min_length": 1000, "max_length": None, **audio}), train, minimum)


@pytest.mark.parametrize("loudness", [1.0, 0.01])
def test_clips_are_normalised(loudness: float) -> None:
    x = decoder()(sample(flac(NOISE * loudness + 0.1)), 0).inputs
    assert x.dtype is torch.float32
    assert x.shape == (20_000,)
    assert abs(float(x.mean())) < 1e-5
    assert float(x.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_without_normalisation_the_waveform_is_as_it_is() -> None:
    x = decoder(normalise=False)(sample(), 0).inputs
    assert np.array_equal(x.numpy(), decode(NOISE_FLAC))


def test_evaluation_takes_the_middle() -> None:
    x = decoder(max_length=5000, normalise=False)(sample(), 3).inputs
    assert np.array_equal(x.numpy(), decode(NOISE_FLAC)[7500:12_500])


def test_training_crops_are_decided_by_the_seed_alone() -> None:
    decode_train = decoder(train=True, max_length=5000, normalise=False)
    places = set()
    for seed in range(40):
        torch.manual_seed(1 - seed % 2)  # of the process: must not matter
        x = decode_train(sample(), seed).inputs
        torch.manual_seed(2)
        assert torch.equal(x, pickle.loads(pickle.dumps(decode_train))(sample(), seed).inputs)
        places.add(place_of(x))
    assert len(places) > 30
    assert min(places) < 3000
    assert max(places) > 12_000


def test_statistics_are_those_of_the_whole_clip() -> None:
    x = np.concatenate([NOISE[:10_000], NOISE[10_000:] * 0.1])
    crop = decoder(max_length=5000)(sample(flac(x)), 0).inputs
    whole = decoder()(sample(flac(x)), 0).inputs
    assert torch.equal(crop, whole[7500:12_500])


def test_short_clips_are_left_out_of_training_only() -> None:
    short = sample(flac(NOISE[:900]))
    assert decoder()(short, 0).inputs.shape == (900,)
    with pytest.raises(SampleError, match="900 samples at 16 kHz; at least 1000"):
        decoder(train=True)(short, 0)
    with pytest.raises(SampleError, match="399 samples at 16 kHz; at least 400"):
        decoder()(sample(flac(NOISE[:399])), 0)
    assert decoder()(sample(flac(NOISE[:400])), 0).inputs.shape == (400,)


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_silence(level: float) -> None:
    with pytest.raises(SampleError, match="silent"):
        decoder()(sample(flac(np.full(2000, level))), 0)


@pytest.mark.parametrize(("text", "label"), [(b"7", 7), (b" 12\n", 12), (None, None)])
def test_labels(text: bytes | None, label: int | None) -> None:
    members = {} if text is None else {"cls": text}
    assert decoder()(sample(**members, txt=b"HELLO"), 0).label == label


@pytest.mark.parametrize("text", [b"", b"-1", b"seven", b"1.0", b"9" * 10, "\u0667".encode()])
def test_labels_that_are_no_class_number(text: bytes) -> None:
    assert decoder()(sample(cls=text), 0).label is None


def test_members_without_audio() -> None:
    with pytest.raises(SampleError, match="no audio: members are jpg, expected one of flac, wav, ogg"):
        decoder()(sample(extension="jpg"), 0)
    with pytest.raises(SampleError, match="no audio"):
        length_of({"cls": b"0"})


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
def test_length_of_is_the_length_of_the_example(rate: int) -> None:
    raw = sample(flac(NOISE, rate))
    assert length_of(raw.members) == len(decoder()(raw, 0).inputs)


def test_frame_labels_are_the_class_at_the_centre_of_a_frame() -> None:
    # Frames of 400 samples every 320: centres at 200, 520, 840, 1160, 1480, ...
    labels = decoder()(sample(frames=b"520 3\n839 4\n1161 -1\n1300 5"), 0).position_labels
    assert labels is not None
    assert labels.dtype is torch.int64
    assert labels[:6].tolist() == [-1, 3, 4, 4, 5, 5]
    assert len(labels) == (20_000 - 400) // 320 + 1


@given(st.lists(st.tuples(st.integers(0, 19_999), st.integers(-1, 40)), max_size=30), st.integers(0, 99))
@settings(max_examples=50)
def test_frame_labels_follow_the_crop(segments: list[tuple[int, int]], seed: int) -> None:
    segments = sorted(dict(segments).items())
    text = "".join(f"{start} {label}\n" for start, label in segments).encode()
    by_sample = np.full(20_000, -1)
    for start, label in segments:
        by_sample[start:] = label
    settings_ = AudioConfig(min_length=1000, max_length=6000, normalise=False)
    example = AudioDecoder(settings_, True, 100, hop=160, receptive=300)(sample(frames=text), seed)
    centres = place_of(example.inputs) + 150 + 160 * np.arange((6000 - 300) // 160 + 1)
    assert example.position_labels is not None
    assert example.position_labels.tolist() == by_sample[centres].tolist()


@pytest.mark.parametrize(
    "text",
    [b"a", b"1", b"1 2 3", b"1.5 2", b"-1 2", b"1  2", b"5 1\n5 2", b"6 1\n5 2", b"20000 1", b"1 -2", b"0 1\n\n"],
)
def test_frame_labels_that_are_none(text: bytes) -> None:
    example = decoder()(sample(frames=text), 0)
    assert torch.equal(example.inputs, decoder()(sample(), 0).inputs)
    assert example.position_labels is None
    assert example.unused["frames"].startswith("frames: ")


@pytest.mark.parametrize("convolutions", [[(10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)], [(8, 4), (5, 3)]])
@given(length=st.integers(0, 5000))
def test_frames_are_those_of_the_convolutions(convolutions: list[tuple[int, int]], length: int) -> None:
    receptive, hop = 1, 1
    frames = length
    for kernel, stride in convolutions:
        receptive, hop = receptive + (kernel - 1) * hop, hop * stride
        frames = max(0, (frames - kernel) // stride + 1)
    assert frame_count(length, hop, receptive) == frames


def test_a_batch_is_padded() -> None:
    first = decoder()(sample(flac(NOISE[:3000]), cls=b"4", frames=b"0 2"), 0)
    second = decoder()(sample(flac(NOISE[:5000])), 0)
    samples = [Sample("a", "s.tar", 1, {}), Sample("b", "s.tar", 2, {})]
    batch = collate_audio("speech", samples, [first, second])
    assert batch.modality == "speech"
    assert torch.equal(batch.inputs[0, :3000], first.inputs)
    assert not batch.inputs[0, 3000:].any()
    assert torch.equal(batch.inputs[1], second.inputs)
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [3000, 5000]
    assert batch.ids.tolist() == [1, 2]
    assert batch.labels.tolist() == [4, -1]
    assert batch.keys == ("s.tar:a", "s.tar:b")
    assert batch.position_labels is not None
    assert batch.position_labels.shape == (2, (5000 - 400) // 320 + 1)
    known = (3000 - 400) // 320 + 1
    assert (batch.position_labels[0, :known] == 2).all()
    assert (batch.position_labels[0, known:] == -1).all()
    assert (batch.position_labels[1] == -1).all()
    assert collate_audio("speech", samples[1:], [second]).position_labels is None


def test_position_labels_of_another_hop_are_refused() -> None:
    example = Example(torch.zeros(1000), None, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="5 position labels for 2 frames"):
        collate_audio("speech", [sample()], [example])
