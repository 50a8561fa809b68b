"""The main function of an experiment file: settings, data, training, evaluation, report."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from data2vec.core.checkpoints import checkpoint
from data2vec.core.distributed.launchers import Place, place
from data2vec.core.distributed.ranks import Ranks, first_to_tell, join, leave, peers_alive
from data2vec.core.errors import ConfigError, Data2VecError, PeerError, RankLostError
from data2vec.core.run.choices import Choices
from data2vec.core.run.folder import run_folder
from data2vec.core.run.session import Session
from data2vec.core.run.starting import with_network_of_start
from data2vec.core.settings.fields import Recipe
from data2vec.core.settings.finetuning import FineTuning
from data2vec.core.settings.overrides import apply_overrides, to_yaml, validate
from data2vec.core.training.interruption import EXIT_INTERRUPTED, Interruption

_LAST_WORDS = 2.0  # s that rank 0, which has the ranks' store, leaves the others to find that it has told all


def main(
    experiment: Recipe | Choices[Any],
    sample: Recipe | Choices[Any] | None = None,
    argv: Sequence[str] | None = None,
    *,
    before: Recipe | None = None,
    command: str | None = None,
    document: str | None = None,
) -> None:
    """Run an experiment from the command line; exits with 0, 2 (a user's error) or 130 (interrupted).

    Args:
        experiment: the published recipe, for ``data.train=...``, or several that words of the command choose between.
        sample: what runs when no data is given: the same code, a small model and the sample data.
        argv: the arguments; None for the command line's.
        before: what is run first where the sample variant is to start from it and it is not there yet.
        command: what the user runs, without settings; None for the script's own.
        document: what ``--help`` explains; None for the script's docstring.
    """
    console = Console(highlight=False)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("data2vec").setLevel(logging.INFO)
    document = document or getattr(sys.modules.get("__main__"), "__doc__", None) or "Train a model."
    arguments = _parser(document, experiment, sample).parse_intermixed_args(argv)
    here = Place()
    try:
        here = place()
        console.quiet = here.rank > 0
        with Ranks(here.rank, here.world).alike():  # before they have met: all see the same settings
            chosen, is_sample = _choose(experiment, sample, arguments, before)
            if arguments.print_config:
                if not console.quiet:
                    print(to_yaml(chosen), end="")
                return
        first = before if is_sample and _is_missing(before, chosen) else None
        code = _run(chosen, is_sample, command or f"experiments/{Path(sys.argv[0]).name}", console, first)
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


def _parser(
    document: str, experiment: Recipe | Choices[Any], sample: Recipe | Choices[Any] | None
) -> argparse.ArgumentParser:
    options = experiment.options if isinstance(experiment, Choices) else {}
    choices = "".join(f"  {key}={'|'.join(values)}\n" for key, values in options.items())
    parser = argparse.ArgumentParser(
        description=document,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(f"choices of a recipe:\n{choices}" if choices else "") + "common settings:\n"
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
    experiment: Recipe | Choices[Any],
    sample: Recipe | Choices[Any] | None,
    arguments: argparse.Namespace,
    before: Recipe | None,
) -> tuple[Recipe, bool]:
    """The validated recipe that the arguments ask for, and whether it is the sample variant."""
    wants_sample = getattr(arguments, "sample", False)
    names_data = any(word.partition("=")[0].strip() == "data.train" for word in arguments.overrides)
    if not wants_sample and (names_data or arguments.print_config or not isinstance(sample, Choices)):
        recipe, words = _variant(experiment, arguments.overrides)
        published = apply_overrides(recipe, words)
        if published.data.train is not None or arguments.print_config or sample is None:
            if published.data.train is None and not arguments.print_config:
                raise ConfigError(["data.train: not set; name the shards to train on"])
            published = with_network_of_start(published, words)
            validate(published)
            return published, False
    assert sample is not None
    recipe, words = _variant(sample, arguments.overrides, experiment)
    chosen = with_network_of_start(apply_overrides(recipe, words), words, before)
    validate(chosen)
    return chosen, True


def _variant(
    recipe: Recipe | Choices[Any], words: Sequence[str], published: Recipe | Choices[Any] | None = None
) -> tuple[Recipe, list[str]]:
    """The recipe that the words of a command choose, and the words that choose nothing.

    Raises:
        ConfigError: there is no such choice; or, for the sample variant of a published recipe, only that has it.
    """
    try:
        return recipe.chosen(words) if isinstance(recipe, Choices) else (recipe, list(words))
    except ConfigError:
        if isinstance(published, Choices):
            published.chosen(words)  # raises where it does not have it either
            raise ConfigError(["data.train: not set; name the shards to train on"]) from None
        raise


def _is_missing(before: Recipe | None, chosen: Recipe) -> bool:
    """Tell whether the run that the chosen one starts from is the one to be made first, and not finished."""
    source = chosen.start if isinstance(chosen, FineTuning) else None
    if before is None or source is None or Path(source) != run_folder(before):
        return False
    newest = checkpoint.latest(Path(source) / "checkpoints")
    return newest is None or int(checkpoint.load(newest).state["update"]) < before.train.updates


def _run(experiment: Recipe, is_sample: bool, command: str, console: Console, first: Recipe | None) -> int:
    if is_sample:
        recipe = "uv run deepspeed" if command.startswith("tools/") else "uv run"
        console.print(
            f"[bold]This is the sample variant of {escape(Path(command).name)}[/] (a small model on sample data). "
            f"The published recipe: {recipe} {escape(command)} data.train='SHARDS/train-{{0000..0999}}.tar'",
            soft_wrap=True,
        )
    with Interruption(launched=place().launched) as interruption:
        ranks = join(experiment.train.device, experiment.engine.join_minutes)
        with peers_alive():
            if first is not None:
                console.print(f"{experiment.name} starts from {first.name}, which is trained first", markup=False)
                code = Session(first, ranks, interruption, console, is_sample=True).run()
                if code or interruption.requested:
                    return code
            return Session(experiment, ranks, interruption, console, is_sample=is_sample).run()
