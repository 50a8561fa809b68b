"""Weights under the names of the authors' released implementation (fairseq) and of Hugging Face's transformers.

A released checkpoint of data2vec 1.0 (``data2vec_text``) or 2.0 (``data2vec_multi`` with the modality TEXT) is a
mapping from names to tensors, with the teacher's in a mapping of its own. :func:`student_state` and
:func:`teacher_state` give them our names; :func:`load_published` puts them into a model and checks every shape.
:func:`load_transformers` does so with transformers' ``Data2VecTextModel``, which has no heads.

Differences of notation: queries, keys and values have a matrix each there and one together here; RoBERTa's positions
begin in row 2 and ours in row 1, row 0 being that of padding; and transformers adds the same token type everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from data2vec.core.errors import CheckpointError
from data2vec.core.pretraining.data2vec import Data2Vec

_FRONTEND = "frontends.text"
_EXTRACTOR = _FRONTEND + ".extractor"
_POSITIONS = f"student.{_EXTRACTOR}.positions.weight"
_UNUSED = 1  # rows of RoBERTa's positions in front of the one for padding

_BLOCK_1 = {
    "self_attn.out_proj": "attention.proj",
    "self_attn_layer_norm": "norm1",
    "fc1": "feed_forward.fc1",
    "fc2": "feed_forward.fc2",
    "final_layer_norm": "norm2",
}
_BLOCK_2 = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.proj",
    "mlp.fc1": "feed_forward.fc1",
    "mlp.fc2": "feed_forward.fc2",
}
_BLOCK_TRANSFORMERS = {
    "attention.output.dense": "attention.proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "feed_forward.fc1",
    "output.dense": "feed_forward.fc2",
    "output.LayerNorm": "norm2",
}
_QKV = {
    **{f"self_attn.{letter}_proj": part for part, letter in enumerate("qkv")},
    **{f"attention.self.{word}": part for part, word in enumerate(("query", "key", "value"))},
}
_EMBEDDING = {
    "embed_tokens": "embed",
    "embed_positions": "positions",
    "layernorm_embedding": "norm",
    "word_embeddings": "embed",
    "position_embeddings": "positions",
    "LayerNorm": "norm",
}
# (their pattern of a block's number and the rest, their names inside it, where our blocks are). The bare numbers are
# the teacher of 2.0, which averages the shared blocks alone.
_RELEASED_BLOCKS: list[tuple[str, dict[str, str], str]] = [
    (r"(?:encoder\.sentence_encoder\.)?layers\.(\d+)\.(.+)", _BLOCK_1, "transformer.blocks"),
    (r"modality_encoders\.TEXT\.context_encoder\.blocks\.(\d+)\.(.+)", _BLOCK_2, _FRONTEND + ".blocks"),
    (r"(?:blocks\.)?(\d+)\.(.+)", _BLOCK_2, "transformer.blocks"),
]
_RELEASED_EMBEDDING = (
    r"(?:encoder\.sentence_encoder\.|modality_encoders\.TEXT\.local_encoder\.)?"
    r"(embed_tokens|embed_positions|layernorm_embedding)\.(weight|bias)"
)
_HEADS: list[tuple[str, str]] = [
    (r"encoder\.regression_head\.(\d+)\.(weight|bias)", r"predictors.text.layers.\1.\2"),
    (r"modality_encoders\.TEXT\.decoder\.blocks\.(\d+)\.0\.(weight|bias)", r"predictors.text.convolutions.\1.\2"),
    (r"modality_encoders\.TEXT\.decoder\.proj\.(weight|bias)", r"predictors.text.projection.0.\1"),
    (r"modality_encoders\.TEXT\.decoder\.proj\.(\d+)\.(weight|bias)", r"predictors.text.projection.\1.\2"),
]
_TRANSFORMERS_BLOCKS = [(r"encoder\.layer\.(\d+)\.(.+)", _BLOCK_TRANSFORMERS, "transformer.blocks")]
_TRANSFORMERS_EMBEDDING = r"embeddings\.(word_embeddings|position_embeddings|LayerNorm)\.(weight|bias)"
_TOKEN_TYPE = "embeddings.token_type_embeddings.weight"
# Held by the checkpoint but of training state, or of heads that this package does not have.
_IGNORED = re.compile(r"(.*\.)?version|(.*\.)?_ema|.*\.num_updates")
_IGNORED_TRANSFORMERS = re.compile(
    r"embeddings\.(position_ids|token_type_ids)|(pooler|lm_head|classifier|qa_outputs)\..+|" + re.escape(_TOKEN_TYPE)
)


class Slot(NamedTuple):
    """The place of a tensor: our name, and which third of it where queries, keys and values are apart there."""

    name: str
    part: int | None = None


def our_place(name: str) -> Slot | None:
    """The place of a released tensor in a model; None where it has none."""
    for pattern, ours in _HEADS:
        if match := re.fullmatch(pattern, name):
            return Slot(match.expand(ours))
    return _encoder_place(name, _RELEASED_EMBEDDING, _RELEASED_BLOCKS)


def _encoder_place(name: str, embedding: str, blocks: Iterable[tuple[str, dict[str, str], str]]) -> Slot | None:
    if match := re.fullmatch(embedding, name):
        return Slot(f"student.{_EXTRACTOR}.{_EMBEDDING[match[1]]}.{match[2]}")
    for pattern, inside, ours in blocks:
        if match := re.fullmatch(pattern, name):
            module, _, kind = match[2].rpartition(".")
            prefix = f"student.{ours}.{match[1]}"
            if module in _QKV and kind in ("weight", "bias"):
                return Slot(f"{prefix}.attention.qkv.{kind}", _QKV[module])
            if module in inside and kind in ("weight", "bias"):
                return Slot(f"{prefix}.{inside[module]}.{kind}")
    return None


def student_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's and the predictor's weights under our names.

    Raises:
        CheckpointError: a tensor that belongs to no data2vec text model, or queries, keys and values that do not match.
    """
    places = {name: our_place(name) for name in state if not _IGNORED.fullmatch(name)}
    return _joined(state, places, "the state of data2vec_text (1.0) or data2vec_multi (2.0) with the modality TEXT")


def teacher_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The teacher's averaged weights under our names; the released ones carry no prefix of their own."""
    named = student_state(state)
    return _as_teacher({name: value for name, value in named.items() if name.startswith("student.")})


def transformers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's weights under our names from the state of a ``Data2VecTextModel``, or of a model that has one.

    Raises:
        CheckpointError: as :func:`student_state`.
    """
    bare = {name.removeprefix("data2vec_text."): value for name, value in state.items()}
    places = {
        name: _encoder_place(name, _TRANSFORMERS_EMBEDDING, _TRANSFORMERS_BLOCKS)
        for name in bare
        if not _IGNORED_TRANSFORMERS.fullmatch(name)
    }
    named = _joined(bare, places, "the state of transformers' Data2VecTextModel")
    if _TOKEN_TYPE in bare and _POSITIONS in named:
        named[_POSITIONS] = named[_POSITIONS] + bare[_TOKEN_TYPE][0]  # type 0 is added to every token
    return named


def _joined(state: Mapping[str, Tensor], places: Mapping[str, Slot | None], wanted: str) -> dict[str, Tensor]:
    """Tensors by our names, with queries, keys and values joined and positions beginning as ours."""
    unknown = [name for name, place in places.items() if place is None]
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors have no place in a data2vec text model, the first is {unknown[0]!r}: pass {wanted}"
        )
    joined: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, place in places.items():
        assert place is not None
        if place.part is not None:
            parts.setdefault(place.name, {})[place.part] = state[name]
        else:
            joined[place.name] = state[name][_UNUSED:] if place.name == _POSITIONS else state[name]
    for name, thirds in parts.items():
        shapes = {tuple(third.shape) for third in thirds.values()}
        if len(thirds) < len("qkv") or len(shapes) > 1:
            raise CheckpointError(
                f"{name}: queries, keys and values do not match, shapes {sorted(shapes)}; pass {wanted}"
            )
        joined[name] = torch.cat([thirds[part] for part in sorted(thirds)])
    return joined


def _as_teacher(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"teacher.encoder." + name.removeprefix("student."): value for name, value in named.items()}


def load_published(model: Data2Vec, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor] | None = None) -> None:
    """Put released weights into a model of the same shape, in place.

    Args:
        model: built from the recipe that the weights belong to.
        student: the released student.
        teacher: the released teacher's weights; None starts the teacher as a copy of the student.

    Raises:
        CheckpointError: names or shapes that do not fit; the model is then unchanged.
    """
    mapped = student_state(student)
    if teacher is None:
        mapped |= _as_teacher({name: value for name, value in mapped.items() if name.startswith("student.")})
    else:
        mapped |= teacher_state(teacher)
    _load(model, mapped)


def load_transformers(model: Data2Vec, state: Mapping[str, Tensor]) -> None:
    """Put the weights of a ``Data2VecTextModel`` into student and teacher, in place; the predictor stays as it is.

    Args:
        model: of the same shape, its Transformer post-norm, without blocks of text alone.
        state: ``Data2VecTextModel.state_dict()``.

    Raises:
        CheckpointError: names or shapes that do not fit; the model is then unchanged.
    """
    named = transformers_state(state)
    heads = {name: v for name, v in model.own_state().items() if not name.startswith(("student.", "teacher."))}
    _load(model, heads | named | _as_teacher(named))


def _load(model: Data2Vec, mapped: Mapping[str, Tensor]) -> None:
    # What the teacher shares with the student is the student's.
    shared = model.state_dict().keys() - model.own_state().keys()
    model.load_own_state({name: value for name, value in mapped.items() if name not in shared})
