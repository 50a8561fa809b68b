"""Properties of the block-wise and the inverse block masks."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data2vec.core.model.random import mix, sample_keys
from data2vec.vision import masker as masker_module
from data2vec.vision.masker import BlockMasker, InverseBlockMasker, block_hidden, inverse_block_hidden
from data2vec.vision.masker_reference import block_mask_reference, inverse_block_mask_reference

GRIDS = st.tuples(st.integers(1, 17), st.integers(1, 17)).filter(lambda shape: shape[0] * shape[1] >= 2)
IDS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=9, unique=True)
SEEDS = st.integers(0, 2**63 - 1)


@st.composite
def maskers(draw: st.DrawFn) -> BlockMasker | InverseBlockMasker:
    ratio, masks = draw(st.floats(0.01, 0.99)), draw(st.integers(1, 4))
    if draw(st.booleans()):
        smallest = draw(st.integers(1, 20))
        largest = draw(st.none() | st.integers(smallest, 60))
        return BlockMasker(ratio, smallest, largest, draw(st.floats(0.1, 1.0)), masks=masks)
    return InverseBlockMasker(ratio, draw(st.floats(0.0, 0.2)), draw(st.integers(1, 5)), masks)


def count_of(masker: BlockMasker | InverseBlockMasker, total: int) -> int:
    count = block_hidden if isinstance(masker, BlockMasker) else inverse_block_hidden
    return count(masker.ratio, total)


@settings(max_examples=60, deadline=None)
@given(maskers(), GRIDS, IDS, SEEDS, st.integers(0, 10**6))
def test_every_row_hides_the_same_number_and_shows_some(masker, shape, ids, seed, update):
    total = shape[0] * shape[1]
    mask = masker(torch.tensor(ids), shape, seed=seed, update=update)
    assert mask.dtype is torch.bool
    assert mask.shape == (len(ids), masker.masks, total)
    expected = count_of(masker, total)
    assert (mask.sum(-1) == expected).all()
    assert 1 <= expected <= total - 1


@settings(max_examples=40, deadline=None)
@given(maskers(), GRIDS, IDS, SEEDS, st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_a_mask_depends_on_its_sample_alone(masker, shape, ids, seed, update, chance):
    """Any part of the batch, in any order, gives the same rows: so does any rank, worker, or resumed run."""
    whole = masker(torch.tensor(ids), shape, seed=seed, update=update)
    order = list(range(len(ids)))
    chance.shuffle(order)
    order = order[: chance.randint(1, len(ids))]
    part = masker(torch.tensor([ids[index] for index in order]), shape, seed=seed, update=update)
    assert torch.equal(part, whole[order])


@pytest.mark.parametrize("masker", [BlockMasker(masks=3), InverseBlockMasker(masks=3)])
def test_updates_seeds_samples_and_masks_differ(masker):
    ids = torch.arange(8)
    masks = torch.cat(
        [masker(ids, (14, 14), seed=seed, update=update).flatten(0, 1) for seed in (0, 1) for update in (0, 1, 2)]
    )
    assert len(torch.unique(masks, dim=0)) == len(masks)


@pytest.mark.parametrize("masker", [BlockMasker(), InverseBlockMasker()])
def test_the_first_masks_do_not_depend_on_how_many_there_are(masker):
    few = type(masker)(masks=2)(torch.arange(5), (14, 14), seed=3, update=4)
    many = type(masker)(masks=7)(torch.arange(5), (14, 14), seed=3, update=4)
    assert torch.equal(few, many[:, :2])


@pytest.mark.parametrize("masker", [BlockMasker(), InverseBlockMasker()])
def test_a_single_position_cannot_be_masked(masker):
    with pytest.raises(ValueError, match="needs at least 2"):
        masker(torch.arange(2), (1, 1), seed=0, update=0)


def test_random_numbers_agree_with_cores():
    numbers = torch.arange(-500, 500) * 7046029254386353131
    ours = masker_module._mix(numbers.numpy().view(np.uint64).copy())
    assert (ours.view(np.int64) == mix(numbers).numpy()).all()


@settings(max_examples=30, deadline=None)
@given(IDS, SEEDS, st.integers(0, 10**6))
def test_sample_keys_agree_with_cores(ids, seed, update):
    ours = masker_module._sample_keys(torch.tensor(ids), seed=seed, update=update)
    assert (ours.view(np.int64) == sample_keys(torch.tensor(ids), seed=seed, update=update).numpy()).all()


@settings(max_examples=60, deadline=None)
@given(
    GRIDS,
    st.integers(1, 30),
    st.none() | st.floats(0.5, 4.0),
    st.floats(0.1, 0.9),
    st.integers(1, 200),
    st.integers(0, 2**32 - 1),
)
def test_proposed_blocks_keep_to_area_aspect_and_grid(shape, smallest, max_aspect, min_aspect, most, seed):
    masker = BlockMasker(min_block=smallest, min_aspect=min_aspect, max_aspect=max_aspect)
    words = np.random.default_rng(seed).integers(2**64, size=(50, 3), dtype=np.uint64)
    words[0], words[1] = 0, 2**64 - 1  # the ends of what may be drawn
    (top, left), (h, w) = masker.propose(masker.draw(words), np.array([most, 1, 7]), shape)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= shape[0]).all()
    assert (left + w <= shape[1]).all()
    # Rounding moves a side by half a patch at most.
    low, high = sorted((smallest, most))
    fits = (h < shape[0]) & (w < shape[1])
    h, w, fits = h[:, 0], w[:, 0], fits[:, 0]
    assert ((h[fits] - 0.501) * (w[fits] - 0.501) <= high).all()
    assert ((h[fits] + 0.501) * (w[fits] + 0.501) >= low).all()
    largest_aspect = max_aspect if max_aspect is not None else 1 / min_aspect
    assert ((h[fits] - 0.501) <= (w[fits] + 0.501) * largest_aspect).all()
    assert ((h[fits] + 0.501) >= (w[fits] - 0.501) * min_aspect).all()


def test_a_mask_of_one_block_is_a_rectangle():
    keys = masker_module._mask_keys(torch.arange(200), 1, seed=0, update=0)
    words = BlockMasker(min_block=16, max_block=16)._add_blocks(keys, (14, 14), 16)
    masks = masker_module._unpack(words, 196).reshape(-1, 14, 14)
    areas = [np.ptp(np.flatnonzero(m.any(1))) + 1 for m in masks], [np.ptp(np.flatnonzero(m.any(0))) + 1 for m in masks]
    rectangles = np.prod(areas, axis=0) == masks.sum((1, 2))
    assert rectangles.mean() > 0.3  # the others took a second block for what the first left over


def neighbours(mask: Tensor, shape: tuple[int, int]) -> float:
    """How often the right and lower neighbours of a visible patch are visible too."""
    visible = ~mask.view(-1, *shape)
    right = visible[:, :, :-1] & visible[:, :, 1:]
    down = visible[:, :-1] & visible[:, 1:]
    return float((right.sum() + down.sum()) / (visible[:, :, :-1].sum() + visible[:, :-1].sum()))


def reference_masks(rule: str, rows: int) -> Tensor:
    generator = random.Random(0)
    if rule == "block":
        masks = [block_mask_reference((14, 14), generator, hidden=118) for _ in range(rows)]
    else:
        masks = [inverse_block_mask_reference((14, 14), generator, visible=39) for _ in range(rows)]
    return torch.from_numpy(np.stack(masks)).flatten(1)


@pytest.mark.parametrize(("rule", "masker"), [("block", BlockMasker()), ("inverse", InverseBlockMasker(masks=1))])
def test_masks_are_distributed_as_the_plain_reference(rule, masker):
    rows = 1500
    ours = masker(torch.arange(rows), (14, 14), seed=5, update=6).flatten(0, 1)
    reference = reference_masks(rule, rows)
    assert (ours.sum(1) == reference.sum(1)).all()
    assert neighbours(ours, (14, 14)) == pytest.approx(neighbours(reference, (14, 14)), abs=0.015)
    # Both are estimates with a standard deviation of at most 0.5 / sqrt(1500) at each position.
    difference = (ours.float().mean(0) - reference.float().mean(0)).abs()
    assert difference.max() < 5 * 2**0.5 * 0.5 / rows**0.5
    assert difference.mean() < 0.02


def test_inverse_block_masks_keep_blocks():
    mask = InverseBlockMasker()(torch.arange(64), (14, 14), seed=0, update=0).flatten(0, 1)
    scattered = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)).argsort(1) >= 39
    assert neighbours(mask, (14, 14)) > 0.55 > 2 * neighbours(scattered, (14, 14))
    centre = mask.view(-1, 14, 14)[:, 4:10, 4:10].float().mean()
    assert centre == pytest.approx(0.8, abs=0.05)


def alone(masks: np.ndarray) -> np.ndarray:
    """How many hidden patches of each (N, h, w) mask have no hidden neighbour."""
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    beside = padded[:, :-2, 1:-1] | padded[:, 2:, 1:-1] | padded[:, 1:-1, :-2] | padded[:, 1:-1, 2:]
    return (masks & ~beside).sum((1, 2))


def test_block_masks_are_topped_up_as_the_plain_reference_does():
    count, hidden = 2_500, 118
    generator = random.Random(0)
    plain = np.stack([block_mask_reference((14, 14), generator, hidden=hidden) for _ in range(count)])
    ours = BlockMasker(ratio=0.6)(torch.arange(count), (14, 14), seed=0, update=0).view(count, 14, 14).numpy()
    assert (ours.sum((1, 2)) == hidden).all()
    # 0.28 a mask, with a standard deviation of 0.6: five standard errors of the difference
    assert abs(alone(ours).mean() - alone(plain).mean()) < 0.085
    assert alone(plain).mean() > 0.2


def test_block_masks_hide_blocks():
    mask = BlockMasker()(torch.arange(512), (14, 14), seed=0, update=0).flatten(0, 1)
    assert neighbours(~mask, (14, 14)) > 0.8  # 0.6 if patches were hidden one by one
    assert mask.float().mean() == pytest.approx(0.6, abs=0.003)


def test_the_authors_number_of_visible_patches():
    assert inverse_block_hidden(0.8, 196) == 157
    assert inverse_block_hidden(0.75, 196) == 147
    assert inverse_block_hidden(0.7, 16) == 12
    assert inverse_block_hidden(0.8, 25) == 20
    assert InverseBlockMasker().starts(196) == 5
