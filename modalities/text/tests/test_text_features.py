"""The bag of tokens: counts of the valid tokens and nothing else."""

from __future__ import annotations

import pytest
import torch

from data2vec.core.batch import Batch
from data2vec.text.features import MOST, bag_of_tokens


def batch(rows: list[list[int]], lengths: list[int] | None) -> Batch:
    kept = None if lengths is None else torch.tensor(lengths)
    return Batch("text", torch.tensor(rows), torch.arange(len(rows)), torch.zeros(len(rows)).long(), lengths=kept)


def test_log_counts_of_length_one() -> None:
    x = bag_of_tokens(batch([[5, 7, 5, 6], [5, 9, 9, 9]], [4, 1]), 10)
    expected = torch.tensor([3.0, 2.0, 2.0]).log()
    assert x.shape == (2, 10)
    assert torch.allclose(x[0, [5, 6, 7]], expected / expected.norm())
    assert torch.equal(x[1], torch.nn.functional.one_hot(torch.tensor(5), 10).float())


def test_order_and_padding_do_not_count() -> None:
    one = bag_of_tokens(batch([[3, 4, 4, 8]], None), 10)
    assert torch.equal(one, bag_of_tokens(batch([[4, 8, 3, 4, 9, 9]], [4]), 10))
    # Padding may hold any number, also one beyond the vocabulary.
    assert torch.equal(one, bag_of_tokens(batch([[4, 8, 3, 4, 10_000, -1]], [4]), 10))


def test_a_large_vocabulary_is_hashed() -> None:
    ids = torch.arange(2 * MOST).view(2, MOST).tolist()
    x = bag_of_tokens(batch(ids, None), 2 * MOST)
    assert x.shape == (2, MOST)
    assert torch.allclose(x.norm(dim=1), torch.ones(2))
    # About as even as balls thrown into bins: a share 1 - 1/e of them is hit.
    assert ((x > 0).float().mean(dim=1) - 0.632).abs().max() < 0.03
    assert torch.equal(x, bag_of_tokens(batch([row[::-1] for row in ids], None), 2 * MOST))
    assert not torch.equal(x[0], x[1])


def test_an_id_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="the vocabulary has 10"):
        bag_of_tokens(batch([[3, 10]], None), 10)
