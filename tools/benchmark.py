"""Measure training steps, maskers and the loader on this machine.

    tools/benchmark.py step vision_base --batch 4
    tools/benchmark.py engine vision_base --sample --ranks 2
    tools/benchmark.py masks
    tools/benchmark.py loader 'shards/train-*.tar' --workers 0 2 4

Each command prints a table. What it compares is measured in turns in one process, so that other work on the machine
slows both sides alike; times are medians. --json FILE also writes the table and the settings to a file.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.engines import ENGINES, engine
from benchmarks.loader import loader
from benchmarks.masks import masks
from benchmarks.result import Result, machine
from benchmarks.step import step
from rich.console import Console

from data2vec.core.errors import Data2VecError
from data2vec.core.settings.fields import Precision, Switch


def _add_experiment(command: argparse.ArgumentParser, *, option: bool) -> None:
    text = "a name in experiments/, or the path of a file (default vision_base); the file is run"
    if option:
        command.add_argument("--experiment", default="vision_base", metavar="NAME", help=text)
    else:
        command.add_argument(
            "words", nargs="*", metavar="EXPERIMENT KEY=VALUE", help=f"{text}; then settings to change"
        )
    command.add_argument("--sample", action="store_true", help="its sample variant")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _add_step(command: argparse.ArgumentParser) -> None:
    _add_experiment(command, option=False)
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda ...")
    command.add_argument(
        "--precision", choices=[p.value for p in Precision], default="auto", help="auto: bf16 on a GPU"
    )
    switch = "on: eager and compiled side by side; off: eager alone; auto: on on a GPU, off elsewhere"
    command.add_argument("--compile", choices=[s.value for s in Switch], default="auto", help=switch)
    batch = "samples of a step (default: the recipe's micro_batch; on a CPU fewer)"
    command.add_argument("--batch", type=_positive, metavar="N", help=batch)
    command.add_argument("--steps", type=_positive, default=12, metavar="N", help="measured steps (default 12)")


def _add_engine(command: argparse.ArgumentParser) -> None:
    _add_step(command)
    command.set_defaults(steps=8)
    command.add_argument("--ranks", type=_positive, default=1, metavar="N", help="processes (default 1)")
    command.add_argument("--rounds", type=_positive, default=3, metavar="N", help="repetitions (default 3)")
    command.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=[e for e in ENGINES if "offload" not in e], metavar="ENGINE",
        help=f"of {', '.join(ENGINES)} (default: all without offload)",
    )  # fmt: skip


def _add_masks(command: argparse.ArgumentParser) -> None:
    command.add_argument("--batch", type=_positive, default=128, metavar="N", help="samples (default 128)")
    command.add_argument("--grid", type=_positive, default=14, metavar="N", help="patches along a side (default 14)")
    masks = "masks of each sample (default 1 16)"
    command.add_argument("--masks", type=_positive, nargs="+", default=[1, 16], metavar="M", help=masks)
    command.add_argument("--rounds", type=_positive, default=10, metavar="N", help="repetitions (default 10)")


def _add_loader(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "shards", nargs="?", metavar="SHARDS", help="as data.train; default: images made for the purpose"
    )
    _add_experiment(command, option=True)
    command.add_argument("--workers", type=_count, nargs="+", default=[0, 1, 2], metavar="N", help="default 0 1 2")
    command.add_argument("--batch", type=_positive, default=32, metavar="N", help="samples of a batch (default 32)")
    command.add_argument("--samples", type=_positive, default=512, metavar="N", help="timed each time (default 512)")
    command.add_argument(
        "--images", type=_positive, default=256, metavar="N", help="images made or unpacked (default 256)"
    )
    command.add_argument("--rounds", type=_positive, default=3, metavar="N", help="repetitions (default 3)")
    command.set_defaults(words=[])


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], Result], Callable[[argparse.ArgumentParser], None]]] = {
    "step": (step, _add_step),
    "engine": (engine, _add_engine),
    "masks": (masks, _add_masks),
    "loader": (loader, _add_loader),
}


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (run, add) in COMMANDS.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        add(command)
        command.add_argument("--json", type=Path, metavar="FILE", help="also write the table and the settings there")
        command.set_defaults(run=run)
    return parser


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parsed, with settings wherever they stand among the options; the first word is the experiment."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    takes_settings = arguments.run in (step, engine)
    if (not takes_settings and rest) or any(word.startswith("-") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if takes_settings:
        words = [*arguments.words, *rest]
        arguments.experiment = words.pop(0) if words and "=" not in words[0] else "vision_base"
        arguments.overrides = words
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 2 a user's error, 130 interrupted."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    arguments = _arguments(argv)
    console = Console(highlight=False)
    try:
        result: Result = arguments.run(arguments)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    except (Data2VecError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(result.to_rich())
    used = machine()
    gpu = f", {used['gpu']}" if used["gpu"] else ""
    console.print(f"{used['processor']}, {used['cores']} cores{gpu}, torch {used['torch']}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
