"""The settings of a run: plain frozen dataclasses, no configuration library.

Defaults are those of data2vec 1.0 base (Baevski et al. 2022, arXiv 2202.03555, "paper 1") unless a comment
says otherwise. ``data2vec.core.settings.overrides`` merges command-line overrides into them and checks the types.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Self

from data2vec.core.settings.declare import (
    DEVICE,
    FOLDER_NAME,
    MEMBER,
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    SHARE,
    TEXT,
    Free,
    Rule,
    at_least,
    each,
    section,
    setting,
)
from data2vec.core.settings.schema import replaced


class NormOrder(StrEnum):
    """The place where a Transformer block normalises: before each sub-layer, or after each residual sum."""

    PRE = "pre"
    POST = "post"


class LayerOutput(StrEnum):
    """The part of a block that goes into the target: its feed-forward sub-layer before the residual, or its output."""

    FEED_FORWARD = "feed_forward"
    BLOCK = "block"


class Schedule(StrEnum):
    """Learning rate over updates after a linear warm-up.

    ``cosine`` or ``linear`` to the end, or ``tri_stage`` (hold, then exponential decay).
    """

    COSINE = "cosine"
    LINEAR = "linear"
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

    depth: int = setting(12, at_least(1))
    width: int = setting(768, at_least(1))
    heads: int = setting(12, at_least(1))
    mlp_ratio: float = setting(4.0, POSITIVE)
    norm_order: NormOrder = NormOrder.PRE
    norm_eps: float = setting(1e-6, POSITIVE)
    # Initial value of the learned residual scale; null switches it off.
    layer_scale: float | None = setting(None, POSITIVE)
    drop_path: float = setting(0.0, RATE, anew=True)  # rate of the last block; rises linearly from 0 at the first
    layer_drop: float = setting(0.0, RATE, anew=True)
    dropout: float = setting(0.0, RATE, anew=True)
    attention_dropout: float = setting(0.0, RATE, anew=True)
    activation_dropout: float = setting(0.0, RATE, anew=True)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (decoupled decay; none on norms, biases and other 1-D parameters)."""

    lr: float = setting(5e-4, POSITIVE)
    betas: tuple[float, float] = setting((0.9, 0.98), each(RATE))
    eps: float = setting(1e-6, POSITIVE)
    weight_decay: float = setting(0.01, NOT_NEGATIVE)
    clip: float | None = setting(None, POSITIVE)  # largest gradient norm; null: gradients are not clipped
    schedule: Schedule = Schedule.COSINE
    warmup: int = setting(0, NOT_NEGATIVE)  # updates of linear warm-up
    # Of tri_stage: updates at the full rate after warm-up.
    hold: int = setting(0, NOT_NEGATIVE, Free.WITH_NEW_END)
    start_lr_ratio: float = setting(0.0, SHARE)  # where warm-up starts, as a share of lr
    final_lr_ratio: float = setting(0.0, SHARE)  # where the decay ends, as a share of lr


@dataclass(frozen=True)
class DataConfig:
    """Shards: a path, a glob, a brace list (``train-{0000..0999}.tar``), or http(s), s3, gs or hf URLs."""

    train: str | None = setting(None, TEXT, Free.YES)
    # Labelled samples for evaluation; null: a part of train is held out for it.
    validation: str | None = setting(None, TEXT, Free.YES)
    workers: int = setting(2, NOT_NEGATIVE, Free.YES)
    # Samples are shuffled within groups of this many shuffled shards.
    shuffle_shards: int = setting(16, at_least(1))
    # The run stops when more than this share of samples is broken.
    max_broken: float = setting(0.01, SHARE, Free.YES)
    # Folder in which fetched shards are kept, in one of its own; null: in the run's folder.
    cache: str | None = setting(None, TEXT, Free.YES)
    # Largest size of all that are kept; null: nine tenths of the room there is.
    cache_gb: float | None = setting(None, POSITIVE, Free.YES)
    # Longest time for fetching one shard, all tries together.
    fetch_minutes: float = setting(30.0, POSITIVE, Free.YES)
    fetch_gb: float = setting(32.0, POSITIVE, Free.YES)  # largest shard that is fetched where no index gives its size
    # Of a sample with several members that could be its input (input.jpg): the one that is.
    member: str | None = setting(None, MEMBER)
    # Which of a modality's sample data is made where no train is named; null: its own.
    sample: str | None = setting(None, TEXT)


@dataclass(frozen=True)
class TrainConfig:
    updates: int = setting(400_000, at_least(1), Free.WITH_NEW_END)
    batch: int = setting(2048, at_least(1))  # samples of one update over all ranks
    # Samples of one forward pass on one rank; null: batch / ranks.
    micro_batch: int | None = setting(None, at_least(1), Free.YES)
    # Instead of batch and micro_batch, for samples of different lengths: input lengths (waveform samples, tokens) of
    # one update over all ranks and of one forward pass on one rank, padding included. Samples of like length go
    # together; needs the lengths in the shards' index.
    batch_length: int | None = setting(None, at_least(1))
    micro_length: int | None = setting(None, at_least(1))
    seed: int = setting(0, Rule(lambda seed: 0 <= seed < 2**63, "must be from 0 to below 2^63"))
    device: str = setting("auto", DEVICE, Free.YES)
    precision: Precision = Precision.AUTO
    compile: Switch = setting(Switch.AUTO, free=Free.YES)
    activation_checkpointing: bool = setting(False, free=Free.YES)
    folder: str | None = setting(None, TEXT, Free.YES)  # the run's folder; null: runs/NAME
    # auto: continue what is in the folder; never: start over only in an empty folder; or a path.
    resume: str = setting("auto", TEXT, Free.YES)
    # Continue a run to another train.updates (and optim.hold) than it was started with.
    new_end: bool = setting(False, free=Free.YES)
    # A run or checkpoint whose student a new run starts from, with a new teacher.
    init_from: str | None = setting(None, free=Free.YES)
    # Save and stop after this long; the same command continues.
    max_minutes: float | None = setting(None, POSITIVE, Free.YES)
    log_every: int = setting(10, at_least(1), Free.YES)
    checkpoint_every: int = setting(1_000, at_least(1), Free.YES)
    # Also save when this long has passed since the last save.
    checkpoint_minutes: float | None = setting(30.0, POSITIVE, Free.YES)
    keep: int = setting(2, at_least(1), Free.YES)  # newest checkpoints that stay on disk
    # A value of metrics.jsonl that evaluation.every measures (teacher_knn): the checkpoint with the highest stays, too.
    keep_best: str | None = setting(None, TEXT, Free.YES)
    # The run stops when targets or predictions vary less than this.
    min_target_spread: float = setting(0.05, NOT_NEGATIVE, Free.YES)
    min_prediction_spread: float = setting(0.01, NOT_NEGATIVE, Free.YES)
    # Updates in a row with a low spread that count as a collapse.
    collapse_after: int = setting(40, at_least(1), Free.YES)

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
    """The engine of one or many ranks; none of it changes what is computed, so a run may go on with another.

    Precision, accumulation and activation checkpointing are ``train.precision``, ``train.micro_batch`` and
    ``train.activation_checkpointing``, because every engine has them. The rest is for DeepSpeed.
    """

    kind: EngineKind = EngineKind.AUTO
    # 0: every rank holds everything. 1: optimiser states are sharded. 2: also gradients. 3: also parameters, teacher.
    # Stage 1 makes one exchange an update; 2 and 3 exchange gradients in every forward pass.
    zero_stage: int = setting(1, Rule(lambda stage: 0 <= stage <= 3, "must be 0, 1, 2 or 3"))
    offload_optimizer: bool = False  # optimiser states and step in host memory (stages 1 to 3)
    offload_parameters: bool = False  # parameters and teacher in host memory until they are used (stage 3)
    # Elements reduced together, and gathered ahead at stage 3.
    bucket_size: int = setting(50_000_000, at_least(1))
    # Stage 3: parameters of up to so many elements stay whole on every rank.
    persistence_threshold: int = setting(0, NOT_NEGATIVE)
    join_minutes: float = setting(5.0, POSITIVE)  # how long ranks wait for each other when they start
    deepspeed: dict[str, Any] = field(default_factory=dict)  # any other setting of DeepSpeed, as in its JSON file


def _no_modalities() -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings that every task needs: the network, the data and how it is trained.

    ``modalities`` maps a modality's name to its settings. In overrides and in ``config.yaml`` they stand at the top
    level under that name (``vision.mask.ratio=0.6``).
    """

    kind: ClassVar[str]  # of training: what the settings are for
    order: ClassVar[tuple[str, ...]]  # the fields as they are printed

    name: str = setting("experiment", FOLDER_NAME, Free.YES)
    modalities: Mapping[str, Any] = field(default_factory=_no_modalities)
    transformer: TransformerConfig = section(TransformerConfig)
    optim: OptimConfig = section(OptimConfig)
    data: DataConfig = section(DataConfig)
    train: TrainConfig = section(TrainConfig)
    engine: EngineConfig = section(EngineConfig, Free.YES)

    @property
    def source(self) -> str | None:
        """The run or checkpoint whose weights a new run starts from; None for a fresh beginning."""
        return self.train.init_from

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
                key: replaced(value, modality_changes[key], key) if key in modality_changes else value
                for key, value in base.items()
            }
        changed: Self = replaced(self, changes)
        return changed
