"""The report's pictures of speech."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
import torch
from matplotlib.image import imread

from data2vec.core.batch import Batch
from data2vec.core.exhibit import Illustrations, Panel
from data2vec.speech.panels import panels

HOP = 320


def drawn(masks: int = 1, lengths: tuple[int, ...] = (20_000, 9000, 16_000, 4000), width: int = 8) -> Illustrations:
    generator = torch.Generator().manual_seed(masks)
    longest = max(lengths)
    inputs = torch.zeros(len(lengths), longest)
    for row, length in zip(inputs, lengths, strict=True):
        row[:length] = torch.randn(length, generator=generator)
    frames = (longest - 400) // HOP + 1
    batch = Batch("speech", inputs, torch.arange(len(lengths)), torch.full((len(lengths),), -1), torch.tensor(lengths))
    mask = torch.rand(len(lengths), masks, frames, generator=generator) < 0.5
    return Illustrations(batch, mask, torch.randn(len(lengths), frames, width, generator=generator), (frames,))


def pictures(panel: Panel) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', panel.html)
    return [(imread(io.BytesIO(base64.b64decode(one)))[:, :, :3] * 255).round().astype(np.uint8) for one in found]


def columns(picture: np.ndarray, length: int) -> np.ndarray:
    """The frame that each pixel column shows, nearest to its centre, without the frames at the ends."""
    samples = (np.arange(picture.shape[1]) + 0.5) * length / picture.shape[1]
    frames = (length - 400) // HOP + 1
    return np.clip(np.round((samples - 200) / HOP), 0, frames - 1).astype(int)


def test_visible_frames_are_the_spectrogram_and_hidden_ones_are_not() -> None:
    shown = drawn()
    first, _ = panels(shown, hop=HOP, receptive=400)
    found = pictures(first)
    assert len(found) == 8
    for number, length in enumerate((20_000, 9000, 16_000, 4000)):
        original, masked = found[2 * number : 2 * number + 2]
        hidden = shown.mask[number, 0].numpy()[columns(original, length)]
        # A column at the border of two frames may belong to either.
        inner = np.diff(columns(original, length), prepend=-1, append=9999)
        safe = (inner[:-1] == 0) & (inner[1:] == 0)
        assert np.array_equal(masked[:, safe & ~hidden], original[:, safe & ~hidden])
        assert set(masked[:, safe & hidden].ravel().tolist()) == {202, 226}
        assert (safe & hidden).sum() > 10


def test_longer_clips_are_wider_and_the_longest_are_shown() -> None:
    lengths = (4000, 20_000, 5000, 6000, 10_000, 7000, 8000, 9000)
    first, second = panels(drawn(lengths=lengths), hop=HOP)
    widths = re.findall(r'<div style="width:([0-9.]+)%">', first.html)[::2]
    assert widths == [f"{length / 200:.1f}" for length in lengths if length > 5000]
    assert pictures(first)[0].shape[1] == 2 * pictures(first)[4].shape[1]
    assert len(pictures(second)) == 12


@pytest.mark.parametrize(("masks", "shown"), [(2, 2), (8, 2)])
def test_several_masks_stand_under_the_original(masks: int, shown: int) -> None:
    panel = panels(drawn(masks), hop=HOP)[0]
    assert len(pictures(panel)) == 4 * (1 + shown)
    assert f"under {masks} masks" in panel.caption


def test_the_player_holds_the_clip() -> None:
    shown = drawn()
    players = re.findall(r'src="data:audio/flac;base64,([^"]+)"', panels(shown, hop=HOP)[0].html)
    assert len(players) == 4
    x, rate = soundfile.read(io.BytesIO(base64.b64decode(players[1])), dtype="float32")
    assert rate == 16_000
    assert len(x) == 9000
    assert np.abs(x).max() == pytest.approx(0.8, abs=1e-3)
    assert np.corrcoef(x, shown.batch.inputs[1, :9000].numpy())[0, 1] > 0.9999
    long = panels(drawn(lengths=(400_000,)), hop=HOP)[0].html
    (player,) = re.findall(r'src="data:audio/flac;base64,([^"]+)"', long)
    assert soundfile.info(io.BytesIO(base64.b64decode(player))).frames == 160_000


def test_like_frames_have_like_colours() -> None:
    shown = drawn()
    direction = torch.randn(8)
    frames = shown.features.shape[1]
    shown.features[:] = torch.where((torch.arange(frames) % 2 == 0)[None, :, None], direction, -direction)
    strips = pictures(panels(shown, hop=HOP, receptive=400)[1])[1::2]
    assert [strip.shape[0] for strip in strips] == [36] * 4
    for strip in strips:
        colours = {tuple(colour) for colour in strip[0].tolist()}
        assert colours == {(0, 128, 128), (255, 128, 128)}
        assert (strip == strip[0]).all()


def test_features_of_padding_change_nothing() -> None:
    shown = drawn()
    before = panels(shown, hop=HOP, receptive=400)[1]
    for number, length in enumerate((20_000, 9000, 16_000, 4000)):
        shown.features[number, (length - 400) // HOP + 1 :] = 1e6
    assert panels(shown, hop=HOP, receptive=400)[1] == before


def test_features_of_one_dimension_and_a_silent_batch() -> None:
    shown = drawn(width=1)
    shown.features[:] = 0
    shown.batch.inputs[:] = 0
    first, second = panels(shown, hop=HOP)
    assert len(pictures(first)) == len(pictures(second)) == 8


def test_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="do not cover"):
        panels(drawn(), hop=160)
    with pytest.raises(ValueError, match="do not cover"):
        panels(drawn(), hop=640)


def test_the_html_is_self_contained_and_closed() -> None:
    class Checker(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            for name, value in attrs:
                assert name not in ("src", "href") or str(value).startswith("data:")
            if tag != "img":
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    for panel in panels(drawn(2), hop=HOP):
        checker = Checker()
        checker.feed(panel.html)
        assert checker.open == []
