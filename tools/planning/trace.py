"""The tensors and the arithmetic of one forward and backward pass, found without a GPU and without weights.

The recipe's model is built and run on torch's meta device, where tensors have shapes and no values: ViT-L takes a
second. What a GPU does otherwise is imitated: bf16 autocast casts what CUDA's does, attention keeps what the fused
kernels keep (its inputs, its output and one number for each row and head, never the matrix of scores), dropout keeps a
mask of single bytes. What saved-tensor hooks see is what stays between forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from data2vec.core.batch import Batch
from data2vec.core.pretraining.data2vec import Data2Vec
from data2vec.core.settings.fields import Precision
from data2vec.core.settings.pretraining import Experiment

# CUDA's autocast: the operations of our models that it runs in bf16, and those that it runs in fp32.
_LOWER = frozenset({F.linear, F.conv1d, F.conv2d, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__})
_HIGHER = frozenset({F.layer_norm, F.group_norm, F.mse_loss, F.smooth_l1_loss, F.softmax, torch.softmax})


@dataclass(frozen=True)
class Activations:
    """Bytes that stay between forward and backward, by what they grow with.

    ``fixed``: whatever the batch (copies of weights in bf16, attention biases). ``per_sample``: for each sample.
    """

    fixed: float
    per_sample: float

    def of(self, samples: float) -> float:
        """Bytes of a forward pass of so many samples."""
        return self.fixed + self.per_sample * samples


@dataclass(frozen=True)
class Trace:
    """A recipe's model: its tensors, and what a pass over one sample is.

    ``groups``: the sizes of trained parameters in each group of the optimiser, in order. ``teacher``: the sizes of the
    parameters that the teacher does not share. ``predictors``: trained elements outside of the student's encoder.
    ``student_buffers``, ``teacher_buffers``: bytes. ``whole``, ``checkpointed``: activations without and with
    ``train.activation_checkpointing``. ``flops``: of a sample's forward and backward, the teacher's pass included;
    ``recomputed``: what checkpointing adds. ``length``: of one sample's input.
    """

    groups: tuple[tuple[int, ...], ...]
    teacher: tuple[int, ...]
    predictors: int
    student_buffers: int
    teacher_buffers: int
    whole: Activations
    checkpointed: Activations
    flops: float
    recomputed: float
    length: int

    @property
    def trained(self) -> int:
        """Elements of all trained parameters."""
        return sum(map(sum, self.groups))

    @property
    def frozen(self) -> int:
        """Elements of the teacher's own parameters."""
        return sum(self.teacher)


def trace(experiment: Experiment) -> Trace:
    """Build and run a recipe's model on the meta device; of several modalities the heaviest decides.

    Raises:
        ConfigError: a modality has no random input.
    """
    model = build(experiment)
    bf16 = experiment.train.precision is not Precision.FP32
    passes = {
        name: [_run(model, experiment, name, samples, bf16=bf16) for samples in (1, 3)]
        for name in experiment.modalities
    }
    name = max(passes, key=lambda key: passes[key][1].saved)
    one, three = passes[name]
    teacher = [p.numel() for p in model.parameters() if not p.requires_grad]
    groups = [[p.numel() for p in group.parameters] for group in model.groups(experiment.optim)]
    encoder = {id(p) for p in model.student.parameters()}
    buffers = {id(b): b.nbytes for b in model.student.buffers()}
    return Trace(
        groups=tuple(map(tuple, groups)),
        teacher=tuple(teacher),
        predictors=sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in encoder),
        student_buffers=sum(buffers.values()),
        teacher_buffers=sum(b.nbytes for b in model.teacher.buffers() if id(b) not in buffers),
        whole=_line(one.saved, three.saved),
        checkpointed=_line(one.with_checkpoints(), three.with_checkpoints()),
        flops=sum(pair[1].flops / 3 for pair in passes.values()) / len(passes),
        recomputed=sum(pair[1].in_blocks / 3 for pair in passes.values()) / len(passes),
        length=three.length,
    )


def _line(one: float, three: float) -> Activations:
    per_sample = (three - one) / 2
    return Activations(max(0.0, one - per_sample), per_sample)


class _OnMeta(TorchFunctionMode):
    """Parameters without values; whatever is computed in a constructor (rates, tables) stays real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build(experiment: Experiment) -> Data2Vec:
    """The model on the meta device. No block is skipped: plans are for the update that skips none."""
    with _OnMeta():
        model = Data2Vec.build(experiment.replace(transformer={"layer_drop": 0.0}))
    return model.to("meta").train()


@dataclass
class _Pass:
    """``saved``: bytes. ``flops``, ``in_blocks``: operations, of all and of the shared blocks' forward.

    ``blocks``: (bytes saved, bytes of the input) of every block of the shared Transformer. ``length``: of an input.
    """

    saved: float = 0.0
    flops: float = 0.0
    in_blocks: float = 0.0
    blocks: list[tuple[float, float]] = field(default_factory=list)
    length: int = 0

    def with_checkpoints(self) -> float:
        """Bytes saved when each block keeps its input alone, and one of them is being computed again."""
        saved = [block for block, _ in self.blocks]
        return self.saved - sum(saved) + sum(x for _, x in self.blocks) + max(saved, default=0.0)


def _run(model: Data2Vec, experiment: Experiment, name: str, samples: int, *, bf16: bool) -> _Pass:
    modality = experiment.modalities[name]
    drawn = modality.exhibit.random_input(samples).inputs
    batch = Batch(name, drawn, torch.arange(samples), torch.full((samples,), -1))
    prepared = model.prepare(batch, seed=0, update=0).to("meta")
    found = _Pass(length=drawn.shape[1])
    with FlopCounterMode(display=False) as counter:
        gpu = _LikeCuda(bf16=bf16)
        keeper = _Keeper(model, lambda: counter.get_total_flops() + gpu.flops, gpu.casts)
        with torch.random.fork_rng(devices=[]), keeper, gpu:
            total = model(prepared).total
        found.saved, found.blocks, found.in_blocks = keeper.total(), keeper.blocks, keeper.flops
        total.backward()
        found.flops = counter.get_total_flops() + gpu.flops
    for parameter in model.parameters():
        parameter.grad = None
    return found


class _Keeper:
    """Distinct storages that autograd keeps, parameters and the batch's bf16 weights told apart from the rest."""

    def __init__(self, model: Data2Vec, flops: Callable[[], float], casts: Mapping[int, Tensor]) -> None:
        self.kept: dict[int, Any] = {}
        self.blocks: list[tuple[float, float]] = []
        self.flops = 0.0
        self._model, self._count, self._casts = model, flops, casts
        self._parameters = {_key(value) for value in model.parameters()}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda value: value)
        self._handles: list[Any] = []
        self._before = (0.0, 0.0)

    def _pack(self, value: Tensor) -> Tensor:
        self.kept.setdefault(_key(value), value.untyped_storage())
        return value

    def total(self) -> float:
        """Bytes, bf16 copies of weights included whether saved or only cached."""
        weights = {_key(value) for value in self._casts.values()}
        rest = sum(s.nbytes() for key, s in self.kept.items() if key not in self._parameters and key not in weights)
        return float(rest + sum(value.nbytes for value in self._casts.values()))

    def _grown(self) -> float:
        weights = {_key(value) for value in self._casts.values()} | self._parameters
        return float(sum(storage.nbytes() for key, storage in self.kept.items() if key not in weights))

    def _enter_block(self, block: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._before = self._grown(), self._count()

    def _leave_block(self, block: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.blocks.append((self._grown() - self._before[0], float(arguments[0].nbytes)))
        self.flops += self._count() - self._before[1]

    def __enter__(self) -> None:
        for block in self._model.student.transformer.blocks:
            self._handles.append(block.register_forward_pre_hook(self._enter_block))
            self._handles.append(block.register_forward_hook(self._leave_block))
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()


def _key(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


class _LikeCuda(TorchFunctionMode):
    """The behaviour of CUDA kernels and CUDA's autocast, on the meta device.

    ``casts``: bf16 copies of weights, which autocast makes once for a pass. ``flops``: of attention.
    """

    def __init__(self, *, bf16: bool) -> None:
        super().__init__()
        self.casts: dict[int, Tensor] = {}
        self.flops = 0.0
        self._bf16 = bf16

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            query, key, value = (self._lower(x) for x in args[:3])
            mask = kwargs.get("attn_mask")
            return _Attention.apply(query, key, value, mask, self)  # type: ignore[no-untyped-call]
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if self._bf16 and func in _LOWER:
            args, kwargs = _mapped(self._lower, args, kwargs)
        elif self._bf16 and func in _HIGHER:
            args, kwargs = _mapped(lambda x: x.float() if x.dtype is torch.bfloat16 else x, args, kwargs)
        return func(*args, **kwargs)

    def _lower(self, value: Tensor) -> Tensor:
        if not self._bf16 or value.dtype is not torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad and torch.is_grad_enabled()):
            return value.to(torch.bfloat16)
        return self.casts.setdefault(id(value), value.to(torch.bfloat16))


def _mapped(function: Callable[[Tensor], Tensor], args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    def mapped(value: Any) -> Any:
        return function(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(mapped(value) for value in args), {key: mapped(value) for key, value in kwargs.items()}


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """As on a GPU: what is kept for backward is a mask of bytes."""
    if not training or p == 0.0:
        return x
    dropped: Tensor = torch.native_dropout(x, p, True)[0]
    return dropped


class _Attention(torch.autograd.Function):
    """A fused kernel's account: four products of (B, H, T, D) shapes forward counted twofold, 2.5 times that back."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, gpu: _LikeCuda) -> Tensor:
        ctx.gpu, ctx.work = gpu, 4.0 * query.numel() * key.shape[-2]
        ctx.shapes = [None if x is None else (x.shape, x.dtype) for x in (query, key, value, mask)]
        gpu.flops += ctx.work
        out = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.gpu.flops += 2.5 * ctx.work
        needed = ctx.needs_input_grad
        gradients = [
            gradient.new_empty(s[0], dtype=s[1]) if s is not None and needs else None
            for s, needs in zip(ctx.shapes, needed, strict=False)
        ]
        return (*gradients, None)
