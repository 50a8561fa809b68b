"""Weights under the names of the authors' released implementation (fairseq, ``examples/data2vec``) and Hugging Face.

A released checkpoint of data2vec 1.0 (``data2vec_audio``) or 2.0 (``data2vec_multi``) is a mapping from names to
tensors, with the teacher's under ``_ema`` or in a mapping of its own. :func:`student_state` and :func:`teacher_state`
give them our names; :func:`load_published` puts them into a model and checks every shape. Hugging Face's
``Data2VecAudioModel`` holds an encoder of data2vec 1.0 without a predictor: :func:`load_transformers`.

Differences of notation: queries, keys and values are one matrix here and three in 1.0; the teacher of 1.0 holds the
Transformer alone, so its names lack the prefix ``encoder``; and ALiBi's scale has shape (1, 1, H, 1, 1) in 2.0.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from data2vec.core.errors import CheckpointError
from data2vec.core.model.data2vec import Data2Vec

_log = logging.getLogger(__name__)
_FRONTEND = "frontends.speech"
_CONVOLUTIONS = _FRONTEND + ".extractor.convolutions"
_POSITIONS = _FRONTEND + ".positions.convolutions"
_AUDIO = r"modality_encoders\.AUDIO\."
# (their pattern, our name inside an encoder), without the prefix of student or teacher: 1.0, 2.0, Hugging Face.
_ENCODER: list[tuple[str, str]] = [
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.weight", _CONVOLUTIONS + r".\1.conv.weight"),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.1\.(weight|bias)", _CONVOLUTIONS + r".\1.layer_norm.\2"),
    (r"layer_norm\.(weight|bias)", _FRONTEND + r".extractor.norm.\1"),
    (r"post_extract_proj\.(weight|bias)", _FRONTEND + r".extractor.projection.\1"),
    (r"encoder\.pos_conv\.(\d+)\.0\.(weight|bias)", _POSITIONS + r".\1.\2"),
    (r"encoder\.layer_norm\.(weight|bias)", _FRONTEND + r".input_norm.\1"),
    (_AUDIO + r"local_encoder\.conv_layers\.(\d+)\.0\.weight", _CONVOLUTIONS + r".\1.conv.weight"),
    (_AUDIO + r"local_encoder\.conv_layers\.(\d+)\.2\.1\.(weight|bias)", _CONVOLUTIONS + r".\1.layer_norm.\2"),
    (_AUDIO + r"project_features\.1\.(weight|bias)", _FRONTEND + r".extractor.norm.\1"),
    (_AUDIO + r"project_features\.2\.(weight|bias)", _FRONTEND + r".extractor.projection.\1"),
    (_AUDIO + r"context_encoder\.norm\.(weight|bias)", _FRONTEND + r".input_norm.\1"),
    (_AUDIO + r"alibi_scale", _FRONTEND + ".bias.scale"),
    (r"norm\.(weight|bias)", r"transformer.norm.\1"),
    (r"feature_extractor\.conv_layers\.(\d+)\.(conv|layer_norm)\.(weight|bias)", _CONVOLUTIONS + r".\1.\2.\3"),
    (r"feature_projection\.layer_norm\.(weight|bias)", _FRONTEND + r".extractor.norm.\1"),
    (r"feature_projection\.projection\.(weight|bias)", _FRONTEND + r".extractor.projection.\1"),
    (r"encoder\.pos_conv_embed\.layers\.(\d+)\.conv\.(weight|bias)", _POSITIONS + r".\1.\2"),
]
# 2.0 counts the position convolutions from 1: a transposition stands before them.
_POSITION_2 = re.compile(_AUDIO + r"relative_positional_encoder\.(\d+)\.0\.(weight|bias)")
_BLOCKS: list[tuple[str, str]] = [
    (_AUDIO + r"context_encoder\.blocks\.(\d+)\.(.+)\.(weight|bias)", _FRONTEND + ".blocks"),
    (r"blocks\.(\d+)\.(.+)\.(weight|bias)", "transformer.blocks"),
    (r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", "transformer.blocks"),
]
_BLOCK = {
    "self_attn_layer_norm": "norm1",  # 1.0
    "self_attn.out_proj": "attention.proj",
    "fc1": "feed_forward.fc1",
    "fc2": "feed_forward.fc2",
    "final_layer_norm": "norm2",
    "norm1": "norm1",  # 2.0
    "norm2": "norm2",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.proj",
    "mlp.fc1": "feed_forward.fc1",
    "mlp.fc2": "feed_forward.fc2",
    "layer_norm": "norm1",  # Hugging Face
    "attention.out_proj": "attention.proj",
    "feed_forward.intermediate_dense": "feed_forward.fc1",
    "feed_forward.output_dense": "feed_forward.fc2",
} | {f"{module}.{part}_proj": "attention.qkv" for module in ("self_attn", "attention") for part in "qkv"}
_HEADS: list[tuple[str, str]] = [
    (r"mask_emb|masked_spec_embed", "mask_tokens.speech"),
    (r"final_proj\.(weight|bias)", r"predictors.speech.layers.0.\1"),
    (_AUDIO + r"decoder\.blocks\.(\d+)\.0\.(weight|bias)", r"predictors.speech.convolutions.\1.\2"),
    (_AUDIO + r"decoder\.proj\.(weight|bias)", r"predictors.speech.projection.0.\1"),
    (_AUDIO + r"decoder\.proj\.(\d+)\.(weight|bias)", r"predictors.speech.projection.\1.\2"),
]
_QUERY = re.compile(r"(.*attn|.*attention)\.([qkv])_proj\.(weight|bias)")
_INSIDE = "data2vec_audio."  # the names of a model with a head begin so, but for the head's
_TRANSFORMERS_HEAD = re.compile(
    r"(lm_head|projector|classifier|feature_extractor)\.(weight|bias)|layer_weights|tdnn\.\d+\..+|objective\..+"
)
_IGNORED = re.compile(r"_ema|.*\.num_updates")  # of training state alone


def our_name(name: str) -> str | None:
    """Our name of a released tensor, inside ``student`` or at the model's top level; None where it has no place.

    Queries, keys and values of 1.0 are parts of one tensor and have its name.
    """
    for pattern, ours in _HEADS:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    for pattern, ours in _ENCODER:
        if match := re.fullmatch(pattern, name):
            return "student." + match.expand(ours)
    if match := _POSITION_2.fullmatch(name):
        return f"student.{_POSITIONS}.{int(match[1]) - 1}.{match[2]}"
    for pattern, ours in _BLOCKS:
        if (match := re.fullmatch(pattern, name)) and match[2] in _BLOCK:
            return f"student.{ours}.{match[1]}.{_BLOCK[match[2]]}.{match[3]}"
    return None


def _mapped(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    unknown = [name for name in state if our_name(name) is None and not _IGNORED.fullmatch(name)]
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors have no place in a data2vec speech model, the first is {unknown[0]!r}: pass the "
            "state of data2vec_audio (1.0), of data2vec_multi (2.0) with the modality AUDIO, or of Data2VecAudioModel"
        )
    for name, value in state.items():
        ours = our_name(name)
        if ours is None:
            continue
        if match := _QUERY.fullmatch(name):
            if match[2] == "q":
                yield ours, torch.cat([_part(state, f"{match[1]}.{part}_proj.{match[3]}") for part in "qkv"])
        else:
            yield ours, value.flatten() if ours.endswith(".bias.scale") or ours.startswith("mask_tokens.") else value


def _part(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise CheckpointError(f"the weights have no {name}: queries, keys and values are needed together")
    return state[name]


def student_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's and the predictors' weights under our names.

    Raises:
        CheckpointError: a tensor that belongs to no data2vec speech model.
    """
    return dict(_mapped(state))


def teacher_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The teacher's averaged weights under our names.

    Raises:
        CheckpointError: see :func:`student_state`.
    """
    if any(name.startswith(("layers.", "pos_conv.")) for name in state):  # 1.0: the names inside its ``encoder``
        state = {f"encoder.{name}": value for name, value in state.items()}
    named = ((ours, value) for ours, value in _mapped(state) if ours.startswith("student."))
    return {"teacher.encoder." + ours.removeprefix("student."): value for ours, value in named}


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
    mapped |= _as_teacher(mapped) if teacher is None else teacher_state(teacher)
    _load(model, mapped)


def load_transformers(model: Data2Vec, state: Mapping[str, Tensor]) -> None:
    """Put the weights of a ``Data2VecAudioModel`` into student and teacher; a predictor, which it has none of, stays.

    Of a model with a head (``Data2VecAudioForCTC``, ``...ForSequenceClassification`` and others) the head is left out,
    which the log says.

    Args:
        model: of the same shape: post-norm, ``speech.input_norm``, and ``speech.positions`` with a kernel of
            ``conv_pos_kernel_size`` and a depth of ``num_conv_pos_embeddings``.
        state: its ``state_dict()``.

    Raises:
        CheckpointError: names or shapes that do not fit; the model is then unchanged.
    """
    kept = {name: v for name, v in model.own_state().items() if name.startswith(("predictors.", "mask_tokens."))}
    mapped = student_state(_without_head(state))
    _load(model, kept | mapped | _as_teacher(mapped))


def _without_head(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The model inside one with a head."""
    if not any(name.startswith(_INSIDE) for name in state):
        return state
    head = sorted(name for name in state if _TRANSFORMERS_HEAD.fullmatch(name))
    if head:
        _log.info("left out: the head (%s)", ", ".join(head))
    return {name.removeprefix(_INSIDE): value for name, value in state.items() if name not in head}


def _as_teacher(mapped: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "student."
    return {"teacher.encoder." + name.removeprefix(prefix): v for name, v in mapped.items() if name.startswith(prefix)}


def _load(model: Data2Vec, mapped: Mapping[str, Tensor]) -> None:
    # What the teacher shares with the student is the student's.
    own = model.own_state().keys()
    shared = {name for name in model.state_dict() if name not in own}
    model.load_own_state({name: value for name, value in mapped.items() if name not in shared})
