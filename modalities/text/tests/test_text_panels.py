"""The report's pictures of text."""

from __future__ import annotations

import html
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data2vec.core.batch import Batch
from data2vec.core.exhibit import Illustrations
from data2vec.text.panels import panels
from data2vec.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()


def drawn(texts: list[bytes], masks: int = 1, width: int = 6) -> Illustrations:
    rows = [torch.tensor([0, *(byte + 5 for byte in text), 2]) for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    b, t = inputs.shape
    generator = torch.Generator().manual_seed(t)
    mask = (torch.rand(b, masks, t, generator=generator) < 0.5) & (torch.arange(t) < lengths[:, None] - 1)[:, None]
    batch = Batch("text", inputs, torch.arange(b), torch.arange(b) % 2, lengths=lengths)
    return Illustrations(batch, mask, torch.randn(b, t, width, generator=generator), (t,))


def plain(markup: str) -> list[str]:
    """The text of every cell."""
    cells = re.findall(r'<div style="font:[^"]*">(.*?)</div>', markup, re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]*>|&#8203;", "", cell)) for cell in cells]


def test_hidden_tokens_are_blocks_and_the_rest_is_the_text() -> None:
    found = drawn([b"abcdefgh" * 3, b"ABCDEFGH"])
    original, student, second, hidden_second = plain(panels(found, BYTES)[0].html)
    assert original == "<s>" + "abcdefgh" * 3 + "</s>"
    assert second == "<s>ABCDEFGH</s>"
    for shown, text, row in ((student, "abcdefgh" * 3, 0), (hidden_second, "ABCDEFGH", 1)):
        names = ["<s>", *text, "</s>"]
        mask = found.mask[row, 0, : len(names)].tolist()
        assert shown == "".join("\xa0" * len(n) if m else n for n, m in zip(names, mask, strict=True))


def test_replaced_tokens_are_shown_as_the_student_reads_them() -> None:
    found = drawn([b"abcd"])
    mask = torch.zeros_like(found.mask)
    mask[0, 0, 1:4] = True
    read = found.batch.inputs.clone()
    read[0, 1], read[0, 2] = BYTES.mask, ord("Z") + 5
    found = replace(found, mask=mask, batch=replace(found.batch, student_inputs=read))
    (panel,) = panels(found, BYTES)
    assert plain(panel.html)[1] == "<s>\xa0Zcd</s>"
    assert panel.html.count("background:#fbe3c0") == 2
    assert "Orange" in panel.caption
    read = torch.where(mask[:, 0], BYTES.mask, found.batch.inputs)
    (panel,) = panels(replace(found, batch=replace(found.batch, student_inputs=read)), BYTES)
    assert "Grey" in panel.caption
    assert "Orange" not in panel.caption


@pytest.mark.parametrize(("masks", "shown"), [(2, 2), (9, 4)])
def test_several_masks_stand_under_the_original(masks: int, shown: int) -> None:
    panel = panels(drawn([b"some text"] * 8, masks), BYTES)[0]
    assert len(plain(panel.html)) == 6 * (1 + shown)
    assert f"under {masks} masks" in panel.caption


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=4))
def test_any_bytes_are_readable_and_nothing_is_markup(texts: list[bytes]) -> None:
    hostile = [b"<script>alert(1)</script> & \"'", *texts]
    for panel in panels(drawn(hostile, 2), BYTES):
        assert "<script" not in panel.html
        assert set(re.findall(r"<(/?\w+)", panel.html)) <= {"div", "/div", "span", "/span"}
        assert all(character.isprintable() or character == "\xa0" for cell in plain(panel.html) for character in cell)
        assert not re.search(r"(src|href|url\()", re.sub(r">[^<]*<", "><", panel.html))


def test_neighbours_are_the_texts_with_like_features() -> None:
    found = drawn([f"text {number}".encode() for number in range(12)])
    direction = torch.eye(6)[torch.arange(12) % 3]
    features = direction[:, None].repeat(1, found.batch.inputs.shape[1], 1)
    # What stands on padding must not count.
    padding = torch.arange(features.shape[1]) >= found.batch.lengths[:, None]
    features[padding] = float("nan")
    panel = panels(replace(found, features=features), BYTES)[1]
    cells = plain(panel.html)
    assert len(cells) == 5 * 4
    for query in range(0, len(cells), 4):
        numbers = [int(re.search(r"\d+", cell).group()) for cell in cells[query : query + 4]]
        assert len({number % 3 for number in numbers}) == 1
        assert len(set(numbers)) == 4
    assert "+1.00" in panel.html
    assert "same class" in panel.html
    assert "other class" in panel.html
    unknown = replace(found, batch=replace(found.batch, labels=torch.full((12,), -1), lengths=None))
    assert "class" not in panels(unknown, BYTES)[1].html


def test_one_text_has_no_neighbours_and_equal_ones_no_direction() -> None:
    assert len(panels(drawn([b"alone"]), BYTES)) == 1
    found = drawn([b"same"] * 4)
    flat = panels(replace(found, features=torch.ones_like(found.features)), BYTES)[1]
    assert "+0.00" in flat.html
    assert "nan" not in flat.html


def test_long_texts_are_cut() -> None:
    cells = plain(panels(drawn([b"x" * 500, b"y"]), BYTES)[0].html)
    assert cells[0].endswith("…")
    assert len(cells[0]) < 100
    assert cells[2] == "<s>y</s>"


def test_masks_of_another_batch_are_refused() -> None:
    found = drawn([b"abc", b"de"])
    with pytest.raises(ValueError, match="do not fit 2 x 5 tokens"):
        panels(replace(found, mask=found.mask[..., :-1]), BYTES)
