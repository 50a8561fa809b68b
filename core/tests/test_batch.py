"""The class number of a raw sample."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data2vec.core.batch import Sample, decode_label, label_problem


def labelled(text: bytes) -> Sample:
    return Sample("key", "train-000000.tar", 1, {"png": b"", "cls": text})


@pytest.mark.parametrize(("text", "label"), [(b"7", 7), (b" 12\n", 12), (b"0", 0), (b"007", 7), (b"9" * 9, 10**9 - 1)])
def test_labels(text: bytes, label: int) -> None:
    assert decode_label(labelled(text)) == label


def test_no_label() -> None:
    assert decode_label(Sample("key", "train-000000.tar", 1, {"png": b"7"})) is None


@pytest.mark.parametrize(
    "text", [b"", b" ", b"cat", b"-1", b"+1", b"1.0", b"1_0", b"1 0", "\u0663".encode(), b"9" * 10]
)
def test_what_is_no_class_number_is_unlabelled(text: bytes) -> None:
    assert decode_label(labelled(text)) is None
    assert "is no class number such as 7" in str(label_problem(text))


@given(st.binary(max_size=12) | st.from_regex(rb"\s?[0-9]{1,11}\s?", fullmatch=True))
def test_whatever_the_bytes_it_is_a_number_or_none(text: bytes) -> None:
    digits = re.fullmatch(rb"[ \t\n\r\x0b\x0c]*([0-9]{1,9})[ \t\n\r\x0b\x0c]*", text)
    assert decode_label(labelled(text)) == (None if digits is None else int(digits[1]))
    assert (label_problem(text) is None) == (digits is not None)


def test_a_long_label_is_shown_in_part() -> None:
    assert len(str(label_problem(b"x" * 5000))) < 120
