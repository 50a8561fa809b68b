"""The report's pictures of speech: what the student sees and hears, and what the teacher's frames have in common.

Shapes: B clips, L samples at 16 kHz, T frames, M masks, D width, N windows of a spectrogram.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.exhibit import Illustrations, Panel
from data2vec.core.report.pictures import image, png
from data2vec.speech.audio import RATE
from data2vec.speech.features import BANDS, log_mel
from data2vec.speech.loader import frame_count

_SHOWN = 6  # clips
_SHOWN_MASKS = 2
_WIDTH, _HEIGHT = 640, 160  # pixels of the longest spectrogram
_STRIP = 36  # pixels, height of the features
_QUIETEST = 20.0  # percentile of a clip's energies, below which all is black: pauses and faint noise
_HATCH_LIGHT, _HATCH_DARK = 226, 202
_LONGEST_PLAYER = 10  # s
_LOUDEST = 0.8  # of full scale
_WIDEST_FIELD = 8  # hops that a frame may see: more than any extractor's

Picture = NDArray[np.uint8]
Value = TypeVar("Value", bound=np.generic)


@dataclass(frozen=True)
class _Clip:
    """One clip of the batch without its padding."""

    number: int  # in the batch
    waveform: Tensor  # (L,)
    frames: int
    picture: Picture  # its spectrogram, (H, W, 3)
    share: float  # of the longest clip shown

    @property
    def seconds(self) -> float:
        return len(self.waveform) / RATE


def panels(drawn: Illustrations, *, hop: int, receptive: int | None = None) -> list[Panel]:
    """Spectrograms with the hidden spans hatched and a player, and the frame features' components as colours.

    Args:
        drawn: ``batch.inputs`` (B, L), normalised waveforms, with ``batch.lengths`` where padded. The longest six are
            shown; the components are those of all.
        hop: waveform samples from one frame to the next.
        receptive: waveform samples that one frame sees; by default what L and T leave room for.

    Raises:
        ValueError: hop, frames and length of the clips do not belong together.
    """
    length, (frames,) = drawn.batch.inputs.shape[1], drawn.shape
    room = length - (frames - 1) * hop
    if not 0 < room <= _WIDEST_FIELD * hop:
        raise ValueError(f"{frames} frames, {hop} samples apart, do not cover {length} samples")
    receptive = max(1, room - hop // 2) if receptive is None else receptive
    lengths = drawn.batch.lengths
    sizes = [length] * len(drawn.batch) if lengths is None else [int(size) for size in lengths.tolist()]
    valid = [min(frames, max(1, frame_count(size, hop, receptive))) for size in sizes]
    clips = _chosen(drawn.batch.inputs, sizes, valid)
    offset = (receptive - hop) / 2
    return [_masked_panel(clips, drawn.mask, hop, offset), _components_panel(clips, drawn.features, valid, hop, offset)]


def players(batch: Batch) -> list[str]:
    """A spectrogram with a player for each clip of a batch."""
    length = batch.inputs.shape[1]
    sizes = [length] * len(batch) if batch.lengths is None else [int(size) for size in batch.lengths.tolist()]
    cards = []
    for number, size in enumerate(sizes):
        waveform = batch.inputs[number, :size].detach().float().cpu()
        clip = _Clip(number, waveform, 0, _spectrogram(waveform, 1.0), 1.0)
        cards.append(f"{_picture(clip, clip.picture, 'spectrogram')}{_player(clip)}")
    return cards


def _chosen(inputs: Tensor, sizes: Sequence[int], valid: Sequence[int]) -> list[_Clip]:
    """The longest clips, in the order of the batch: there is more to see in them than in single words."""
    longest = sorted(sorted(range(len(sizes)), key=lambda number: -sizes[number])[:_SHOWN])
    most = max(sizes[number] for number in longest)
    clips = []
    for number in longest:
        waveform = inputs[number, : sizes[number]].detach().float().cpu()
        share = sizes[number] / most
        clips.append(_Clip(number, waveform, valid[number], _spectrogram(waveform, share), share))
    return clips


def _masked_panel(clips: Sequence[_Clip], mask: Tensor, hop: int, offset: float) -> Panel:
    count = mask.shape[1]
    shown = min(count, _SHOWN_MASKS)
    cards = []
    for clip in clips:
        card = [(_picture(clip, clip.picture, "spectrogram"), f"clip, {clip.seconds:.1f} s"), (_player(clip), "")]
        for number in range(shown):
            hidden = mask[clip.number, number, : clip.frames].cpu().numpy()
            view = _hide(clip.picture, _at_columns(hidden, clip, hop, offset))
            card.append((_picture(clip, view, "spectrogram with hidden spans"), _view_name(number, shown)))
        cards.append(card)
    hidden_share = np.mean([float(mask[clip.number, :, : clip.frames].float().mean()) for clip in clips])
    several = f" Each clip is seen under {count} masks" if count > 1 else ""
    several += f", of which {shown} are shown." if count > shown else "." if several else ""
    caption = (
        f"Spectrograms: time runs to the right, frequency up to 8 kHz, on the mel scale. Hatched spans are hidden from "
        f"the student, {100 * hidden_share:.0f} % on average. The teacher hears the whole clip, and the student "
        f"predicts the teacher's features of the hidden frames.{several}"
    )
    return Panel("What the student hears", caption, _grid(cards))


def _components_panel(clips: Sequence[_Clip], features: Tensor, valid: Sequence[int], hop: int, offset: float) -> Panel:
    colours = _components([x[:count] for x, count in zip(features, valid, strict=True)])
    cards = []
    for clip in clips:
        row = _at_columns(colours[clip.number], clip, hop, offset)
        strip = np.repeat(row[None], _STRIP, axis=0)
        cards.append([
            (_picture(clip, clip.picture, "spectrogram"), ""),
            (_picture(clip, strip, "principal components of the frame features"), f"features, {clip.seconds:.1f} s"),
        ])  # fmt: skip
    caption = (
        f"The first three principal components of the teacher's frame features, over {len(valid)} clips, as red, green "
        "and blue under the spectrogram. Frames that the teacher finds alike have like colours, within a clip and "
        "across clips."
    )
    return Panel("Frame features", caption, _grid(cards))


def _view_name(number: int, shown: int) -> str:
    return "student" if shown == 1 else f"student, mask {number + 1}"


def _spectrogram(waveform: Tensor, share: float) -> Picture:
    """(H, W, 3) the waveform's log-mel spectrogram, low frequencies at the bottom."""
    from matplotlib import colormaps

    energy = log_mel(waveform[None])[0].numpy()  # (N, 80)
    low, high = np.percentile(energy, _QUIETEST), float(energy.max())
    scaled = (energy - low) / max(high - low, 1e-6)
    width = max(_WIDTH // 16, round(_WIDTH * share))
    columns = np.arange(width) * len(energy) // width
    rows = np.arange(_HEIGHT)[::-1] * BANDS // _HEIGHT
    picture: Picture = colormaps["magma"](scaled[columns][:, rows].T.clip(0, 1), bytes=True)[:, :, :3]
    return np.ascontiguousarray(picture)


def _at_columns(values: NDArray[Value], clip: _Clip, hop: int, offset: float) -> NDArray[Value]:
    """Take what stands at a clip's frames (T, ...) to each pixel column of its spectrogram (W, ...).

    ``offset``: samples from the beginning of the clip to where the first frame's hop begins, around its centre.
    """
    width = clip.picture.shape[1]
    samples = (np.arange(width) + 0.5) * len(clip.waveform) / width
    frame = np.floor((samples - offset) / hop).astype(np.int64)
    taken: NDArray[Value] = values[frame.clip(0, clip.frames - 1)]
    return taken


def _hide(picture: Picture, hidden: NDArray[np.bool_]) -> Picture:
    """The picture with the columns ``hidden`` (W,) under a grey hatch."""
    rows, columns = np.indices(picture.shape[:2])
    hatch = np.where(((rows + columns) // 4) % 3 == 0, _HATCH_DARK, _HATCH_LIGHT).astype(np.uint8)
    return np.where(hidden[None, :, None], hatch[:, :, None], picture)


def _components(features: Sequence[Tensor]) -> list[Picture]:
    """B clips (T, D) to B pictures (T, 3): three principal components, from their 1st to their 99th percentile."""
    flat = torch.cat([x.detach().float().cpu() for x in features])
    flat = flat - flat.mean(dim=0)
    _, _, axes = torch.linalg.svd(flat, full_matrices=False)
    axes = axes[:3]
    # An axis has no sign of its own; the largest entry is made positive, so that the colours do not flip.
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    projected = flat @ (axes * torch.where(largest < 0, -1.0, 1.0)).T
    projected = torch.nn.functional.pad(projected, (0, 3 - projected.shape[1])).numpy()
    low, high = np.percentile(projected, [1, 99], axis=0)
    # An axis without variance is rounding noise, and stretching it would show a pattern that is not there.
    flat_axis = high - low <= max(1e-4 * float((high - low).max()), 1e-12)
    stretched = np.where(flat_axis, 0.5, (projected - low) / np.where(flat_axis, 1.0, high - low)).clip(0, 1)
    pixels = (stretched * 255).round().astype(np.uint8)
    return np.split(pixels, np.cumsum([len(x) for x in features])[:-1])


def _player(clip: _Clip) -> str:
    """An ``audio`` element that holds the clip, or its first seconds, as flac."""
    import soundfile

    waveform = clip.waveform[: _LONGEST_PLAYER * RATE].numpy()
    loudest = max(float(np.abs(waveform).max()), 1e-6)  # normalised waveforms exceed full scale
    file = io.BytesIO()
    soundfile.write(file, waveform * (_LOUDEST / loudest), RATE, format="FLAC", subtype="PCM_16")
    uri = "data:audio/flac;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    style = "width:100%;max-width:420px;height:32px;display:block"
    return f'<audio controls preload="metadata" src="{uri}" style="{style}"></audio>'


def _picture(clip: _Clip, picture: Picture, alt: str) -> str:
    """As wide as the clip is long beside the others."""
    return f'<div style="width:{100 * clip.share:.1f}%">{image(png(picture), alt)}</div>'


def _grid(cards: Sequence[Sequence[tuple[str, str]]]) -> str:
    """Cards in two columns, on a narrow page in one; a card's elements stand under one another, over their captions."""
    parts = []
    for card in cards:
        cells = []
        for element, caption in card:
            text = (
                f'<figcaption style="font-size:11px;color:#6b7280;padding-top:3px">{html.escape(caption)}</figcaption>'
            )
            cells.append(f'<figure style="margin:0;min-width:0">{element}{text if caption else ""}</figure>')
        parts.append(f'<div style="display:grid;gap:6px;align-content:start">{"".join(cells)}</div>')
    columns = "repeat(auto-fill,minmax(min(100%,max(330px,46%)),1fr))"
    return f'<div style="display:grid;gap:26px;grid-template-columns:{columns}">{"".join(parts)}</div>'
