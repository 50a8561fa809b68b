"""Weights under the names of the authors' released implementation (fairseq) and of Hugging Face's transformers.

A released checkpoint of data2vec 1.0 (``data2vec_vision``) or 2.0 (``data2vec_multi``) is a mapping from names to
tensors, with the teacher's under ``_ema`` or in a mapping of its own. :func:`student_state` and
:func:`teacher_state` give them our names; :func:`load_published` puts them into a model and checks every shape.

Two differences are only of notation: the key bias, which 1.0 leaves out because it cannot change a softmax, is zero
here; and 2.0 calls the modality's own blocks ``context_encoder``.

:func:`load_transformers` does the same with transformers' ``Data2VecVisionModel`` (1.0, no predictor).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from data2vec.core.errors import CheckpointError
from data2vec.core.pretraining.data2vec import Data2Vec

_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.proj",
    "mlp.0": "feed_forward.fc1",
    "mlp.2": "feed_forward.fc2",
    "mlp.fc1": "feed_forward.fc1",
    "mlp.fc2": "feed_forward.fc2",
}
_BLOCK_TRANSFORMERS = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attention.proj",
    "intermediate.dense": "feed_forward.fc1",
    "output.dense": "feed_forward.fc2",
}
_FRONTEND = "frontends.vision"
# (their pattern, our name inside an encoder); both versions, without the prefix of student or teacher.
_ENCODER: list[tuple[str, str]] = [
    (r"patch_embed\.conv\.(weight|bias)", _FRONTEND + r".extractor.embed.proj.\1"),
    (r"cls_emb", _FRONTEND + ".prefix"),
    (r"(?:encoder\.)?rel_pos_bias\.relative_position_bias_table", _FRONTEND + ".bias.table"),
    (r"(?:encoder\.)?norm\.(weight|bias)", r"transformer.norm.\1"),
    (r"modality_encoders\.IMAGE\.extra_tokens", _FRONTEND + ".prefix"),
    (r"modality_encoders\.IMAGE\.local_encoder\.proj\.(weight|bias)", _FRONTEND + r".extractor.embed.proj.\1"),
    (r"modality_encoders\.IMAGE\.fixed_positional_encoder\.positions", _FRONTEND + ".extractor.positions.positions"),
    (r"modality_encoders\.IMAGE\.context_encoder\.norm\.(weight|bias)", _FRONTEND + r".input_norm.\1"),
]
_BLOCKS: list[tuple[str, str]] = [
    (r"modality_encoders\.IMAGE\.context_encoder\.blocks\.(\d+)\.(.+)", _FRONTEND + ".blocks"),
    (r"(?:encoder\.)?blocks\.(\d+)\.(.+)", "transformer.blocks"),
]
# The student alone has these.
_HEADS: list[tuple[str, str]] = [
    (r"mask_emb", "mask_tokens.vision"),
    (r"final_proj\.(weight|bias)", r"predictors.vision.layers.0.\1"),
    (r"modality_encoders\.IMAGE\.decoder\.blocks\.(\d+)\.0\.(weight|bias)", r"predictors.vision.convolutions.\1.\2"),
    (r"modality_encoders\.IMAGE\.decoder\.proj\.(weight|bias)", r"predictors.vision.projection.0.\1"),
    (r"modality_encoders\.IMAGE\.decoder\.proj\.(\d+)\.(weight|bias)", r"predictors.vision.projection.\1.\2"),
]
_TRANSFORMERS: list[tuple[str, str]] = [
    (r"embeddings\.cls_token", f"student.{_FRONTEND}.prefix"),
    (r"embeddings\.mask_token", "mask_tokens.vision"),
    (
        r"embeddings\.patch_embeddings\.projection\.(weight|bias)",
        rf"student.{_FRONTEND}.extractor.embed.proj.\1",
    ),
    (r"encoder\.relative_position_bias\.relative_position_bias_table", f"student.{_FRONTEND}.bias.table"),
    (r"layernorm\.(weight|bias)", r"student.transformer.norm.\1"),
]
_TRANSFORMERS_QKV = r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)"
_TRANSFORMERS_BIAS = r"encoder\.layer\.\d+\.attention\.attention\.relative_position_bias\..*_table"
# Held by the checkpoint but computed here, or of training state alone.
_IGNORED = re.compile(r"(.*\.)?relative_position_index|_ema|.*\.num_updates")
_IGNORED_TRANSFORMERS = re.compile(r"(.*\.)?relative_position_index|(pooler|classifier)\..+")


def our_name(name: str) -> str | None:
    """Our name of a released tensor, inside ``student`` or at the model's top level; None where it has no place."""
    for pattern, ours in _HEADS:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    for pattern, ours in _ENCODER:
        if match := re.fullmatch(pattern, name):
            return "student." + match.expand(ours)
    for pattern, ours in _BLOCKS:
        if match := re.fullmatch(pattern, name):
            block = _block_name(match[2])
            return None if block is None else f"student.{ours}.{match[1]}.{block}"
    return None


def _block_name(name: str) -> str | None:
    if name in ("gamma_1", "gamma_2"):
        return f"scale{name[-1]}"
    if name in ("attn.q_bias", "attn.v_bias"):
        return "attention.qkv.bias"
    module, _, kind = name.rpartition(".")
    return f"{_BLOCK[module]}.{kind}" if module in _BLOCK else None


def _mapped(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    unknown = [name for name in state if our_name(name) is None and not _IGNORED.fullmatch(name)]
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors have no place in a data2vec vision model, the first is {unknown[0]!r}: "
            "pass the state of data2vec_vision (1.0) or data2vec_multi (2.0) with the modality IMAGE"
        )
    for name, value in state.items():
        ours = our_name(name)
        if ours is None:
            continue
        if name.endswith(".q_bias"):
            other = state[name[: -len("q_bias")] + "v_bias"]
            yield ours, torch.cat([value, torch.zeros_like(value), other])
        elif not name.endswith(".v_bias"):
            yield ours, value.flatten() if ours.startswith("mask_tokens.") else value


def student_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's and the predictors' weights under our names.

    Raises:
        CheckpointError: a tensor that belongs to no data2vec vision model.
    """
    return dict(_mapped(state))


def teacher_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The teacher's averaged weights under our names; the released ones carry no prefix of their own."""
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
    if teacher is None:
        mapped |= {
            "teacher.encoder." + name.removeprefix("student."): value
            for name, value in mapped.items()
            if name.startswith("student.")
        }
    else:
        mapped |= teacher_state(teacher)
    _load(model, mapped)


def _load(model: Data2Vec, mapped: Mapping[str, Tensor]) -> None:
    # What the teacher shares with the student is the student's.
    shared = model.state_dict().keys() - model.own_state().keys()
    model.load_own_state({name: value for name, value in mapped.items() if name not in shared})


def _transformers_name(name: str) -> str | None:
    for pattern, ours in _TRANSFORMERS:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    if match := re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name):
        prefix, (module, _, kind) = f"student.transformer.blocks.{match[1]}", match[2].rpartition(".")
        if match[2] in ("lambda_1", "lambda_2"):
            return f"{prefix}.scale{match[2][-1]}"
        if module in _BLOCK_TRANSFORMERS:
            return f"{prefix}.{_BLOCK_TRANSFORMERS[module]}.{kind}"
    return None


def transformers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's weights under our names from the state of a ``Data2VecVisionModel``, or of a model that has one.

    A relative position bias of each block (``use_relative_position_bias``) is accepted where all are equal: here the
    blocks share one. The norm of a mean-pooling head is left out.

    Raises:
        CheckpointError: a tensor that belongs to no data2vec vision model, or different biases in different blocks.
    """
    bare = {name.removeprefix("data2vec_vision."): value for name, value in state.items()}
    named: dict[str, Tensor] = {}
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    unknown, tables = [], []
    for name, value in bare.items():
        if _IGNORED_TRANSFORMERS.fullmatch(name):
            continue
        if match := re.fullmatch(_TRANSFORMERS_QKV, name):
            parts.setdefault((match[1], match[3]), {})[match[2]] = value
        elif re.fullmatch(_TRANSFORMERS_BIAS, name):
            tables.append(value)
        elif ours := _transformers_name(name):
            named[ours] = value.flatten() if ours.startswith("mask_tokens.") else value
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors have no place in a data2vec vision model, the first is {unknown[0]!r}: "
            "pass the state of transformers' Data2VecVisionModel, without absolute positions"
        )
    if any(not torch.equal(table, tables[0]) for table in tables):
        raise CheckpointError(
            "each block has a relative position bias of its own, here they share one: "
            "pass a model with use_shared_relative_position_bias"
        )
    if tables:
        named[f"student.{_FRONTEND}.bias.table"] = tables[0]
    for (block, kind), thirds in parts.items():
        named[f"student.transformer.blocks.{block}.attention.qkv.{kind}"] = _queries_keys_values(block, kind, thirds)
    return named


def _queries_keys_values(block: str, kind: str, thirds: Mapping[str, Tensor]) -> Tensor:
    """The three in one tensor; keys have no bias there."""
    present = dict(thirds)
    if kind == "bias" and "query" in present:
        present.setdefault("key", torch.zeros_like(present["query"]))
    shapes = {tuple(value.shape) for value in present.values()}
    if len(present) < 3 or len(shapes) > 1:
        found = ", ".join(f"{name} {tuple(value.shape)}" for name, value in thirds.items())
        raise CheckpointError(f"block {block}: queries, keys and values do not match in {kind}, there are {found}")
    return torch.cat([present[name] for name in ("query", "key", "value")])


def load_transformers(model: Data2Vec, state: Mapping[str, Tensor]) -> None:
    """Put the weights of a ``Data2VecVisionModel`` into student and teacher, in place.

    The predictor stays as it is; so does the mask token, where the model there has none, and the last layer norm,
    where it pools the mean instead (``use_mean_pooling``).

    Args:
        model: of the same shape, its Transformer pre-norm, with a CLS token and without blocks of images alone.
        state: ``Data2VecVisionModel.state_dict()``.

    Raises:
        CheckpointError: names or shapes that do not fit; the model is then unchanged.
    """
    named = transformers_state(state)
    optional = ("predictors.", "mask_tokens.", "student.transformer.norm.")
    kept = {name: value for name, value in model.own_state().items() if name.startswith(optional)}
    named = kept | named
    teacher = {
        "teacher.encoder." + name.removeprefix("student."): value
        for name, value in named.items()
        if name.startswith("student.")
    }
    _load(model, named | teacher)
