"""Masks and the indices that follow from them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data2vec.core.errors import TrainingError
from data2vec.core.model.mask import Mask, gather_positions, scatter_positions


@st.composite
def equal_masks(draw: st.DrawFn) -> Tensor:
    """(B, M, T) bool; every row hides equally many positions, at least one and not all."""
    samples, masks, length = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(2, 9))
    count = draw(st.integers(1, length - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    order = torch.rand(samples, masks, length, generator=generator).argsort(-1)
    return order < count


@settings(max_examples=60)
@given(equal_masks())
def test_indices_equal_plain_loops(hidden: Tensor) -> None:
    samples, masks, length = hidden.shape
    mask = Mask.of(hidden, visible_only=True)
    positions, visible = [], []
    for sample in range(samples):
        for number in range(masks):
            row = hidden[sample, number].tolist()
            positions += [(sample * masks + number) * length + t for t in range(length) if row[t]]
            visible.append([t for t in range(length) if not row[t]])
    assert mask.positions.tolist() == positions
    assert mask.visible is not None
    assert mask.visible.tolist() == visible
    assert (mask.masks, mask.count) == (masks, len(positions))
    everything = Mask.of(hidden, visible_only=False)
    assert everything.visible is None
    assert torch.equal(everything.positions, mask.positions)
    moved = mask.to("cpu")
    assert torch.equal(moved.hidden, hidden)
    assert moved.visible is not None
    assert torch.equal(moved.visible, mask.visible)


@settings(max_examples=60)
@given(equal_masks())
def test_gather_and_scatter_undo_each_other(hidden: Tensor) -> None:
    samples, masks, length = hidden.shape
    mask = Mask.of(hidden, visible_only=True)
    assert mask.visible is not None
    x = torch.randn(samples, length, 3)
    rows = torch.stack([x[n // masks] for n in range(samples * masks)])  # row n = sample * M + mask number
    taken = gather_positions(x, mask.visible)
    assert torch.equal(taken, torch.stack([rows[n, keep] for n, keep in enumerate(mask.visible)]))
    assert torch.equal(taken, gather_positions(rows, mask.visible))
    filling = torch.full((samples * masks, length, 3), -7.0)
    back = scatter_positions(taken, mask.visible, filling)
    flat = hidden.flatten(0, 1)
    assert torch.equal(back[~flat], rows[~flat])
    assert bool((back[flat] == -7.0).all())
    assert bool((filling == -7.0).all())
    assert torch.equal(gather_positions(back, mask.visible), taken)
    padding = torch.rand(samples, length) < 0.5
    assert gather_positions(padding, mask.visible).tolist() == [
        [bool(padding[n // masks, t]) for t in keep] for n, keep in enumerate(mask.visible.tolist())
    ]


def rows(*lines: str) -> Tensor:
    """One sample, one mask for each line: ``x`` is hidden."""
    return torch.tensor([[[letter == "x" for letter in line] for line in lines]])


@pytest.mark.parametrize("visible_only", [False, True])
def test_hides_nothing(visible_only: bool) -> None:
    with pytest.raises(TrainingError, match="hid no position"):
        Mask.of(rows("x..", "..."), visible_only=visible_only)


def test_hides_everything() -> None:
    with pytest.raises(TrainingError, match="hid every position"):
        Mask.of(rows("xxx", "xxx"), visible_only=True)
    assert Mask.of(rows("xxx"), visible_only=False).count == 3


def test_hides_every_position_that_is_not_padding() -> None:
    """The student would see nothing but padding, and attention over no key at all is not a number."""
    hidden = torch.cat([rows("xx.."), rows(".xx.")])
    padding = torch.tensor([[False, False, True, True], [False, False, False, True]])
    with pytest.raises(TrainingError, match="hid every position"):
        Mask.of(hidden, visible_only=True, padding=padding)
    padding[0, 2] = False
    assert Mask.of(hidden, visible_only=True, padding=padding).count == 4


def test_rows_with_fewer_visible_positions_are_filled_up() -> None:
    uneven = rows("x..", "xx.")
    mask = Mask.of(uneven, visible_only=True)
    assert mask.visible is not None
    assert mask.filler is not None
    assert mask.visible.tolist() == [[1, 2], [2, 0]]
    assert mask.filler.tolist() == [[False, False], [False, True]]
    back = scatter_positions(torch.ones(2, 2, 1), mask.visible, torch.zeros(2, 3, 1), mask.filler)
    assert back.squeeze(-1).tolist() == [[0, 1, 1], [0, 0, 1]]
    assert Mask.of(uneven, visible_only=False).positions.tolist() == [0, 3, 4]


@settings(max_examples=60)
@given(equal_masks(), st.integers(0, 2**31))
def test_padding_is_never_visible(hidden: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    free = ~hidden.any(1)  # padding must not be hidden; one position of each sample stays valid and visible
    padding = free & (torch.rand(free.shape, generator=generator) < 0.5)
    padding[:, :1] &= ~(padding | hidden.any(1)).all(1, keepdim=True)
    if bool(((hidden | padding.unsqueeze(1)).all(-1)).any()):
        return
    mask = Mask.of(hidden, visible_only=True, padding=padding)
    assert mask.visible is not None
    masks = hidden.shape[1]
    filler = torch.zeros_like(mask.visible, dtype=torch.bool) if mask.filler is None else mask.filler
    for row, (places, filled) in enumerate(zip(mask.visible.tolist(), filler.tolist(), strict=True)):
        expected = ~(hidden.flatten(0, 1)[row] | padding[row // masks])
        seen = [place for place, filling in zip(places, filled, strict=True) if not filling]
        assert seen == expected.nonzero().flatten().tolist()
        assert len(set(places)) == len(places)


@pytest.mark.parametrize("visible_only", [False, True])
def test_hides_padding(visible_only: bool) -> None:
    hidden = rows("x...", "...x")
    padding = torch.tensor([[False, False, False, True]])
    with pytest.raises(TrainingError, match="padding"):
        Mask.of(hidden, visible_only=visible_only, padding=padding)
    assert Mask.of(hidden[:, :1], visible_only=visible_only, padding=padding).count == 1


@pytest.mark.parametrize("hidden", [torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)])
def test_not_a_mask(hidden: Tensor) -> None:
    with pytest.raises(TrainingError, match="boolean"):
        Mask.of(hidden, visible_only=False)


def test_unequal_rows_of_several_masks_can_be_gathered() -> None:
    mask = Mask.of(rows("x...", "xx.."), visible_only=True)
    assert mask.visible is not None
    gathered = gather_positions(torch.arange(4.0).view(1, 4, 1), mask.visible)
    assert gathered.squeeze(-1).tolist() == [[1, 2, 3], [2, 3, 0]]
