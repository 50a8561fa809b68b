"""Properties of the span masks."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data2vec.speech.masker import SpanMasker
from data2vec.speech.masker_reference import exact_span_mask_reference, span_mask_reference

IDS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6, unique=True)
SEEDS = st.integers(0, 2**63 - 1)
SPAN = SpanMasker()
EXACT = SpanMasker(0.5, 5, exact=True, adjust=0.05)


@st.composite
def maskers(draw: st.DrawFn) -> SpanMasker:
    length, masks = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    if draw(st.booleans()):
        return SpanMasker(draw(st.floats(0.01, 0.99)), length, masks, exact=True, adjust=draw(st.floats(0, 0.2)))
    return SpanMasker(draw(st.floats(0.01, 0.99)) * length, length, masks, min_spans=draw(st.integers(1, 3)))


@st.composite
def clips(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Numbers, frames, and the frames of the padded batch."""
    ids = draw(IDS)
    lengths = [draw(st.integers(2, 60)) for _ in ids]
    return torch.tensor(ids), torch.tensor(lengths), max(lengths) + draw(st.integers(0, 9))


@settings(max_examples=100)
@given(maskers(), clips(), SEEDS, st.integers(0, 10**6))
def test_some_frames_are_hidden_some_shown_and_none_in_the_padding(masker, batch, seed, update):
    ids, lengths, total = batch
    mask = masker(ids, (total,), seed=seed, update=update, lengths=lengths)
    assert mask.dtype is torch.bool
    assert mask.shape == (len(ids), masker.masks, total)
    counts = mask.sum(-1)
    assert (counts >= 1).all()
    assert (counts <= lengths[:, None] - 1).all()
    padding = torch.arange(total) >= lengths[:, None]
    assert not (mask & padding[:, None]).any()
    if masker.exact:
        expected = torch.tensor([min(max(int(masker.ratio * n + 1e-6), 1), n - 1) for n in lengths.tolist()])
        assert (counts == expected[:, None]).all()


@settings(max_examples=60)
@given(maskers(), clips(), SEEDS, st.integers(0, 10**6))
def test_a_padded_clip_has_the_masks_it_has_alone(masker, batch, seed, update):
    """So they depend neither on the padding nor on the other clips, their order, the rank, or a resumed run."""
    ids, lengths, total = batch
    mask = masker(ids, (total,), seed=seed, update=update, lengths=lengths)
    for row, number, length in zip(mask, ids, lengths.tolist(), strict=True):
        alone = masker(number[None], (length,), seed=seed, update=update)
        assert torch.equal(alone[0], row[:, :length])
    order = torch.randperm(len(ids))
    again = masker(ids[order], (total + 3,), seed=seed, update=update, lengths=lengths[order])
    assert torch.equal(again[..., :total], mask[order])


@settings(max_examples=60)
@given(st.integers(2, 200), SEEDS)
def test_spans_are_whole_where_the_clip_is_long_enough(total, seed):
    """Every run of hidden frames is a span or longer, unless the spans filled the clip or were cut off at its end."""
    masker = SpanMasker(0.3, 6)
    (row,) = masker(torch.tensor([5]), (total,), seed=seed, update=0)[0]
    edges = np.diff(np.concatenate([[0], row.numpy().astype(int), [0]]))
    runs = np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)
    if total > 20:
        assert runs.min() >= 6
        assert not row[-1]  # as in the authors' code


@pytest.mark.parametrize("masker", [SpanMasker(masks=3), SpanMasker(0.5, 5, 3, exact=True, adjust=0.05)])
def test_updates_seeds_clips_and_masks_differ(masker):
    ids = torch.arange(8)
    masks = torch.cat(
        [masker(ids, (200,), seed=seed, update=update).flatten(0, 1) for seed in (0, 1) for update in (0, 1, 2)]
    )
    assert len(torch.unique(masks, dim=0)) == len(masks)


@pytest.mark.parametrize("exact", [False, True])
def test_the_first_masks_do_not_depend_on_how_many_there_are(exact):
    few, many = (SpanMasker(0.5, 5, masks, exact=exact)(torch.arange(5), (80,), seed=3, update=4) for masks in (2, 7))
    assert torch.equal(few, many[:, :2])


@pytest.mark.parametrize("masker", [SPAN, EXACT])
def test_a_single_frame_cannot_be_masked(masker):
    with pytest.raises(ValueError, match="1 frames cannot be masked"):
        masker(torch.arange(2), (9,), seed=0, update=0, lengths=torch.tensor([9, 1]))


def test_the_published_masks_hide_what_they_should():
    long = torch.arange(200)
    assert float(SPAN(long, (1000,), seed=0, update=0).float().mean()) == pytest.approx(0.48, abs=0.01)
    exact = SpanMasker(0.5, 5, 8, exact=True, adjust=0.05)(long, (999,), seed=0, update=0)
    assert (exact.sum(-1) == 499).all()


def statistics(masks: np.ndarray) -> np.ndarray:
    """(N, 4 + T) of each mask: hidden share, runs, agreement of near and of far frames; and every frame."""
    near, far = (masks[:, lag:] == masks[:, :-lag] for lag in (1, min(4, masks.shape[1] - 1)))
    runs = (masks[:, 1:] & ~masks[:, :-1]).mean(1)
    return np.column_stack([masks.mean(1), runs, near.mean(1), far.mean(1), masks])


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Of the means of two sets of masks, over all statistics, in standard errors."""
    a, b = statistics(a), statistics(b)
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b)) + 1e-9
    return float((np.abs(a.mean(0) - b.mean(0)) / error).max())


@pytest.mark.parametrize("frames", [4, 9, 13, 60])
@pytest.mark.parametrize(("masker", "reference"), [(SPAN, span_mask_reference), (EXACT, exact_span_mask_reference)])
def test_the_distribution_is_the_references(masker, reference, frames):
    generator = random.Random(1)
    expected = np.stack([reference(frames, generator) for _ in range(4000)])
    made = masker(torch.arange(4000), (frames,), seed=0, update=0)[:, 0].numpy()
    assert largest_difference(made, expected) < 4


@pytest.mark.parametrize("changed", [{"length": 9}, {"ratio": 0.7}, {"min_spans": 5}])
def test_the_comparison_notices_another_distribution(changed):
    generator = random.Random(2)
    expected = np.stack([span_mask_reference(60, generator, **changed) for _ in range(4000)])
    made = SPAN(torch.arange(4000), (60,), seed=0, update=0)[:, 0].numpy()
    assert largest_difference(made, expected) > 6


def released_masks(frames: int, rows: int, generator: random.Random) -> np.ndarray:
    """(rows, frames): of every row as many frames as the row with the fewest hides, chosen at random, so that spans
    break off (``require_same_masks`` of the released configuration)."""
    whole = [span_mask_reference(frames, generator, min_spans=2) for _ in range(rows)]
    least = min(int(mask.sum()) for mask in whole)
    kept = np.zeros((rows, frames), dtype=bool)
    for row, mask in zip(kept, whole, strict=True):
        row[generator.sample(np.flatnonzero(mask).tolist(), least)] = True
    return kept


@pytest.mark.parametrize(("rows", "share", "runs"), [(1, 0.49, 25.0), (4, 0.465, 39.0), (16, 0.449, 49.0)])
def test_the_released_configuration_hides_less_in_larger_batches(rows: int, share: float, runs: float) -> None:
    """The figures of docs/agreement.md; ours hides what the released code hides of a clip that is alone."""
    frames, generator = 750, random.Random(0)
    theirs = np.concatenate([released_masks(frames, rows, generator) for _ in range(960 // rows)])
    ours = SpanMasker(min_spans=2)(torch.arange(960), (frames,), seed=1, update=0)[:, 0].numpy()
    counted = [np.diff(masks, axis=1, prepend=False).sum(1).mean() / 2 for masks in (theirs, ours)]
    assert theirs.mean() == pytest.approx(share, abs=0.005)
    assert counted[0] == pytest.approx(runs, abs=2.0)
    assert ours.mean() == pytest.approx(0.49, abs=0.005)
    assert counted[1] == pytest.approx(25.0, abs=1.0)
