"""The choice of stage, micro-batch and checkpointing to train a recipe with."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from planning.cost import Rate, Time, Volume, step_time, volume
from planning.memory import STAGES, TORCH, Memory, memory
from planning.trace import Trace

from data2vec.core.errors import ConfigError
from data2vec.core.settings.pretraining import Experiment
from data2vec.core.training.share import Share

MARGIN = 0.10  # of a GPU's memory, for CUDA, NCCL, cuBLAS and what fragmentation loses
_SMALLEST = 8  # samples of a forward pass under which recomputing activations is tried before smaller ones


@dataclass(frozen=True)
class Cluster:
    """``gpus``: ranks, ``node`` of them on a host. ``memory``: bytes of one. ``bandwidth``: bytes a second."""

    gpus: int
    node: int
    memory: float
    bandwidth: float

    @property
    def usable(self) -> float:
        return self.memory * (1 - MARGIN)


@dataclass(frozen=True)
class PlanRow:
    """One stage under some settings."""

    stage: int
    memory: Memory
    sent: Volume
    time: Time
    fits: bool


@dataclass(frozen=True)
class Settings:
    """A recipe with its share of one rank; ``changes``: settings that differ from the recipe's, as overrides."""

    experiment: Experiment
    share: Share
    samples: float
    changes: tuple[str, ...] = ()

    @property
    def checkpointing(self) -> bool:
        return self.experiment.train.activation_checkpointing


@dataclass(frozen=True)
class Choice:
    """``row`` is None where nothing fits; ``reason``: why this one, or why none."""

    settings: Settings
    row: PlanRow | None
    reason: str


Rates = Callable[[bool], Rate]
"""The rate of one GPU without and with activation checkpointing."""


def plan_settings(experiment: Experiment, trace: Trace, gpus: int, changes: tuple[str, ...] = ()) -> Settings:
    """Settle what each rank does of the recipe.

    Raises:
        ConfigError: the batch cannot be shared by so many.
    """
    share = Share.of(experiment.train, gpus)
    if share.micro_batch:
        return Settings(experiment, share, share.micro_batch, changes)
    length = experiment.train.micro_length or trace.length
    modality = next(iter(experiment.modalities.values()))
    fewest = length // (modality.length_range[1] or trace.length)
    if fewest < share.parts:
        raise ConfigError(
            [
                f"--gpus {gpus}: {share.parts} ranks would share each forward pass of train.micro_length={length:,}, "
                f"which may be only {fewest} samples; choose at most {gpus // share.parts * max(fewest, 1)} GPUs, or a "
                "larger train.batch_length"
            ]
        )
    return Settings(experiment, share, length / trace.length / share.parts, changes)


def rows(trace: Trace, settings: Settings, cluster: Cluster, rates: Rates) -> list[PlanRow]:
    """Every stage under some settings."""
    found = []
    engine, passes = settings.experiment.engine, settings.share.passes
    kept = trace.checkpointed if settings.checkpointing else trace.whole
    rate = rates(settings.checkpointing)
    for stage in STAGES:
        account = memory(
            trace, stage, cluster.gpus, engine=engine, activations=kept.of(settings.samples), passes=passes
        )
        sent = volume(trace, stage, cluster.gpus, engine, passes)
        time = step_time(
            trace, stage, cluster.gpus, rate=rate, sent=sent, bandwidth=cluster.bandwidth,
            samples=settings.samples, passes=passes,
        )  # fmt: skip
        found.append(PlanRow(stage, account, sent, time, account.peak <= cluster.usable))
    return found


def choose(trace: Trace, settings: Settings, cluster: Cluster, rates: Rates) -> Choice:
    """The fastest stage that fits the recipe; else of a smaller forward pass; else with checkpointing; else stage 3.

    One GPU shards nothing, so there it is plain torch. What is offloaded narrows the stages to those that can do it.
    """
    engine = settings.experiment.engine
    stages: tuple[int, ...] = (TORCH,) if cluster.gpus == 1 else (0, 1, 2)
    if engine.offload_parameters:
        stages = ()
    elif engine.offload_optimizer:
        stages = (1, 2)
    for tried in _variants(settings, trace, cluster.gpus):
        fitting = [row for row in rows(trace, tried, cluster, rates) if row.stage in stages and row.fits]
        if fitting:
            row = min(fitting, key=lambda row: row.time.total)
            return Choice(tried, row, _why(row, tried, cluster))
    alone = cluster.gpus == 1 and not engine.offload_parameters
    for tried in _variants(settings, trace, cluster.gpus) if not alone else ():
        row = next(row for row in rows(trace, tried, cluster, rates) if row.stage == 3)
        if row.fits:
            why = "only stage 3 offloads parameters" if engine.offload_parameters else "nothing less fits"
            return Choice(
                tried,
                row,
                f"{why}: it shards parameters and teacher too, and is about three times as slow at ViT-B's size, where "
                "compiling is refused",
            )
    more = "more GPUs, " if cluster.gpus > 1 else "several GPUs, "
    return Choice(settings, None, f"no stage fits; give {more}GPUs with more memory, or engine.offload_optimizer=true")


def _why(row: PlanRow, settings: Settings, cluster: Cluster) -> str:
    if row.stage == TORCH:
        why = "one GPU has nothing to shard, and plain torch is fastest"
    else:
        why = "the fastest by this prediction of the stages that fit"
    if settings.changes:
        why = f"as it stands the recipe does not fit; with {' and '.join(settings.changes)} this is {why}"
    return f"{why}; stage 3 is for models that fit no other way" if cluster.gpus > 1 else why


def _variants(settings: Settings, trace: Trace, gpus: int) -> Iterator[Settings]:
    """The recipe as it is, with smaller forward passes, with checkpointing, with both."""
    experiment = settings.experiment
    for checkpointing in (False, True) if not settings.checkpointing else (True,):
        smallest = 1 if checkpointing else _SMALLEST
        train = {"activation_checkpointing": checkpointing}
        changes = ("train.activation_checkpointing=true",) if checkpointing and not settings.checkpointing else ()
        changed = experiment.replace(train=train)
        yield plan_settings(changed, trace, gpus, changes)
        if settings.share.micro_batch:
            size = settings.share.micro_batch // 2
            while size >= smallest:
                yield plan_settings(changed.replace(train={"micro_batch": size}), trace, gpus,
                                  (f"train.micro_batch={size}", *changes))  # fmt: skip
                size //= 2


def command(choice: Choice, cluster: Cluster, path: str, overrides: tuple[str, ...], *, sample: bool) -> str:
    """The command line that trains as was chosen."""
    row = choice.row
    assert row is not None
    words = [shlex.quote(word) for word in (*overrides, *choice.settings.changes)]
    if not sample and not any(word.startswith("data.train=") for word in overrides):
        words.append("data.train=SHARDS")
    if sample:
        words.append("--sample")
    if row.stage == TORCH:
        return " ".join(["uv run", shlex.quote(path), *words])
    words.append(f"engine.zero_stage={row.stage}")
    hosts = cluster.gpus // cluster.node
    where = f"--num_gpus {cluster.gpus}"
    if hosts > 1:
        where = f"--hostfile HOSTS --num_nodes {hosts} --num_gpus {cluster.node}"
    return " ".join([f"uv run deepspeed {where} tools/launch.py", shlex.quote(path), *words])
