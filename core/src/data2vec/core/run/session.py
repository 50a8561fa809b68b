"""One command's part of a run, from settings to the report, as steps that all ranks get through together."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from data2vec.core.distributed.device import choose_device
from data2vec.core.distributed.ranks import Ranks
from data2vec.core.engines.engine import Engine
from data2vec.core.errors import Data2VecError
from data2vec.core.run.build import build_engine, build_task, measure
from data2vec.core.run.folder import check_folder, hold, run_folder, write_configuration
from data2vec.core.run.kind import Subject
from data2vec.core.run.kinds import kind_of
from data2vec.core.run.load import folder_of, load_run
from data2vec.core.run.prepare import open_data, warn_of_small_cache, with_assets, with_sample_data, write_sample_data
from data2vec.core.run.resume import find_checkpoint, recorded_configuration
from data2vec.core.settings.fields import Recipe
from data2vec.core.settings.finetuning import FineTuning
from data2vec.core.settings.overrides import to_yaml
from data2vec.core.training.display import ConsoleDisplay
from data2vec.core.training.interruption import EXIT_INTERRUPTED, Interruption
from data2vec.core.training.progress import Ending
from data2vec.core.training.trainer import Trainer


class Session:
    """A run, for as long as one command lasts.

    Args:
        recipe: validated settings.
        ranks: who runs it.
        interruption: tells when it is to stop.
        console: where people look.
        is_sample: whether it is the sample variant, whose data is made where no other is named.
    """

    def __init__(
        self, recipe: Recipe, ranks: Ranks, interruption: Interruption, console: Console, *, is_sample: bool
    ) -> None:
        self.recipe, self.ranks, self.interruption, self.console = recipe, ranks, interruption, console
        self.folder, self.kind = run_folder(recipe), kind_of(recipe)
        self.makes_samples = is_sample and recipe.data.train is None

    def run(self) -> int:
        """Run it; returns the exit code.

        Raises:
            Data2VecError: a step failed on this rank.
            PeerError: a step failed on another.
        """
        started = time.monotonic()
        with contextlib.ExitStack() as self.held:
            for step in (
                self._claim_the_folder, self._find_the_checkpoint, self._open_the_data, self._take_the_assets,
                self._build, self._resume, self._record,
            ):  # fmt: skip
                with self.ranks.together():
                    step()
            ending = self._train()
            if ending not in (Ending.FINISHED, Ending.NO_BETTER):
                return self._stop(ending)
            if self.ranks.first and not self._conclude():
                return EXIT_INTERRUPTED
            self._say(f"total time {time.monotonic() - started:.0f} s; run folder: {self.folder}")
        return 0

    def _claim_the_folder(self) -> None:
        check_folder(self.folder)
        if self.ranks.first:
            hold(self.held, self.folder)

    def _find_the_checkpoint(self) -> None:
        choose_device(self.recipe.train.device)  # before anything is written
        self.continued = find_checkpoint(self.recipe, self.folder)
        update = 0 if self.continued is None else int(self.continued.saved.state["update"])
        self.finished = self.continued is not None and update >= self.recipe.train.updates
        if self.makes_samples:
            if self.ranks.first:
                write_sample_data(self.recipe, self.folder / "data", self.console)
            self.recipe = with_sample_data(self.recipe, self.folder / "data")

    def _open_the_data(self) -> None:
        opened = open_data(self.recipe, self.folder / "cache")
        earlier = None if self.continued is None else self.continued.recipe
        self.recipe, (self.train, self.validation) = self.kind.settle(self.recipe, opened, earlier)
        # With the place of the sample data, without that of the files which the run keeps.
        self.configuration = to_yaml(self.recipe)
        if self.ranks.first:
            warn_of_small_cache(self.train)
            self._keep_assets(started=self.continued is not None)

    def _take_the_assets(self) -> None:
        if not self.ranks.first:
            self._keep_assets(started=True)  # rank 0 has put them there

    def _keep_assets(self, *, started: bool) -> None:
        tuned = self.recipe if isinstance(self.recipe, FineTuning) and self.continued is None else None
        source = None if tuned is None else tuned.start
        self.recipe = with_assets(
            self.recipe, self.train, self.validation, self.folder, started=started,
            source=None if source is None else folder_of(Path(source)),
        )  # fmt: skip

    def _build(self) -> None:
        recipe = self.recipe
        source = recipe.source if self.continued is None else None
        start = None if source is None else load_run(source, device="cpu").model.own_state()
        task = build_task(recipe, self.kind, self.ranks)
        self.resized = [] if start is None else task.start_from(start)
        encoder = next(iter(task.encoders().values()), task)
        self.parameters = sum(parameter.numel() for parameter in encoder.parameters())
        self.measured = measure(recipe, task, self.train) if self.ranks.first and not self.finished else {}
        self.engine: Engine = build_engine(task, recipe, self.ranks)

    def _resume(self) -> None:
        recipe = self.recipe
        self.display = ConsoleDisplay(self.console)
        self.trainer = Trainer(
            recipe, self.engine, self.train, self.folder,
            configuration=recorded_configuration(recipe, self.configuration),
            display=self.display, measured=self.measured,
            scoring=self.kind.scoring(self._subject()),
            stop_requested=lambda: self.interruption.requested,
        )  # fmt: skip
        if self.continued is not None:
            self.trainer.restore(self.continued.saved)

    def _record(self) -> None:
        if self.continued is not None and self.continued.notice:
            self._say(self.continued.notice)
        self._say(self._summary())
        if self.ranks.first:
            write_configuration(self.folder, self.configuration)

    def _train(self) -> Ending:
        with self.display, self.interruption.during_training():
            ending = Ending.FINISHED if self.finished else self.trainer.run()
        if ending is Ending.NO_BETTER:
            self._say(f"stopped at update {self.trainer.progress.update}: {self.recipe.train.keep_best} is {ending}")
        return Ending.INTERRUPTED if self.interruption.requested else ending

    def _stop(self, ending: Ending) -> int:
        reached = f"stopped ({ending}) at update {self.trainer.progress.update} of {self.recipe.train.updates}"
        self._say(f"{reached}; saved in {self.folder}. {self._how_to_continue()}")
        return EXIT_INTERRUPTED if ending is Ending.INTERRUPTED else 0

    def _conclude(self) -> bool:
        """Evaluate and report, on the first rank alone; false where that was interrupted."""
        subject, progress = self._subject(), self.trainer.progress
        if self.engine.sharded:  # it holds the task in part
            subject = replace(subject, task=load_run(self.folder, device=str(self.engine.device)).model)
        try:
            self.kind.conclude(subject, progress, self.folder, self.console)
        except KeyboardInterrupt:
            self._say(f"\ninterrupted; the trained model is saved in {self.folder}. {self._how_to_continue()}")
            return False
        except OSError as error:
            raise Data2VecError(
                f"{self.folder}: the report cannot be written ({error}); the trained model is saved. Free space or "
                "repair the disk, then run the same command to evaluate again"
            ) from None
        return True

    def _subject(self) -> Subject:
        engine = self.engine
        return Subject(self.recipe, engine.task, engine.device, self.train, self.validation)

    def _summary(self) -> str:
        recipe, engine, progress, train = self.recipe, self.engine, self.trainer.progress, self.recipe.train
        samples = ", ".join(f"{data.total:,} {name} samples" for name, data in self.train.items())
        how = f"{'bf16' if engine.bf16 else 'fp32'}{', compiled' if engine.compiled else ''}"
        if self.continued is not None:
            text = f"continuing from update {progress.update} of {train.updates} in {self.folder}"
        else:
            new = (
                f"{recipe.name}: {self.parameters / 1e6:.1f} M parameters, {samples}, {train.updates} updates of "
                f"{train.described_batch} on {engine.device} ({how}) in {self.folder}"
            )
            text = "\n".join([*self.resized, new])
        world = self.ranks.world
        return text if world == 1 else f"{text} ({self.trainer.share.describe(world)})"

    def _how_to_continue(self) -> str:
        resume = "" if self.recipe.train.resume == "auto" else " with train.resume=auto"
        return f"The same command{resume} continues."

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)
