"""Decoding audio: every format and rate, the same samples from both decoders, and every kind of broken file."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from data2vec.core.errors import SampleError
from data2vec.speech import audio
from data2vec.speech.audio import decode, native_decoder, read_header, resample, resampled_length, soundfile_decoder

NOISE = np.random.default_rng(0).normal(size=(4000, 2)).clip(-4, 4) / 5
FORMATS = [
    ("FLAC", "PCM_S8"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("WAV", "PCM_U8"), ("WAV", "PCM_16"),
    ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("OGG", "VORBIS"), ("OGG", "OPUS"),
]  # fmt: skip


def encoded(x: np.ndarray, rate: int = 16_000, kind: str = "FLAC", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, x, rate, format=kind, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("kind", "subtype"), FORMATS)
def test_both_decoders_give_the_same_samples_of_every_format(kind: str, subtype: str, channels: int) -> None:
    data = encoded(NOISE[:, :channels], kind=kind, subtype=subtype)
    native, other = native_decoder()(data), soundfile_decoder()(data)
    assert native.dtype == other.dtype == np.float32
    assert native.shape == other.shape == (len(NOISE), channels)
    assert np.array_equal(native, other)
    waveform = decode(data)
    assert np.allclose(waveform, native.mean(axis=1), atol=1e-7)
    if kind != "OGG":  # the others lose no more than their steps
        step = {"PCM_S8": 2**-7, "PCM_U8": 2**-7, "PCM_16": 2**-15}.get(subtype, 2**-22)
        assert np.abs(waveform - NOISE[:, :channels].mean(axis=1)).max() <= step


@pytest.mark.parametrize("unavailable", [ImportError, OSError])
def test_without_fairseq2_soundfile_decodes(monkeypatch: pytest.MonkeyPatch, unavailable: type[Exception]) -> None:
    def fail() -> None:
        raise unavailable

    expected = decode(data := encoded(NOISE, 22_050))
    monkeypatch.setattr(audio, "native_decoder", fail)
    audio._decoder.cache_clear()
    try:
        assert np.array_equal(decode(data), expected)
        assert audio._decoder().__qualname__.startswith("soundfile_decoder")
        with pytest.raises(SampleError, match="damaged or cut short"):
            decode(data[:1000])
    finally:
        audio._decoder.cache_clear()


@given(st.integers(1, 3000), st.sampled_from([4000, 8000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 50_001]))
@settings(max_examples=60)
def test_the_header_tells_the_decoded_length(frames: int, rate: int) -> None:
    data = encoded(NOISE[:frames, 0], rate, "WAV")
    header = read_header(data)
    assert (header.frames, header.rate, header.channels) == (frames, rate, 1)
    assert header.length == resampled_length(frames, rate) == len(decode(data))


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_resampling_keeps_a_tone_and_removes_what_16_khz_cannot_hold(rate: int) -> None:
    def tone(frequency: float, rate: int) -> np.ndarray:
        return np.sin(2 * np.pi * frequency * np.arange(rate) / rate).astype(np.float32)

    low = resample(tone(1000.0, rate), rate)
    assert low.dtype == np.float32
    assert np.abs(low - tone(1000.0, 16_000))[200:-200].max() < 0.01
    if rate > 2 * 9500:
        assert np.abs(resample(tone(9500.0, rate), rate))[200:-200].max() < 0.01


def test_the_cached_filter_is_the_default_one() -> None:
    from scipy.signal import resample_poly

    x = NOISE[:, 0].astype(np.float32)
    assert np.allclose(resample(x, 22_050), resample_poly(x, 320, 441), atol=1e-6)


def test_channels_are_averaged() -> None:
    left, right = NOISE[:, 0], NOISE[:, 1]
    assert np.allclose(decode(encoded(NOISE, kind="WAV", subtype="FLOAT")), (left + right) / 2, atol=1e-6)
    opposite = np.stack([left, -left], axis=1)
    assert np.abs(decode(encoded(opposite, kind="WAV", subtype="FLOAT"))).max() == 0


def test_no_audio() -> None:
    for data, message in (
        (b"", "is empty"),
        (b"plain text" * 100, "no usable audio"),
        (encoded(NOISE[:0], kind="WAV"), "holds no audio"),
        (encoded(NOISE[:, 0], kind="AIFF"), "AIFF"),
    ):
        with pytest.raises(SampleError, match=message):
            decode(data)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_values_that_are_not_finite(value: float, rate: int) -> None:
    x = NOISE.copy()
    x[1234, 0] = value
    with pytest.raises(SampleError, match="not finite"):
        decode(encoded(x, rate, "WAV", "FLOAT"))


def test_damaged_and_truncated_flac() -> None:
    data = encoded(NOISE[:, 0])
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 255
    for damaged in (data[: len(data) // 2], data[:-100], bytes(flipped), data[:60]):
        with pytest.raises(SampleError) as caught:
            decode(damaged)
        assert "bug report" not in str(caught.value)
        assert "0x" not in str(caught.value)


@given(st.binary(max_size=300), st.integers(0, 400))
@settings(max_examples=100)
def test_damage_never_raises_anything_else(junk: bytes, place: int) -> None:
    data = encoded(NOISE[:600, 0])
    try:
        waveform = decode(data[:place] + junk + data[place + len(junk) :])
    except SampleError:
        return
    assert waveform.dtype == np.float32
    assert np.isfinite(waveform).all()


def test_a_small_file_that_claims_hours_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(encoded(NOISE[:, 0]))
    # STREAMINFO: 4 bytes "fLaC", 4 of a block header, 10 of sizes, then rate (20 bits), channels (3), bits (5) and
    # samples in all (36).
    (packed,) = struct.unpack_from(">Q", data, 18)
    struct.pack_into(">Q", data, 18, packed >> 36 << 36 | (2**36 - 1))
    monkeypatch.setattr(audio, "_decoder", lambda: pytest.fail("was decoded"))
    with pytest.raises(SampleError, match="cut recordings into clips"):
        decode(bytes(data))


def test_a_header_that_claims_more_than_there_is() -> None:
    data = bytearray(encoded(NOISE[:, 0]))
    (packed,) = struct.unpack_from(">Q", data, 18)
    struct.pack_into(">Q", data, 18, packed >> 36 << 36 | 8000)
    with pytest.raises(SampleError):
        decode(bytes(data))


@pytest.mark.parametrize(("rate", "channels"), [(1000, 1), (500_000, 1), (16_000, 40)])
def test_rates_and_channels_that_cannot_be_meant(rate: int, channels: int) -> None:
    with pytest.raises(SampleError, match="channels at"):
        decode(encoded(np.zeros((100, channels)), rate, "WAV"))
