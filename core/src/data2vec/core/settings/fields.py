"""The settings of an experiment: plain frozen dataclasses, no configuration library.

Defaults are those of data2vec 1.0 base (Baevski et al. 2022, arXiv 2202.03555, "paper 1") unless a comment
says otherwise. ``data2vec.core.settings.overrides`` merges command-line overrides into them and checks the types.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from data2vec.core.errors import ConfigError


class NormOrder(StrEnum):
    """Where a Transformer block normalises: before each sub-layer, or after each residual sum."""

    PRE = "pre"
    POST = "post"


class TargetNorm(StrEnum):
    """How a teacher layer, or the mean of the layers, is normalised; none has learned parameters.

    ``layer``: over channels of each position. ``instance``: over the positions of each sample, per channel.
    ``batch``: over all positions of the batch, per channel.
    """

    NONE = "none"
    LAYER = "layer"
    INSTANCE = "instance"
    BATCH = "batch"


class LayerOutput(StrEnum):
    """What a block contributes to the target: its feed-forward sub-layer before the residual, or its output."""

    FEED_FORWARD = "feed_forward"
    BLOCK = "block"


class StudentSees(StrEnum):
    """``all`` positions with masked ones replaced by a mask token (1.0), or the ``visible`` ones alone (2.0)."""

    ALL = "all"
    VISIBLE = "visible"


class TeacherShares(StrEnum):
    """What the teacher takes from the student instead of averaging it.

    ``nothing``; the feature ``extractor``; that and the ``positions`` computed from its features; or the whole
    ``frontend`` (also prefix tokens, input norm and modality blocks), so that only the shared Transformer and its
    attention bias are averaged.
    """

    NOTHING = "nothing"
    EXTRACTOR = "extractor"
    POSITIONS = "positions"
    FRONTEND = "frontend"


class PredictorKind(StrEnum):
    """``identity``: the student's output is the prediction, as in the released vision code of data2vec 1.0."""

    IDENTITY = "identity"
    LINEAR = "linear"
    MLP = "mlp"
    CONV1D = "conv1d"
    CONV2D = "conv2d"


class Schedule(StrEnum):
    """Learning rate over updates after a linear warm-up: ``cosine`` to the end, or ``tri_stage`` (hold, then decay)."""

    COSINE = "cosine"
    TRI_STAGE = "tri_stage"


class Precision(StrEnum):
    """``auto`` is bf16 autocast on a GPU and fp32 on a CPU. Parameters stay fp32 in every case."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


class Switch(StrEnum):
    AUTO = "auto"
    ON = "on"
    OFF = "off"


@dataclass(frozen=True)
class TransformerConfig:
    """The shared Transformer. Base: 12 blocks, 768 wide, 12 heads (paper 1, section 4)."""

    depth: int = 12
    width: int = 768
    heads: int = 12
    mlp_ratio: float = 4.0
    norm_order: NormOrder = NormOrder.PRE
    norm_eps: float = 1e-6
    layer_scale: float | None = None  # initial value of the learned residual scale; null switches it off
    drop_path: float = 0.0  # rate of the last block; rises linearly from 0 at the first
    layer_drop: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0


@dataclass(frozen=True)
class PredictorConfig:
    """The head that turns student outputs into predictions of the target.

    ``linear`` and ``mlp`` (``layers`` linear layers, GELU between, ``width`` = hidden width, null = twice the
    Transformer's) act on each position; the convolutional decoders of data2vec 2.0 see all positions.
    """

    kind: PredictorKind = PredictorKind.LINEAR
    layers: int = 1
    width: int | None = None
    kernel: int = 3
    groups: int = 1
    residual: bool = True
    projection_layers: int = 1
    projection_ratio: float = 2.0
    input_dropout: float = 0.0
    mask_noise: float = 0.01  # standard deviation of the tokens that stand at masked positions (2.0)


@dataclass(frozen=True)
class TeacherConfig:
    """Decay rises linearly from ``decay_start`` to ``decay_end`` over ``decay_updates`` updates, then stays."""

    decay_start: float = 0.999
    decay_end: float = 0.9999
    decay_updates: int = 30_000
    shares: TeacherShares = TeacherShares.EXTRACTOR


@dataclass(frozen=True)
class TargetsConfig:
    """Mean over the teacher's last ``top_k`` blocks, each normalised by ``layer_norm``, the mean by ``mean_norm``."""

    top_k: int = 8
    output: LayerOutput = LayerOutput.FEED_FORWARD
    layer_norm: TargetNorm = TargetNorm.INSTANCE
    mean_norm: TargetNorm = TargetNorm.NONE


@dataclass(frozen=True)
class LossConfig:
    """Smooth L1 with ``beta`` (0: squared error), times ``scale`` (null: 1 / sqrt(width)), summed over channels."""

    beta: float = 0.0
    scale: float | None = None
    cls_weight: float = 0.0  # of the CLS token's regression of the mean target, averaged over rows (samples x masks)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (decoupled decay; none on norms, biases and other 1-D parameters)."""

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    clip: float | None = None  # largest gradient norm; null: gradients are not clipped
    schedule: Schedule = Schedule.COSINE
    warmup: int = 0  # updates of linear warm-up
    hold: int = 0  # tri_stage: updates at the full rate after warm-up
    start_lr_ratio: float = 0.0  # where warm-up starts, as a share of lr
    final_lr_ratio: float = 0.0  # where the decay ends, as a share of lr


@dataclass(frozen=True)
class DataConfig:
    """Shards: a path, a glob, a brace list (``train-{0000..0999}.tar``), or http(s), s3, gs or hf URLs."""

    train: str | None = None
    validation: str | None = None  # labelled samples for evaluation; null: a part of train is held out for it
    workers: int = 2
    shuffle_shards: int = 16  # samples are shuffled within groups of this many shuffled shards
    max_broken: float = 0.01  # the run stops when more than this share of samples is broken
    cache: str | None = None  # folder in which fetched shards are kept, in one of its own; null: in the run's folder
    cache_gb: float | None = None  # largest size of all that are kept; null: nine tenths of the room there is
    fetch_minutes: float = 30.0  # longest time for fetching one shard, all tries together
    fetch_gb: float = 32.0  # largest shard that is fetched where no index gives its size
    member: str | None = None  # of a sample with several that could be its input (input.jpg): the one that is


@dataclass(frozen=True)
class TrainConfig:
    updates: int = 400_000
    batch: int = 2048  # samples of one update over all ranks
    micro_batch: int | None = None  # samples of one forward pass on one rank; null: batch / ranks
    # Instead of batch and micro_batch, for samples of different lengths: input lengths (waveform samples, tokens) of
    # one update over all ranks and of one forward pass on one rank, padding included. Samples of like length go
    # together; needs the lengths in the shards' index.
    batch_length: int | None = None
    micro_length: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: Precision = Precision.AUTO
    compile: Switch = Switch.AUTO
    activation_checkpointing: bool = False
    folder: str | None = None  # the run's folder; null: runs/NAME
    resume: str = "auto"  # auto: continue what is in the folder; never: start over only in an empty folder; or a path
    new_end: bool = False  # continue a run to another train.updates (and optim.hold) than it was started with
    init_from: str | None = None  # a run or checkpoint whose student a new run starts from, with a new teacher
    max_minutes: float | None = None  # save and stop after this long; the same command continues
    log_every: int = 10
    checkpoint_every: int = 1_000
    checkpoint_minutes: float | None = 30.0  # also save when this long has passed since the last save
    keep: int = 2  # newest checkpoints that stay on disk
    # A value of metrics.jsonl that evaluation.every measures (teacher_knn): the checkpoint with the highest stays, too.
    keep_best: str | None = None
    min_target_spread: float = 0.05  # the run stops when targets or predictions vary less than this
    min_prediction_spread: float = 0.01
    collapse_after: int = 40  # updates in a row with a low spread that count as a collapse

    @property
    def micro_batches(self) -> int | None:
        """Forward passes of one update over all ranks where ``micro_length`` decides their size, else None."""
        if self.micro_length is None:
            return None
        return max(1, round((self.batch_length or self.micro_length) / self.micro_length))

    @property
    def described_batch(self) -> str:
        """The data of one update, for people."""
        if self.micro_length is None:
            return f"{self.batch:,} samples"
        return f"{(self.batch_length or self.micro_length):,} of input length"


class EngineKind(StrEnum):
    """``auto``: ``deepspeed`` for a run that a launcher started, where it is installed; else ``torch``."""

    AUTO = "auto"
    TORCH = "torch"
    DEEPSPEED = "deepspeed"


@dataclass(frozen=True)
class EngineConfig:
    """What runs the model on one or many ranks; none of it changes what is computed, so a run may go on with another.

    Precision, accumulation and activation checkpointing are ``train.precision``, ``train.micro_batch`` and
    ``train.activation_checkpointing``, because every engine has them. The rest is for DeepSpeed.
    """

    kind: EngineKind = EngineKind.AUTO
    # 0: every rank holds everything. 1: optimiser states are sharded. 2: also gradients. 3: also parameters, teacher.
    zero_stage: int = 1  # one exchange an update; 2 and 3 exchange gradients in every forward pass
    offload_optimizer: bool = False  # optimiser states and step in host memory (stages 1 to 3)
    offload_parameters: bool = False  # parameters and teacher in host memory until they are used (stage 3)
    bucket_size: int = 50_000_000  # elements reduced together, and gathered ahead at stage 3
    persistence_threshold: int = 0  # stage 3: parameters of up to so many elements stay whole on every rank
    join_minutes: float = 5.0  # how long ranks wait for each other when they start
    deepspeed: dict[str, Any] = field(default_factory=dict)  # any other setting of DeepSpeed, as in its JSON file


@dataclass(frozen=True)
class EvaluationConfig:
    """Probes of frozen features, run after training (and every ``every`` updates when that is set)."""

    tasks: tuple[str, ...] = ("knn", "linear", "rank")
    layers: str = "top_k"  # top_k: mean of the top K layers; last; all; or a layer number
    neighbours: int = 20
    few_labels: int = 200
    max_samples: int = 50_000
    max_positions: int = 10_000  # single positions (frames) that the task positions is fitted to, and judged by
    batch: int = 256
    every: int | None = None


def _modalities() -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Experiment:
    """Everything that defines a run. ``modalities`` maps a modality's name to its settings.

    In overrides and in ``config.yaml`` a modality's settings stand at the top level under its name
    (``vision.mask.ratio=0.6``).
    """

    name: str = "experiment"
    modalities: Mapping[str, Any] = field(default_factory=_modalities)
    student_sees: StudentSees = StudentSees.ALL
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed; a dict changes only the named fields of a section.

        ``base.replace(name="large", transformer={"depth": 24}, vision={"mask": {"ratio": 0.75}})``

        Raises:
            ConfigError: a name that is no setting.
        """
        fields = {f.name for f in dataclasses.fields(self)}
        modality_changes = {
            key: changes.pop(key) for key in list(changes) if key in self.modalities and key not in fields
        }
        if modality_changes:
            base = changes.get("modalities", self.modalities)
            changes["modalities"] = {
                key: _replaced(value, modality_changes[key], key) if key in modality_changes else value
                for key, value in base.items()
            }
        replaced: Self = _replaced(self, changes, "")
        return replaced


def _replaced(value: Any, change: Any, path: str) -> Any:
    if not (dataclasses.is_dataclass(value) and isinstance(change, dict)):
        return change
    names = {f.name for f in dataclasses.fields(value)}
    unknown = [key for key in change if key not in names]
    if unknown:
        raise ConfigError([f"{path + '.' if path else ''}{key}: no such setting" for key in unknown])
    nested = {key: _replaced(getattr(value, key), new, f"{path}.{key}" if path else key) for key, new in change.items()}
    return dataclasses.replace(value, **nested)  # type: ignore[type-var]
