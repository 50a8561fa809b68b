"""Log-mel spectra: where a tone shows, what loudness does, and that padding changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data2vec.core.batch import Batch
from data2vec.speech import features
from data2vec.speech.features import BANDS, hertz_to_mel, log_mel, log_mel_frames, log_mel_pooled


def batch(*waveforms: torch.Tensor, lengths: bool = True) -> Batch:
    inputs = torch.zeros(len(waveforms), max(len(x) for x in waveforms))
    for row, x in zip(inputs, waveforms, strict=True):
        row[: len(x)] = x
    count = len(waveforms)
    sizes = torch.tensor([len(x) for x in waveforms]) if lengths else None
    return Batch("speech", inputs, torch.arange(count), torch.full((count,), -1), sizes)


def noise(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed))


def test_the_scale() -> None:
    assert float(hertz_to_mel(torch.tensor(0.0))) == 0
    assert float(hertz_to_mel(torch.tensor(1000.0))) == pytest.approx(1000, abs=0.1)


def test_every_band_holds_a_coefficient_and_every_coefficient_within_lies_in_two_bands() -> None:
    bank = features._filterbank()
    assert (bank.sum(dim=0) > 0.3).all()
    centre = bank.argmax(dim=0)
    inner = bank[centre[0] + 1 : centre[-1]]
    torch.testing.assert_close(inner.sum(dim=1), torch.ones(len(inner)))  # triangles that overlap by half


@pytest.mark.parametrize("frequency", [100.0, 440.0, 1000.0, 3000.0, 7000.0])
def test_a_tone_shows_in_its_band(frequency: float) -> None:
    x = torch.sin(2 * math.pi * frequency * torch.arange(16_000) / 16_000)
    spectrum = log_mel(x[None])[0]
    assert spectrum.shape == ((16_000 - 400) // 160 + 1, BANDS)
    low, high = (float(hertz_to_mel(torch.tensor(f))) for f in (20.0, 8000.0))
    expected = (float(hertz_to_mel(torch.tensor(frequency))) - low) / (high - low) * (BANDS + 1) - 1
    assert (spectrum.argmax(dim=1) - expected).abs().max() <= 1


def test_loudness_shifts_the_logarithm() -> None:
    x = noise(8000)
    assert torch.allclose(log_mel(10 * x[None]) - log_mel(x[None]), torch.tensor(math.log(100)), atol=1e-3)
    assert torch.isfinite(log_mel(torch.zeros(1, 8000))).all()
    assert log_mel(noise(100)[None]).shape == (1, 1, BANDS)


def test_white_noise_of_unit_power_has_unit_energy_at_every_frequency() -> None:
    energy = log_mel(noise(160_000)[None])[0].exp().mean(dim=0)
    torch.testing.assert_close(energy / features._filterbank().sum(dim=0), torch.ones(BANDS), atol=0.15, rtol=0)


def test_pooled_is_mean_and_deviation() -> None:
    x = noise(16_000)
    spectrum = log_mel(x[None])[0]
    expected = torch.cat([spectrum.mean(dim=0), spectrum.std(dim=0, correction=0)])
    torch.testing.assert_close(log_mel_pooled(batch(x))[0], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_mel_pooled(batch(x, lengths=False))[0], expected, atol=1e-4, rtol=1e-4)


@given(st.integers(100, 6000), st.integers(0, 4000), st.sampled_from([(320, 400), (160, 400), (80, 210), (640, 1000)]))
@settings(max_examples=40)
def test_padding_changes_nothing(length: int, padding: int, grid: tuple[int, int]) -> None:
    hop, receptive = grid
    x = noise(length)
    alone, padded = batch(x), batch(x, noise(length + padding, 1))
    torch.testing.assert_close(log_mel_pooled(padded)[0], log_mel_pooled(alone)[0], atol=1e-4, rtol=1e-4)
    frames = max(0, (length - receptive) // hop + 1)
    for one in (alone, padded):
        assert log_mel_frames(one, frames, hop, receptive).shape == (len(one), frames, BANDS)
    torch.testing.assert_close(
        log_mel_frames(padded, frames, hop, receptive)[0], log_mel_frames(alone, frames, hop, receptive)[0]
    )


def test_frames_are_means_of_the_windows_around_their_centres() -> None:
    x = noise(8000)
    spectrum = log_mel(x[None])[0]
    frames = log_mel_frames(batch(x), 24, 320)[0]
    # Frame i and window 2 i have the same centre; half a hop on either side is one window.
    torch.testing.assert_close(frames[5], spectrum[9:12].mean(dim=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(frames[0], spectrum[:2].mean(dim=0), atol=1e-4, rtol=1e-4)
    fine = log_mel_frames(batch(x), 40, 100)[0]
    torch.testing.assert_close(fine[8], spectrum[5], atol=1e-4, rtol=1e-4)
    # The middle of 720 samples is a window's 160 samples later.
    later = log_mel_frames(batch(x), 20, 160, receptive=720)[0]
    torch.testing.assert_close(later[3], spectrum[4], atol=1e-4, rtol=1e-4)
