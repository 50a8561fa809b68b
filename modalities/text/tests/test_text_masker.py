"""Properties of the masks of tokens and spans, and of what replaces hidden tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data2vec.text.masker import SpanMasker, TokenMasker, corrupt, span_starts, spans_hidden, tokens_hidden
from data2vec.text.masker_reference import corrupt_reference, span_mask_reference, token_mask_reference

IDS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=9, unique=True)
SEEDS = st.integers(0, 2**63 - 1)
UPDATES = st.integers(0, 10**6)
SPECIALS = (0, 1, 2, 3, 4)


@st.composite
def maskers(draw: st.DrawFn) -> TokenMasker | SpanMasker:
    ratio, masks = draw(st.floats(0.01, 0.99)), draw(st.integers(1, 4))
    if draw(st.booleans()):
        return TokenMasker(ratio, masks)
    return SpanMasker(ratio, draw(st.integers(1, 7)), draw(st.floats(0.0, 0.5)), masks)


@st.composite
def maskable_texts(draw: st.DrawFn) -> tuple[list[int], Tensor, Tensor]:
    """Sample numbers, (B, T) what may be hidden, at least one token of each sample, and (B,) valid tokens."""
    ids, length = draw(IDS), draw(st.integers(3, 60))
    lengths = [draw(st.integers(3, length)) for _ in ids]
    chance = draw(st.randoms(use_true_random=False))
    share = draw(st.sampled_from([0.0, 0.1, 0.7]))  # of special tokens inside
    rows = torch.zeros(len(ids), length, dtype=torch.bool)
    for row, valid in zip(rows, lengths, strict=True):
        for place in range(1, valid - 1):
            row[place] = chance.random() >= share
        row[chance.randint(1, valid - 2)] = True
    return ids, rows, torch.tensor(lengths)


def count_of(masker: TokenMasker | SpanMasker, count: Tensor) -> Tensor:
    if isinstance(masker, TokenMasker):
        return tokens_hidden(masker.ratio, count)
    return spans_hidden(masker.ratio + masker.adjust, masker.length, count)


@settings(max_examples=80, deadline=None)
@given(maskers(), maskable_texts(), SEEDS, UPDATES)
def test_every_mask_hides_its_number_of_tokens_that_may_be_hidden(masker, texts, seed, update):
    ids, maskable, lengths = texts
    shape = (maskable.shape[1],)
    mask = masker(torch.tensor(ids), shape, seed=seed, update=update, lengths=lengths, maskable=maskable)
    assert mask.dtype is torch.bool
    assert mask.shape == (len(ids), masker.masks, *shape)
    assert not (mask & ~maskable.unsqueeze(1)).any()
    expected = count_of(masker, maskable.sum(1))
    assert torch.equal(mask.sum(2), expected.unsqueeze(1).expand(-1, masker.masks))
    assert (expected >= 1).all()
    assert (expected <= maskable.sum(1)).all()


@settings(max_examples=60, deadline=None)
@given(maskers(), maskable_texts(), SEEDS, UPDATES, st.integers(0, 30), st.randoms(use_true_random=False))
def test_a_mask_depends_on_its_sample_alone(masker, texts, seed, update, extra, chance):
    """Any part of the batch, in any order, with any padding, gives the same rows."""
    ids, maskable, lengths = texts
    length = maskable.shape[1]
    whole = masker(torch.tensor(ids), (length,), seed=seed, update=update, lengths=lengths, maskable=maskable)
    order = list(range(len(ids)))
    chance.shuffle(order)
    order = order[: chance.randint(1, len(ids))]
    padded = torch.nn.functional.pad(maskable[order], (0, extra), value=True)  # beyond ``lengths``, so it is padding
    part = masker(
        torch.tensor([ids[index] for index in order]),
        (length + extra,),
        seed=seed,
        update=update,
        lengths=lengths[order],
        maskable=padded,
    )
    assert torch.equal(part[:, :, :length], whole[order])
    assert not part[:, :, length:].any()
    for place, index in enumerate(order):
        own = int(lengths[index])
        alone = masker(
            torch.tensor([ids[index]]), (own,), seed=seed, update=update, maskable=maskable[index : index + 1, :own]
        )
        assert torch.equal(alone[0], part[place, :, :own])


@settings(max_examples=40, deadline=None)
@given(maskers(), IDS, st.integers(3, 40), SEEDS)
def test_without_the_text_the_first_and_last_valid_token_are_special(masker, ids, length, seed):
    lengths = torch.tensor([3 + number % (length - 2) for number in range(len(ids))])
    place = torch.arange(length)
    inside = (place > 0) & (place < lengths.unsqueeze(1) - 1)
    told = masker(torch.tensor(ids), (length,), seed=seed, update=1, maskable=inside)
    assumed = masker(torch.tensor(ids), (length,), seed=seed, update=1, lengths=lengths)
    assert torch.equal(told, assumed)


@pytest.mark.parametrize("masker", [TokenMasker(masks=3), SpanMasker(masks=3)])
def test_updates_seeds_samples_and_masks_differ(masker):
    ids = torch.arange(8)
    masks = torch.cat(
        [masker(ids, (200,), seed=seed, update=update).flatten(0, 1) for seed in (0, 1) for update in (0, 1, 2)]
    )
    assert len(torch.unique(masks, dim=0)) == len(masks)


@pytest.mark.parametrize("kind", [TokenMasker, SpanMasker])
def test_the_first_masks_do_not_depend_on_how_many_there_are(kind: Callable[..., TokenMasker | SpanMasker]):
    few = kind(masks=2)(torch.arange(5), (80,), seed=3, update=4)
    many = kind(masks=7)(torch.arange(5), (80,), seed=3, update=4)
    assert torch.equal(few, many[:, :2])


@pytest.mark.parametrize("masker", [TokenMasker(), SpanMasker()])
def test_a_sample_of_special_tokens_hides_nothing(masker):
    maskable = torch.tensor([[False, True, False], [False, False, False]])
    mask = masker(torch.arange(2), (3,), seed=0, update=0, maskable=maskable)
    assert mask.squeeze(1).tolist() == [[False, True, False], [False, False, False]]


def test_published_shares():
    block = torch.tensor([510])
    assert int(tokens_hidden(0.15, block)) == 76
    assert int(tokens_hidden(0.48, block)) == 245
    assert int(span_starts(0.35, 4, block)) == 45
    assert int(spans_hidden(0.35, 4, block)) == 158  # 31 % in spans that overlap
    assert int(spans_hidden(0.35, 4, block)) / 510 == pytest.approx(1 - (1 - 45 / 510) ** 4, abs=0.003)


@settings(max_examples=80, deadline=None)
@given(st.floats(0.01, 0.99), st.integers(1, 7), st.integers(1, 12))
def test_the_number_in_spans_is_the_mean_over_all_places_of_the_spans(ratio, length, count):
    """Every way to place the spans, one by one."""
    starts = int(span_starts(ratio, length, torch.tensor([count])))
    sizes = [
        len({place for start in places for place in range(start, min(start + length, count))})
        for places in combinations(range(count), starts)
    ]
    mean = sum(sizes) / len(sizes)
    found = int(spans_hidden(ratio, length, torch.tensor([count])))
    assert abs(found - mean) <= 0.5 + 1e-9
    assert len(sizes) == math.comb(count, starts)


def runs(mask: Tensor) -> Tensor:
    """(8,) how many runs of 1, 2, ... 8 or more hidden tokens a row has on average."""
    rows = torch.nn.functional.pad(mask.long(), (1, 1))
    edges = rows.diff(dim=1)
    begin, end = (edges == 1).nonzero(), (edges == -1).nonzero()
    lengths = (end[:, 1] - begin[:, 1]).clamp(max=8)
    return torch.bincount(lengths, minlength=9)[1:].double() / len(mask)


def special_text() -> Tensor:
    """(64,) what may be hidden of a block of three documents."""
    maskable = torch.ones(64, dtype=torch.bool)
    maskable[[0, 20, 41, 63]] = False
    return maskable


@pytest.mark.parametrize("kind", ["token", "span"])
def test_masks_are_distributed_as_the_plain_reference(kind: str) -> None:
    rows, maskable = 4000, special_text()
    count = maskable.sum().view(1)
    generator = random.Random(0)
    allowed = maskable.tolist()
    if kind == "token":
        masker: TokenMasker | SpanMasker = TokenMasker(0.48)
        hidden = int(tokens_hidden(0.48, count))
        plain = [token_mask_reference(allowed, generator, hidden=hidden) for _ in range(rows)]
    else:
        masker = SpanMasker()
        hidden, starts = int(spans_hidden(0.35, 4, count)), int(span_starts(0.35, 4, count))
        plain = [span_mask_reference(allowed, generator, starts=starts, length=4, hidden=hidden) for _ in range(rows)]
    reference = torch.tensor(plain)
    ours = masker(torch.arange(rows), (64,), seed=5, update=6, maskable=maskable.expand(rows, -1)).squeeze(1)
    assert (ours.sum(1) == reference.sum(1)).all()
    difference = (ours.float().mean(0) - reference.float().mean(0)).abs()
    assert difference.max() < 5 * 2**0.5 * 0.5 / rows**0.5  # five standard deviations of two estimates
    assert (runs(ours) - runs(reference)).abs().max() < 0.15


def test_spans_are_runs_of_hidden_tokens():
    single = runs(TokenMasker(0.31)(torch.arange(500), (512,), seed=0, update=0).squeeze(1))
    spans = runs(SpanMasker()(torch.arange(500), (512,), seed=0, update=0).squeeze(1))
    assert spans[3:].sum() > 0.75 * spans.sum()
    assert single[3:].sum() < 0.1 * single.sum()


def blocks(rows: int, length: int = 128, vocabulary: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens, what is hidden of them, and the sample numbers."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(SPECIALS), vocabulary, (rows, length), generator=generator)
    return tokens, TokenMasker(0.15)(torch.arange(rows), (length,), seed=1, update=2).squeeze(1), torch.arange(rows)


def test_shares_of_the_replacements():
    tokens, hidden, ids = blocks(2000)
    read = corrupt(tokens, hidden, ids, seed=1, update=2, mask=4, vocabulary=50, specials=SPECIALS)
    assert torch.equal(read[~hidden], tokens[~hidden])
    count = int(hidden.sum())
    masked, kept = int((read[hidden] == 4).sum()), int((read[hidden] == tokens[hidden]).sum())
    error = 5 * 0.5 / count**0.5
    assert masked / count == pytest.approx(0.8, abs=error)
    assert kept / count == pytest.approx(0.1 + 0.1 / 45, abs=error)  # a random token is now and then the same
    others = read[hidden & (read != 4) & (read != tokens)]
    frequencies = torch.bincount(others, minlength=50)
    assert not frequencies[list(SPECIALS)].any()
    mean = len(others) / 45
    assert (frequencies[5:] - mean).abs().max() < 5 * mean**0.5


def test_replacements_are_distributed_as_the_plain_reference():
    tokens, hidden, ids = blocks(1000)
    generator = random.Random(3)
    settings_of = {"mask": 49, "vocabulary": 50, "specials": (0, 1, 2, 3, 49), "random_share": 0.3, "kept_share": 0.2}
    ours = corrupt(tokens, hidden, ids, seed=1, update=2, **settings_of)
    plain = torch.tensor(
        [
            corrupt_reference(row, chosen, generator, **settings_of)
            for row, chosen in zip(tokens.tolist(), hidden.tolist(), strict=True)
        ]
    )
    for what in (lambda read: read[hidden] == 49, lambda read: read[hidden] == tokens[hidden]):
        share = what(ours).float().mean(), what(plain).float().mean()
        assert float(share[0]) == pytest.approx(float(share[1]), abs=5 * 2**0.5 * 0.5 / int(hidden.sum()) ** 0.5)
    assert set(ours[hidden].tolist()) == set(plain[hidden].tolist()) == set(range(4, 50))


@settings(max_examples=60, deadline=None)
@given(IDS, st.integers(1, 40), SEEDS, UPDATES, st.integers(0, 20), st.floats(0, 1), st.randoms(use_true_random=False))
def test_replacements_depend_on_their_sample_alone(ids, length, seed, update, extra, share, chance):
    tokens = torch.tensor([[chance.randrange(5, 30) for _ in range(length)] for _ in ids])
    hidden = torch.tensor([[chance.random() < 0.5 for _ in range(length)] for _ in ids])
    keywords = {"seed": seed, "update": update, "mask": 4, "vocabulary": 30, "specials": SPECIALS}
    shares = {"random_share": share, "kept_share": (1 - share) / 2}
    whole = corrupt(tokens, hidden, torch.tensor(ids), **keywords, **shares)
    assert torch.equal(whole[~hidden], tokens[~hidden])
    assert not torch.isin(whole, torch.tensor([0, 1, 2, 3])).any()
    assert whole.max() < 30
    index = chance.randrange(len(ids))
    longer = torch.nn.functional.pad(tokens[index : index + 1], (0, extra), value=1)
    chosen = torch.nn.functional.pad(hidden[index : index + 1], (0, extra))
    alone = corrupt(longer, chosen, torch.tensor([ids[index]]), **keywords, **shares)
    assert torch.equal(alone[0, :length], whole[index])
    assert (alone[0, length:] == 1).all()


@pytest.mark.parametrize(("random_share", "kept_share"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_one_kind_of_replacement_alone(random_share, kept_share):
    tokens, hidden, ids = blocks(20)
    read = corrupt(
        tokens,
        hidden,
        ids,
        seed=0,
        update=0,
        mask=4,
        vocabulary=50,
        specials=SPECIALS,
        random_share=random_share,
        kept_share=kept_share,
    )
    if random_share:
        assert (read[hidden] > 4).all()
    elif kept_share:
        assert torch.equal(read, tokens)
    else:
        assert (read[hidden] == 4).all()


def test_updates_and_seeds_give_other_replacements():
    tokens, hidden, ids = blocks(20)
    keywords = {"mask": 4, "vocabulary": 50, "specials": SPECIALS, "random_share": 1.0, "kept_share": 0.0}
    reads = [corrupt(tokens, hidden, ids, seed=s, update=u, **keywords) for s in (0, 1) for u in (0, 1)]
    for number, one in enumerate(reads):
        for other in reads[:number]:
            assert (one == other)[hidden].float().mean() < 0.1
