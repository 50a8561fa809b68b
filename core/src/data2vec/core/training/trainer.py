"""The training loop: updates, and after each one the decisions whether to evaluate, to log, to save and to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data2vec.core.checkpoints import checkpoint
from data2vec.core.checkpoints.saver import Saver
from data2vec.core.data.dataset import TrainData
from data2vec.core.engines.engine import Engine
from data2vec.core.errors import Data2VecError, RankLostError, TrainingError
from data2vec.core.settings.fields import Recipe
from data2vec.core.training.clock import Clock
from data2vec.core.training.display import Display
from data2vec.core.training.health import HealthCheck
from data2vec.core.training.monitor import Monitor
from data2vec.core.training.progress import Ending, Progress, Snapshot, restored
from data2vec.core.training.scoring import Scoring
from data2vec.core.training.share import Share
from data2vec.core.training.update import Updater

_CHECK_EVERY = 10  # updates after which their values are looked at, however rare log lines are
_INSPECT_EVERY = 10  # log lines from one inspection to the next


class Trainer:
    """Training of a task in a folder, from wherever it is to ``train.updates``.

    Args:
        recipe: the settings.
        engine: runs the task, here and on the other ranks.
        data: training data of each modality.
        folder: the run's, the same on all ranks.
        configuration: what a checkpoint records of the recipe, as plain values.
        display: shows progress.
        measured: ``flops_per_sample`` and ``peak_flops``, where TFLOP/s and MFU are to be shown.
        scoring: how the task is scored while it trains; None: it is not.
        stop_requested: asked after each update.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        data: Mapping[str, TrainData],
        folder: Path,
        *,
        configuration: Mapping[str, Any],
        display: Display,
        measured: Mapping[str, float] | None = None,
        scoring: Scoring | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        train = recipe.train
        self.recipe, self.train, self.engine, self.data, self.folder = recipe, train, engine, dict(data), folder
        self.configuration, self.display, self.measured = configuration, display, dict(measured or {})
        self.scoring, self.stop_requested = scoring, stop_requested
        self.ranks = engine.ranks
        self.share = Share.of(train, self.ranks.world)
        self.progress = Progress(positions=dict.fromkeys(data, 0))
        self.health = HealthCheck(
            engine.task.vitals(), collapse_after=train.collapse_after, warmup=recipe.optim.warmup,
            modalities=list(data),
        )  # fmt: skip
        self.updater = Updater(recipe, engine, self.data, self.share, stop_requested)
        self.saver = Saver(folder / "checkpoints", self.ranks, train.keep)

    @property
    def checkpoints(self) -> Path:
        return self.saver.folder

    def restore(self, saved: checkpoint.Loaded) -> None:
        """Continue from a checkpoint; see :func:`data2vec.core.training.progress.restored`."""
        self.progress = restored(saved, self.engine, self.health, self.data, self.train.seed)

    def run(self) -> Ending:
        """Train until the last update, an interruption, or ``train.max_minutes``; always saves before it returns.

        Raises:
            TrainingError: the loss is not finite, or a signal of the task has collapsed.
            CheckpointError: the disk refused a checkpoint.
            DataError: shards became unreadable, or too many samples are broken.
        """
        with self._opened():
            while self.ending is None:
                stepped = self._update()
                if stepped:
                    self._decide_on_the_end()
                best = stepped and self._evaluate()
                saving = self.ending is not None or best or self.save_is_due or self._due(self.train.checkpoint_every)
                self._log(saving)
                if saving:
                    self._save(best=best)
            self.saver.finish()
        return self.ending

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        """Files, streams and the clock of a run; whatever ends it, the checkpoint that is being written comes first."""
        self.monitor = Monitor(self.folder, self.health, start_update=self.progress.update, ranks=self.ranks)
        self.clock = Clock(self.train, self.progress.seconds)
        self.updater.open(self.progress.positions)
        self.ending = Ending.FINISHED if self.progress.update >= self.train.updates else self._no_better()
        self.save_is_due, self._lines = False, 0
        self._scores: Mapping[str, float] = {}
        self.engine.task.train()
        try:
            yield
        except RankLostError:
            raise
        except Data2VecError as error:  # of every rank, so that all wait for the checkpoint that is being written
            with contextlib.suppress(Data2VecError):
                self.saver.finish()
            if isinstance(error, TrainingError):
                error = type(error)(f"{error}. {self.saver.last_good()}")
            raise error from None
        finally:
            self.saver.abandon()
            self.monitor.close()
            self.updater.close()

    def _update(self) -> bool:
        """Apply one update; false where the run is to stop and its data has stopped already."""
        update = self.progress.update
        name = list(self.data)[update % len(self.data)]  # modalities take turns
        applied = self.updater.apply(name, update)
        if applied is None:
            self.ending = Ending.INTERRUPTED
            return False
        self.progress.update += 1
        self.progress.positions[name] += self.share.taken
        self.progress.seconds = self.clock.seconds()
        self.monitor.add(
            update + 1, applied.values, applied.moments, samples=applied.samples, waited=applied.waited, modality=name
        )
        return True

    def _decide_on_the_end(self) -> None:
        """See whether this update is the last for now, and whether a save is due by the clock; alike on all ranks.

        Raises:
            CheckpointError: the checkpoint that is being written in the background could not be.
            DataError: too many samples of the whole run are broken; few had to be enough until now.
        """
        first, last = self.ranks.first, self.progress.update == self.train.updates
        stop, is_up, due, failed = self.ranks.sum(
            (self.stop_requested(), first and self.clock.is_up, first and self.clock.save_is_due,
             self.saver.failed is not None)
        )  # fmt: skip
        if failed:
            self.ranks.agree(self.saver.failed)
        if last:
            self.updater.judge_all()
        self.save_is_due = bool(due)
        self.ending = Ending.INTERRUPTED if stop else Ending.FINISHED if last else Ending.OUT_OF_TIME if is_up else None

    def _evaluate(self) -> bool:
        """Evaluate where that is due; returns whether ``train.keep_best`` is better than ever."""
        scoring, last = self.scoring, self.progress.update == self.train.updates
        if scoring is None or scoring.every is None or not (last or self._due(scoring.every)):
            return False
        try:
            with self.ranks.together(), self.monitor.paused():
                scores, key = scoring.score(), self.train.keep_best
                best = self.progress.is_best(scores, key, lowest=key in scoring.lowest)
                self.monitor.write({"update": self.progress.update, **scores})
                self._scores = scores
        except RankLostError:
            raise
        except Data2VecError:  # of a shard that evaluation has to wait for, where the run is to stop
            if not any(self.ranks.sum([self.stop_requested()])):
                raise
            self.ending = Ending.INTERRUPTED
            return False
        self.ending = self.ending or self._no_better()
        return best

    def _no_better(self) -> Ending | None:
        """See whether the scores have long been no better than the best."""
        patience = None if self.scoring is None else self.scoring.patience
        return Ending.NO_BETTER if patience is not None and self.progress.stale >= patience else None

    def _log(self, saving: bool) -> None:
        """Write a log line where one is due, also before a save: no update is saved that has not passed the checks."""
        update = self.progress.update
        if self.monitor.pending and (saving or self._due(self.train.log_every)):
            inspect = self._lines % _INSPECT_EVERY == 0 or self.ending is not None
            known = {**self.updater.known(update, inspect=inspect), "seconds": self.progress.seconds, **self.measured}
            with self.ranks.together():
                self.display.update({**self.monitor.flush(**known), **self._scores}, self.train.updates)
            self._lines += 1
        elif update % _CHECK_EVERY == 0:
            with self.ranks.alike():
                self.monitor.check()

    def _save(self, *, best: bool = False) -> None:
        """Save everything that the next update depends on, in the background."""
        with self.monitor.paused():
            now = Snapshot.of(self.progress, self.engine, self.health, self.data, self.configuration)
            self.saver.start(self.progress.update, now.files, now.state, now.local, best=best)
        self.clock.saved()

    def _due(self, every: int | None) -> bool:
        return bool(every) and self.progress.update % (every or 1) == 0
