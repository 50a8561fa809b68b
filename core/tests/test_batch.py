"""The class number of a raw sample."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data2vec.core.batch import Batch, Sample, decode_label, label_problem


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


def batch() -> Batch:
    return Batch(
        "toy", torch.arange(12.0).view(3, 4), torch.tensor([5, 6, 7]), torch.tensor([-1, 2, 1]),
        lengths=torch.tensor([4, 2, 3]), student_inputs=torch.zeros(3, 4), keys=("a", "b", "c"), broken=("x",),
        position_labels=torch.ones(3, 2), unused={"cls": "why"}, annotations={"txt": (b"A", None, b"C")},
    )  # fmt: skip


def test_the_first_samples_of_a_batch() -> None:
    part = batch().first(2)
    assert (len(part), part.keys, part.annotations, part.broken) == (2, ("a", "b"), {"txt": (b"A", None)}, ())
    assert part.lengths is not None
    assert part.lengths.tolist() == [4, 2]
    assert part.student_inputs is not None
    assert part.position_labels is not None
    assert part.student_inputs.shape == (2, 4)
    assert part.position_labels.shape == (2, 2)
    assert len(batch().first(9)) == 3


def test_the_labelled_samples_of_a_batch() -> None:
    part = batch().labelled()
    assert (part.labels.tolist(), part.ids.tolist(), part.keys) == ([2, 1], [6, 7], ("b", "c"))
    assert part.annotations == {"txt": (None, b"C")}
    assert part.inputs.tolist() == [[4, 5, 6], [8, 9, 10]]  # no longer than the longest of them
    assert part.student_inputs is None
    assert part.position_labels is None


def test_a_batch_on_another_device_is_the_same_batch() -> None:
    moved = batch().to("meta")
    tensors = [moved.inputs, moved.ids, moved.labels, moved.lengths, moved.student_inputs, moved.position_labels]
    assert all(value is not None and value.device.type == "meta" for value in tensors)
    assert (moved.keys, moved.broken, moved.annotations) == (batch().keys, batch().broken, batch().annotations)
