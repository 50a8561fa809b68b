"""Log-mel spectrograms: what probes compare with, and what the report shows.

Windows of 25 ms every 10 ms, 80 mel bands from 20 Hz to 8 kHz. Bands are triangles, equally wide on the mel scale
``2595 log10(1 + f / 700)`` (O'Shaughnessy 1987, Speech Communication, p. 150).

Shapes: B clips, L samples at 16 kHz, N windows, T frames of the extractor, F = 80 bands.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.speech.audio import RATE

BANDS = 80
WINDOW = 400  # samples
STEP = 160  # samples from one window to the next
_POINTS = 1024  # of the Fourier transform: with 512 the lowest bands would hold no coefficient
_LOWEST = 20.0  # Hz, of the first band
_FLOOR = 1e-6  # of a band's energy, before the logarithm: about -60 dB of a clip with unit variance


def log_mel(waveforms: Tensor) -> Tensor:
    """(B, L) float to (B, N, 80): natural logarithm of the energy in each band.

    Window n begins at sample ``160 n``; N is ``(L - 400) // 160 + 1``. A clip shorter than a window counts as if it
    was followed by silence: N is 1.
    """
    x = waveforms.float()
    if x.shape[-1] < WINDOW:
        x = torch.nn.functional.pad(x, (0, WINDOW - x.shape[-1]))
    window = torch.hann_window(WINDOW, device=x.device)
    spectrum = torch.fft.rfft(x.unfold(-1, WINDOW, STEP) * window, n=_POINTS)
    energy: Tensor = (spectrum.abs().square() / window.square().sum()) @ _filterbank().to(x.device)
    return energy.clamp(min=_FLOOR).log()


def log_mel_pooled(batch: Batch) -> Tensor:
    """(B, 160) mean and standard deviation over the valid windows of each band."""
    spectra, counts = log_mel(batch.inputs), window_counts(batch)
    valid = torch.arange(spectra.shape[1], device=spectra.device) < counts[:, None]
    weight = (valid / counts[:, None]).unsqueeze(-1)
    mean = (spectra * weight).sum(dim=1)
    variance = ((spectra - mean[:, None]).square() * weight).sum(dim=1)
    return torch.cat([mean, variance.sqrt()], dim=1)


def log_mel_frames(batch: Batch, frames: int, hop: int, receptive: int = 400) -> Tensor:
    """(B, T, 80) the spectrum at each frame: mean of the valid windows whose centre lies within half a hop of its own,
    or the nearest where there is none.

    Args:
        batch: of clips; what follows a clip's end changes nothing within it.
        frames: T.
        hop: waveform samples from one frame to the next.
        receptive: waveform samples that one frame sees; its centre is their middle.
    """
    spectra = log_mel(batch.inputs)
    last = window_counts(batch)[:, None] - 1  # (B, 1)
    place = (receptive - WINDOW) / 2 + hop * torch.arange(frames, dtype=torch.float64, device=spectra.device)
    lower, upper = ((place - hop / 2) / STEP).ceil(), ((place + hop / 2) / STEP).floor()
    nearest = (place / STEP).round()
    empty = lower > upper
    lower, upper = torch.where(empty, nearest, lower), torch.where(empty, nearest, upper)
    start = lower.long().clamp(min=0).minimum(last)  # (B, T)
    stop = upper.long().clamp(min=0).minimum(last) + 1
    # float64: a mean of few windows is a difference of long sums
    sums = torch.nn.functional.pad(spectra.double().cumsum(dim=1), (0, 0, 1, 0))
    bands = spectra.shape[2]
    total = _at(sums, stop, bands) - _at(sums, start, bands)
    return (total / (stop - start).unsqueeze(-1)).float()


def window_counts(batch: Batch) -> Tensor:
    """(B,) windows that lie within each clip, at least 1, on the device of the inputs."""
    most = max(1, (batch.inputs.shape[-1] - WINDOW) // STEP + 1)
    if batch.lengths is None:
        return torch.full((len(batch),), most, device=batch.inputs.device)
    return ((batch.lengths.to(batch.inputs.device) - WINDOW) // STEP + 1).clamp(1, most)


def _at(values: Tensor, places: Tensor, width: int) -> Tensor:
    return values.gather(1, places.unsqueeze(-1).expand(-1, -1, width))


def hertz_to_mel(hertz: Tensor) -> Tensor:
    """O'Shaughnessy's scale: 1000 mel at 1000 Hz."""
    return 2595.0 * torch.log10(1.0 + hertz / 700.0)


@lru_cache(maxsize=1)
def _filterbank() -> Tensor:
    """(513, 80) weight of each Fourier coefficient in each band."""
    places = hertz_to_mel(torch.linspace(0, RATE / 2, _POINTS // 2 + 1, dtype=torch.float64))
    lowest = float(hertz_to_mel(torch.tensor(_LOWEST, dtype=torch.float64)))
    edges = torch.linspace(lowest, float(places[-1]), BANDS + 2, dtype=torch.float64)
    rising = (places[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - places[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()
