"""The position of a run, as its checkpoints hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch

from data2vec.core.checkpoints import checkpoint
from data2vec.core.data.dataset import TrainData
from data2vec.core.engines.engine import Engine, Shares
from data2vec.core.errors import CheckpointError, TrainingError
from data2vec.core.hashing import derive
from data2vec.core.training.health import HealthCheck


class Ending(StrEnum):
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    OUT_OF_TIME = "out of time"
    NO_BETTER = "no longer better"


@dataclass
class Progress:
    """The position of a run: applied updates, samples of each modality, seconds so far.

    ``best``: the best score of those that ``train.keep_best`` names. ``stale``: scores since then.
    """

    update: int = 0
    positions: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    best: float | None = None
    stale: int = 0

    def is_best(self, scores: Mapping[str, float], key: str | None, *, lowest: bool = False) -> bool:
        """Note the score that ``train.keep_best`` names, and see whether it is higher (or lower) than ever.

        Raises:
            TrainingError: no such score.
        """
        if key is None:
            return False
        if key not in scores:
            raise TrainingError(f"train.keep_best={key}: evaluation gives no such value; choose of {', '.join(scores)}")
        better = self.best is None or (scores[key] < self.best if lowest else scores[key] > self.best)
        self.best = scores[key] if better else self.best
        self.stale = 0 if better else self.stale + 1
        return better


@dataclass(frozen=True)
class Snapshot:
    """The whole state that the next update depends on, as :meth:`Saver.start` takes it.

    ``files``: tensors that this rank saves. ``state``: what is no tensor and the same on every rank. ``local``: what is
    no tensor and this rank's own.
    """

    files: dict[str, Shares]
    state: dict[str, Any]
    local: dict[str, Any]

    @classmethod
    def of(
        cls,
        progress: Progress,
        engine: Engine,
        health: HealthCheck,
        data: Mapping[str, TrainData],
        configuration: Mapping[str, Any],
    ) -> Snapshot:
        """Take one now."""
        tensors, generators = checkpoint.random_state(engine.device)
        random = {f"{engine.ranks.rank}/{name}": value for name, value in tensors.items()}
        state = {
            "progress": {
                "positions": progress.positions,
                "seconds": progress.seconds,
                "best": progress.best,
                "stale": progress.stale,
            },
            "health": health.state(),
            "data": {name: d.fingerprint for name, d in data.items()},
            "configuration": configuration,
        }
        return cls({**engine.state(), "random": random}, state, {"random": generators})


def restored(
    saved: checkpoint.Loaded, engine: Engine, health: HealthCheck, data: Mapping[str, TrainData], seed: int
) -> Progress:
    """Put engine, health check and random states where a checkpoint was, and return its progress.

    Any engine on any number of ranks may have written it.

    Raises:
        CheckpointError: it belongs to other data or another model.
    """
    state, ranks = saved.state, engine.ranks
    try:
        for name, d in data.items():
            if state["data"].get(name) != d.fingerprint:
                raise CheckpointError(
                    f"the checkpoint of update {state['update']} was made with other shards than "
                    f"{d.shards.spec!r} (their names, order or counts differ): give the same data.train, "
                    "or another train.folder"
                )
        health.load_state(state["health"], int(state["update"]))
        progress = Progress(
            state["update"],
            {name: checkpoint.whole_number(state["progress"]["positions"][name], name) for name in data},
            checkpoint.number(state["progress"]["seconds"], "seconds"),
            checkpoint.number(state["progress"]["best"], "best", optional=True),
            checkpoint.whole_number(state["progress"].get("stale", 0), "stale"),
        )
        if state["world"] == ranks.world:
            prefix = f"{ranks.rank}/"
            tensors = saved.tensors["random"]
            own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            checkpoint.restore_random_state(own, state["local"][ranks.rank]["random"], engine.device)
        else:  # there is no state for each of these ranks; dropout and noise differ, masks and order do not
            torch.manual_seed(derive(seed, progress.update, ranks.rank))
        engine.load_state(saved.tensors["model"], saved.tensors["optimiser"])  # last: what fails changes nothing
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        lacking = f"the checkpoint of update {state['update']} lacks or garbles part of its state"
        raise CheckpointError(f"{lacking}: {error}; choose an earlier one") from None
    return progress
