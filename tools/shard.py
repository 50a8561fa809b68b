"""Turn files into shards, and check shards.

    tools/shard.py vision IMAGES_FOLDER SHARDS_FOLDER --validation 0.1
    tools/shard.py speech LibriSpeech/train-clean-100 SHARDS_FOLDER
    tools/shard.py text CORPUS SHARDS_FOLDER --train-tokenizer 50000
    tools/shard.py text-labelled TABLE.tsv SHARDS_FOLDER --text sentence --label label
    tools/shard.py verify SHARDS_FOLDER
    tools/shard.py index SHARDS_FOLDER --modality vision

An interrupted command continues where it stopped when it is given again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data2vec.core.data.folder import count_left_out
from data2vec.core.data.shards.checking import describe, index_folder, verify
from data2vec.core.data.shards.index import INDEX_NAME, ForeignIndexError, ShardIndex, ShardInfo, prefixed
from data2vec.core.data.shards.source import Source, positive
from data2vec.core.data.shards.writer import measure_of
from data2vec.core.data.stream.order import permutation
from data2vec.core.errors import Data2VecError, DataError
from data2vec.core.files import write_atomically
from data2vec.core.lock import only_writer
from data2vec.core.modality import Modality

sys.path.insert(0, str(Path(__file__).parent))  # for a caller that loads this file by its path
from shard_workers import ShardTask, Written, write_all

STATE_NAME = ".shard-state.json"
PREFIXES = ("train", "validation")
_SHOWN = 10  # unusable files and problems that are named
_interrupted = threading.Event()


def write(arguments: argparse.Namespace) -> int:
    """Write the shards of a modality's folder; a second command for the same OUT is refused."""
    with ExitStack() as stack:
        try:
            stack.enter_context(only_writer(arguments.out))
        except OSError as error:
            raise DataError(
                f"{arguments.out}: cannot be used as a folder of shards ({error.strerror or error})"
            ) from None
        return _write(arguments)


def _write(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    source: Source = arguments.source(arguments)
    job = _job(source, arguments)
    done = _prepare(out, job, arguments.force)
    _leave(out, source.beside, arguments.force)
    tasks = _plan(source, arguments)
    results = {name: written for name, written in done.items() if name in {task.path.name for task in tasks}}
    if results:
        print(f"{len(results)} of {len(tasks)} shards are finished already")
    with _progress("shards") as advance:
        left = [task for task in tasks if task.path.name not in results]
        with closing(write_all(left, arguments.workers)) as finished:
            for name, result in finished:
                results[name] = result
                _save_state(out, job, results)
                advance(len(results), len(tasks))
                if _interrupted.is_set():  # the exception is lost where a finaliser or a callback runs
                    raise KeyboardInterrupt
    shards = tuple(results[name].shard for name in sorted(results))
    skipped = [line for name in sorted(results) for line in results[name].skipped]
    written = tuple(shard for shard in shards if shard is not None)
    index = ShardIndex(source.modality, written, source.class_names, measure_of(source.modality)[1])
    _tell(skipped, "skipped", sys.stderr)
    print(account(source, sum(result.written for result in results.values()), len(skipped)))
    if not index.shards:
        raise DataError(f"{arguments.folder}: none of its {len(skipped)} {source.unit} could be used")
    index.save(out)
    (out / STATE_NAME).unlink(missing_ok=True)
    if source.scratch is not None:
        shutil.rmtree(source.scratch, ignore_errors=True)
    print(
        f"{index.samples} samples in {len(index.shards)} shards, {index.size / 1e6:.1f} MB, "
        + (f"{index.length:,} {index.length_unit}, " if index.length_unit else "")
        + f"{len(index.class_names)} classes, {len(skipped)} {source.unit} skipped"
    )
    for prefix in PREFIXES:
        if any(prefixed(shard.name, prefix) for shard in index.shards):
            print(f"  data.{prefix}='{out}/{prefix}-*.tar'")
    return 0


def account(source: Source, written: int, skipped: int) -> str:
    """Say what became of every file that was found: nothing is missing from the sum."""
    left = sum(source.left_out.values())
    without = f", {left:,} left out ({count_left_out(source.left_out)})" if left else ""
    fate = f"{written:,} written, {skipped:,} skipped"
    if source.unit == "files":
        assert written + skipped == len(source.items), f"{written} + {skipped} of {len(source.items)} files"
        return f"{written + skipped + left:,} files found: {fate}{without}"
    read = source.files or 0
    return f"{read + left:,} files found: {read:,} read{without}\n{written + skipped:,} {source.unit} found: {fate}"


def check(arguments: argparse.Namespace) -> int:
    """Compare a set with its index."""
    with _progress("shards verified") as advance:
        problems = verify(arguments.out, advance, member=arguments.member, warn=_warn)
    _tell(problems, "problems", sys.stderr)
    if problems:
        return 2
    index = ShardIndex.load(arguments.out)
    print(f"{arguments.out}: {len(index.shards)} shards with {index.samples} samples are as the index says")
    return 0


def index(arguments: argparse.Namespace) -> int:
    """Write the index of shards that lie in a folder."""
    path = arguments.out / INDEX_NAME
    Modality.by_name(arguments.modality)  # else nobody could say which members hold the input
    if path.exists() and not arguments.force:
        raise DataError(f"{path}: {_owner(path)}; --force replaces it")
    with _progress("shards indexed") as advance:
        written = index_folder(
            arguments.out, arguments.modality, arguments.classes or (), advance, member=arguments.member, warn=_warn
        )
    print(f"{path}: {len(written.shards)} shards, {written.samples} samples")
    return 0


def _owner(path: Path) -> str:
    try:
        ShardIndex.load(path.parent)
    except ForeignIndexError:
        return "is the index of another program"
    except DataError:
        return "exists already, and is no index that could be used"
    return "exists already"


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def _job(source: Source, arguments: argparse.Namespace) -> str:
    """Changes with anything that decides what the shards hold."""
    digest = hashlib.sha256(f"{source.modality} {source.settings} {source.class_names}".encode())
    digest.update(f"{arguments.samples_per_shard} {arguments.validation} {arguments.seed}".encode())
    for item in source.items:
        try:
            described = item.describe()
        except OSError as error:  # a link to nothing, or a file that is gone: whoever reads it says so
            described = f"{item.key} {error.strerror}"
        digest.update(described.encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _prepare(out: Path, job: str, force: bool) -> dict[str, Written]:
    """Make the folder ready; returns the shards that an interrupted run of the same job finished."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        present = [path for path in out.iterdir() if any(prefixed(path.name, prefix) for prefix in PREFIXES)]
    except OSError as error:
        raise DataError(f"{out}: cannot be used as a folder of shards ({error.strerror})") from None
    old_job, done = _load_state(out)
    if old_job == job and not (out / INDEX_NAME).exists():
        return {
            name: written
            for name, written in done.items()
            if written.shard is None or _intact(out / name, written.shard)
        }
    if (present or old_job or (out / INDEX_NAME).exists()) and not force:
        unfinished = "unfinished shards of another command" if old_job else "shards"
        raise DataError(f"{out}: holds {unfinished} already; name another folder, or --force replaces them")
    for path in (out / INDEX_NAME, out / STATE_NAME, *present):
        path.unlink(missing_ok=True)
    return {}


def _leave(out: Path, beside: Mapping[str, bytes], force: bool) -> None:
    """Write the files that belong beside the shards."""
    for name, content in beside.items():
        path = out / name
        try:
            if path.exists() and path.read_bytes() != content and not force:
                raise DataError(f"{path}: exists already and is another one; name another folder, or --force")
            write_atomically(path, content)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror})") from None


def _intact(path: Path, info: ShardInfo) -> bool:
    try:
        return replace(describe(path), lengths=info.lengths) == info
    except DataError:
        return False


def _plan(source: Source, arguments: argparse.Namespace) -> list[ShardTask]:
    """Shuffle the items, so that classes mix, and cut them into shards of about the same size."""
    order = permutation(len(source.items), arguments.seed).tolist()
    held_out = round(arguments.validation * len(order))
    tasks = []
    for prefix, numbers in zip(PREFIXES, (order[held_out:], order[:held_out]), strict=True):
        samples = len(numbers) * (source.samples or len(source.items))
        count = min(len(numbers), -(-samples // (arguments.samples_per_shard * len(source.items))))
        for shard in range(count):
            part = numbers[shard * len(numbers) // count : (shard + 1) * len(numbers) // count]
            path = arguments.out / f"{prefix}-{shard:06d}.tar"
            tasks.append(ShardTask(path, source.modality, [source.items[number] for number in part], source.encode))
    return tasks


def _load_state(out: Path) -> tuple[str, dict[str, Written]]:
    """The job and the finished shards of an interrupted run; empty where there is none that can be read."""
    try:
        state = json.loads((out / STATE_NAME).read_bytes())
        done = {
            str(name): Written(_restored(entry["shard"]), tuple(entry["skipped"]), int(entry["written"]))
            for name, entry in state["shards"].items()
        }
        return str(state["job"]), done
    except FileNotFoundError:
        return "", {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "unknown", {}


def _restored(entry: dict[str, Any] | None) -> ShardInfo | None:
    return None if entry is None else ShardInfo(**{**entry, "lengths": tuple(entry["lengths"])})


def _save_state(out: Path, job: str, results: dict[str, Written]) -> None:
    content = json.dumps({"job": job, "shards": {name: asdict(written) for name, written in results.items()}})
    try:
        write_atomically(out / STATE_NAME, content.encode())
    except OSError as error:
        raise DataError(f"{out / STATE_NAME}: cannot be written ({error.strerror})") from None


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on the error stream."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance


def _tell(lines: Sequence[str], what: str, stream: Any) -> None:
    for line in lines[:_SHOWN]:
        print(line, file=stream)
    if len(lines) > _SHOWN:
        print(f"... and {len(lines) - _SHOWN} more {what}", file=stream)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 to below 1, such as 0.1")
    return share


def _commands_of(
    modality: str,
) -> dict[str, Callable[[argparse.ArgumentParser], Callable[[argparse.Namespace], Source]]]:
    """Find the functions that declare the arguments of a modality's commands."""
    module = importlib.import_module(f"data2vec.{modality}.sharding")
    return {modality: module.add_arguments, **getattr(module, "COMMANDS", {})}


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The commands; of the modalities' only the one that is asked for, whose package alone is imported then."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="shard.py", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    installed = Modality.installed()
    word = words[0] if words else ""
    asked = (
        word if word in ("verify", "index") else word.partition("-")[0] if word.partition("-")[0] in installed else None
    )
    owners = installed if asked is None else [name for name in installed if name == asked]
    for name, add in (pair for owner in owners for pair in _commands_of(owner).items()):
        command = commands.add_parser(name, help=add.__doc__, description=f"Write shards: {add.__doc__}")
        command.add_argument("folder", type=Path, metavar="FOLDER", help="what is sharded; it is only read")
        command.add_argument("out", type=Path, metavar="OUT", help="folder of the shards and their index.json")
        command.add_argument("--samples-per-shard", type=positive, default=2_000, metavar="N", help="default 2000")
        command.add_argument(
            "--validation", type=_share, default=0.0, metavar="SHARE", help="put into validation-*.tar"
        )
        command.add_argument("--workers", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes")
        command.add_argument("--seed", type=int, default=0, help="of the order of the samples")
        command.add_argument("--force", action="store_true", help="replace the shards that OUT holds")
        command.set_defaults(run=write, source=add(command))
    command = commands.add_parser("verify", help=check.__doc__, description=check.__doc__)
    command.add_argument("out", type=Path, metavar="OUT", help="folder of the shards and their index.json")
    command.add_argument("--member", metavar="NAME", help="the input, of samples with several (input.jpg): data.member")
    command.set_defaults(run=check)
    command = commands.add_parser("index", help=index.__doc__, description=index.__doc__)
    command.add_argument("out", type=Path, metavar="OUT", help="folder of the shards")
    command.add_argument("--modality", required=True, choices=installed, help="what they hold")
    command.add_argument("--classes", nargs="+", metavar="NAME", help="names of the class numbers")
    command.add_argument("--member", metavar="NAME", help="the input, of samples with several (input.jpg): data.member")
    command.add_argument("--force", action="store_true", help="replace the index there is")
    command.set_defaults(run=index)
    return parser


def _interrupt(number: int, frame: object) -> NoReturn:
    _interrupted.set()
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 2 an error or a set with problems, 130 interrupted."""
    words = sys.argv[1:] if arguments is None else arguments
    parsed = _parser(words).parse_args(words)
    _interrupted.clear()
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status: int = parsed.run(parsed)
        return status
    except Data2VecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
