"""The main function of an experiment file: settings, data, training, evaluation, report."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from data2vec.core.data.dataset import EvaluationData, TrainData
from data2vec.core.distributed.launchers import Place, place
from data2vec.core.distributed.ranks import Ranks, first_to_tell, join, leave, peers_alive
from data2vec.core.engines.engine import Engine, choose_device
from data2vec.core.errors import ConfigError, Data2VecError, PeerError, RankLostError
from data2vec.core.evaluation.evaluate import evaluate_model, quick_evaluation
from data2vec.core.lock import only_writer
from data2vec.core.pretraining.data2vec import Data2Vec
from data2vec.core.run.build import build_engine, build_model, measure
from data2vec.core.run.load import CONFIGURATION, load_run
from data2vec.core.run.prepare import open_data, warn_of_small_cache, with_assets, with_sample_data, write_sample_data
from data2vec.core.run.resume import find_checkpoint
from data2vec.core.settings.fields import Experiment
from data2vec.core.settings.overrides import apply_overrides, to_yaml, validate
from data2vec.core.training.display import ConsoleDisplay
from data2vec.core.training.interruption import EXIT_INTERRUPTED, Interruption
from data2vec.core.training.trainer import Ending, Trainer

_LAST_WORDS = 2.0  # s that rank 0, which has the ranks' store, leaves the others to find that it has told all


def main(
    experiment: Experiment,
    sample: Experiment | None = None,
    argv: Sequence[str] | None = None,
    *,
    command: str | None = None,
    document: str | None = None,
) -> None:
    """Run an experiment from the command line; exits with 0, 2 (a user's error) or 130 (interrupted).

    Args:
        experiment: the published recipe, for ``data.train=...``.
        sample: what runs when no data is given: the same code, a small model and the sample data.
        argv: the arguments; None for the command line's.
        command: what the user runs, without settings; None for the script's own.
        document: what ``--help`` explains; None for the script's docstring.
    """
    console = Console(highlight=False)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("data2vec").setLevel(logging.INFO)
    document = document or getattr(sys.modules.get("__main__"), "__doc__", None) or f"Pretrain {experiment.name}."
    arguments = _parser(document, sample).parse_intermixed_args(argv)
    here = Place()
    try:
        here = place()
        console.quiet = here.rank > 0
        with Ranks(here.rank, here.world).alike():  # before they have met: all see the same settings
            chosen, is_sample = _choose(experiment, sample, arguments)
            if arguments.print_config:
                if not console.quiet:
                    print(to_yaml(chosen), end="")
                return
        code = _run(chosen, is_sample, command or f"experiments/{Path(sys.argv[0]).name}", console)
    except PeerError:
        code = 2
    except RankLostError as error:
        if first_to_tell():
            _tell(error, here, console)
        if here.rank == 0:
            time.sleep(_LAST_WORDS)
        code = 2
    except Data2VecError as error:
        _tell(error, here, console)
        code = 2
    except KeyboardInterrupt:
        console.print("\ninterrupted before training began; the same command starts again")
        code = EXIT_INTERRUPTED
    finally:
        leave()
    sys.exit(code)


def _tell(error: Data2VecError, here: Place, console: Console) -> None:
    console.print()
    Console(stderr=True, highlight=False).print("[bold red]error:[/] ", end="")
    print(f"rank {here.rank}: {error}" if here.rank else error, file=sys.stderr)


def _parser(document: str, sample: Experiment | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=document,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="common settings:\n"
        "  data.train='shards/train-{0000..0999}.tar'   shards to train on; without it the sample variant runs\n"
        "  data.validation=...      labelled shards for the probes (default: a tenth of the training data)\n"
        "  train.updates=N  train.batch=N  train.micro_batch=N  train.folder=FOLDER  train.max_minutes=M\n"
        "  optim.lr=R  train.seed=S  train.device=cpu|cuda  train.resume=auto|never|CHECKPOINT\n"
        "--print-config lists every setting with its value. The same command continues an interrupted run.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--print-config", action="store_true", help="print every setting as YAML and exit")
    if sample is not None:
        parser.add_argument(
            "--sample",
            action="store_true",
            help="the sample variant (default when no data.train is given; use it with --print-config)",
        )
    return parser


def _choose(
    experiment: Experiment, sample: Experiment | None, arguments: argparse.Namespace
) -> tuple[Experiment, bool]:
    """The validated experiment that the arguments ask for, and whether it is the sample variant."""
    published = None
    wants_sample = getattr(arguments, "sample", False)
    if not wants_sample:
        published = apply_overrides(experiment, arguments.overrides)
        if published.data.train is not None or arguments.print_config or sample is None:
            if published.data.train is None and not arguments.print_config:
                raise ConfigError(["data.train: not set; name the shards to train on"])
            validate(published)
            return published, False
    assert sample is not None
    chosen = apply_overrides(sample, arguments.overrides)
    validate(chosen)
    return chosen, True


def run_folder(experiment: Experiment) -> Path:
    """``train.folder``, or ``runs/NAME``."""
    return Path(experiment.train.folder or Path("runs") / experiment.name)


def _run(experiment: Experiment, is_sample: bool, command: str, console: Console) -> int:
    if is_sample:
        recipe = "uv run deepspeed" if command.startswith("tools/") else "uv run"
        console.print(
            f"[bold]This is the sample variant of {escape(Path(command).name)}[/] (a small model on sample data). "
            f"The published recipe: {recipe} {escape(command)} data.train='SHARDS/train-{{0000..0999}}.tar'",
            soft_wrap=True,
        )
    with Interruption(launched=place().launched) as interruption:
        ranks = join(experiment.train.device, experiment.engine.join_minutes)
        with peers_alive(), contextlib.ExitStack() as held:
            with ranks.together():
                _check_folder(run_folder(experiment))
                if ranks.first:
                    _hold(held, run_folder(experiment))
            return _train_and_evaluate(experiment, is_sample, ranks, interruption, console)


def _train_and_evaluate(
    experiment: Experiment, is_sample: bool, ranks: Ranks, interruption: Interruption, console: Console
) -> int:
    """Everything after the ranks have met; returns the exit code."""
    started = time.monotonic()
    folder = run_folder(experiment)
    with ranks.together():
        choose_device(experiment.train.device)  # before anything is written
        continued = find_checkpoint(experiment, folder)
        if is_sample and experiment.data.train is None:
            if ranks.first:
                write_sample_data(experiment, folder / "data", console)
            experiment = with_sample_data(experiment, folder / "data")
    configuration = to_yaml(experiment)  # with the place of the sample data, without that of files the run keeps
    with ranks.together():
        train, validation = open_data(experiment, folder / "cache")
        if ranks.first:
            warn_of_small_cache(train)
            experiment = with_assets(experiment, train, validation, folder, started=continued is not None)
    if not ranks.first:
        with ranks.together():
            experiment = with_assets(experiment, train, validation, folder, started=True)
    else:
        ranks.agree(None)
    start = None
    if continued is None and experiment.train.init_from is not None:
        with ranks.together():
            start = load_run(experiment.train.init_from, device="cpu").model.own_state()
    with ranks.together():
        model = build_model(experiment, ranks)
        resized = [] if start is None else model.start_from(start)
    parameters = sum(p.numel() for p in model.student.parameters())
    finished = continued is not None and int(continued.saved.state["update"]) >= experiment.train.updates
    measured = measure(experiment, model, train) if ranks.first and not finished else {}
    with ranks.alike():
        engine = build_engine(model, experiment, ranks)
    with ConsoleDisplay(console, done=0) as display:
        with ranks.alike():
            trainer = Trainer(
                experiment,
                engine,
                train,
                folder,
                configuration={"yaml": configuration},
                display=display,
                measured=measured,
                evaluate=_during_training(experiment, model, engine, train, validation),
                stop_requested=lambda: interruption.requested,
            )
        if continued is not None:
            with ranks.together():
                trainer.restore(continued.saved)
            if continued.notice:
                console.print(continued.notice, markup=False, soft_wrap=True)
            summary = f"continuing from update {trainer.progress.update} of {experiment.train.updates} in {folder}"
        else:
            summary = "\n".join([*resized, _summary(experiment, engine, parameters, train, folder)])
        if ranks.world > 1:
            summary += f" ({trainer.share.describe(ranks.world)})"
        console.print(summary, markup=False, soft_wrap=True)
        with ranks.together():
            if ranks.first:
                _write_configuration(folder, configuration)
        with interruption.during_training():
            ending = Ending.FINISHED if finished else trainer.run()
    if interruption.requested or ending is not Ending.FINISHED:
        reason = Ending.INTERRUPTED if interruption.requested else ending
        console.print(_stopped(experiment, reason, trainer, folder), markup=False, soft_wrap=True)
        return EXIT_INTERRUPTED if reason is Ending.INTERRUPTED else 0
    if not ranks.first:
        return 0
    try:
        _evaluate_and_report(experiment, model, engine, train, validation, trainer, folder, console)
    except KeyboardInterrupt:
        console.print(
            f"\ninterrupted; the trained model is saved in {folder}. {_how_to_continue(experiment)}",
            markup=False, soft_wrap=True,
        )  # fmt: skip
        return EXIT_INTERRUPTED
    except OSError as error:
        raise Data2VecError(
            f"{folder}: the report cannot be written ({error}); the trained model is saved. Free space or repair the "
            "disk, then run the same command to evaluate again"
        ) from None
    taken = f"total time {time.monotonic() - started:.0f} s; run folder: {folder}"
    console.print(taken, markup=False, soft_wrap=True)
    return 0


def _check_folder(folder: Path) -> None:
    """Refuse a run's folder that cannot be made or written to, without making it.

    Raises:
        ConfigError: it is below a file, or in a folder without permission.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        reason = "is no folder" if not place.is_dir() else "cannot be written to"
        raise ConfigError([f"train.folder={folder}: {place} {reason}; choose another place for the run"])


def _hold(held: contextlib.ExitStack, folder: Path) -> None:
    try:
        held.enter_context(only_writer(folder))
    except OSError as error:
        raise ConfigError([f"train.folder={folder}: cannot be written to ({error})"]) from None


def _write_configuration(folder: Path, configuration: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIGURATION).write_text(configuration)
    except OSError as error:
        raise ConfigError([f"train.folder={folder}: cannot be written to ({error})"]) from None


def _stopped(experiment: Experiment, ending: Ending, trainer: Trainer, folder: Path) -> str:
    reached = f"stopped ({ending}) at update {trainer.progress.update} of {experiment.train.updates}"
    return f"{reached}; saved in {folder}. {_how_to_continue(experiment)}"


def _how_to_continue(experiment: Experiment) -> str:
    if experiment.train.resume == "auto":
        return "The same command continues."
    return "The same command with train.resume=auto continues."


def _during_training(
    experiment: Experiment,
    model: Data2Vec,
    engine: Engine,
    train: Mapping[str, TrainData],
    validation: Mapping[str, EvaluationData],
) -> Callable[[], dict[str, float]] | None:
    if experiment.evaluation.every is None:
        return None
    compared = model.compared(experiment, engine.device)
    return lambda: quick_evaluation(experiment, compared, engine.device, train, validation)


def _summary(
    experiment: Experiment, engine: Engine, parameters: float, train: Mapping[str, TrainData], folder: Path
) -> str:
    samples = ", ".join(f"{data.total:,} {name} samples" for name, data in train.items())
    precision = "bf16" if engine.bf16 else "fp32"
    return (
        f"{experiment.name}: {parameters / 1e6:.1f} M parameters, {samples}, {experiment.train.updates} updates of "
        f"{experiment.train.described_batch} "
        f"on {engine.device} ({precision}{', compiled' if engine.compiled else ''}) in {folder}"
    )


def _evaluate_and_report(
    experiment: Experiment,
    model: Data2Vec,
    engine: Engine,
    train: Mapping[str, TrainData],
    validation: Mapping[str, EvaluationData],
    trainer: Trainer,
    folder: Path,
    console: Console,
) -> None:
    from data2vec.core.report.gather import write_run_report  # drawing is slow to import

    if engine.sharded:
        model = load_run(folder, device=str(engine.device)).model
    compared = model.compared(experiment, engine.device)
    for name in experiment.modalities:
        console.print(f"evaluating {name} on frozen features")
        result = evaluate_model(experiment, compared, engine.device, name, train[name], validation[name])
        console.print(result.table.to_rich())
        report = folder / ("report.html" if len(experiment.modalities) == 1 else f"report-{name}.html")
        write_run_report(
            report, experiment, model, engine.device, name, validation[name], result,
            update=trainer.progress.update, seconds=trainer.progress.seconds, folder=folder,
        )  # fmt: skip
        console.print(f"[bold]report: {escape(str(report))}[/] (open it in a browser)", soft_wrap=True)
