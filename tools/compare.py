"""Compare a fine-tuned run with what the same labels give otherwise, over several seeds.

    tools/compare.py experiments/vision_finetune.py --labels 200,all
    tools/compare.py experiments/speech_ctc.py --seeds 3 -- start=runs/mine data.train=... data.validation=...
    tools/compare.py experiments/small/images_32_finetune.py --labels 1000 --rows student,scratch -- start=...

Each row is trained on the same labels: the pretrained student and the teacher; the same network from scratch, as long
and three times as long; the plainest representation of the input under a linear classifier; and a small network made
for the task (baselines.py; not for numbers, nor for several labels a sample). A finished part is not repeated when
the command is given again.
The table goes to OUT/comparison.json and into the folder of the run, whose report then shows it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data2vec.core.errors import ConfigError, Data2VecError
from data2vec.core.files import write_atomically
from data2vec.core.report.comparison import FILE_NAME, mean_and_deviation
from data2vec.core.run.load import configuration_of
from data2vec.core.settings.finetuning import LOWER_IS_BETTER, FineTuning

sys.path.insert(0, str(Path(__file__).parent))  # for a caller that loads this file by its path
from baselines import baseline_scores

_LONGER = 3  # times as many updates from scratch
_BASELINES = "baselines"  # what the command line calls what needs no encoder


@dataclass(frozen=True)
class LabelUse:
    """One way to use the labels: settings of the experiment. ``word``: what the command line calls it."""

    word: str
    name: str
    settings: tuple[str, ...] = ()
    longer: int = 1


LABEL_USES = (
    LabelUse("student", "fine-tuned, student", ("weights=student",)),
    LabelUse("teacher", "fine-tuned, teacher", ("weights=teacher",)),
    LabelUse("scratch", "from scratch", ("weights=none",)),
    LabelUse("longer", f"from scratch, {_LONGER} times as long", ("weights=none",), _LONGER),
)


@dataclass
class Comparison:
    """The scores of each row by column, in the order of the seeds."""

    metric: str
    columns: list[str]
    command: str
    rows: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, row: str, column: str, value: float) -> None:
        """Note the score of one seed."""
        self.rows.setdefault(row, {}).setdefault(column, []).append(value)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as :mod:`data2vec.core.report.comparison` reads them."""
        rows = [{"name": name, "values": values} for name, values in self.rows.items()]
        return {"metric": self.metric, "columns": self.columns, "command": self.command, "rows": rows}


def compare(arguments: argparse.Namespace, console: Console) -> Comparison:
    """Train and score every row.

    Raises:
        ConfigError: a run failed.
    """
    unit = arguments.key.rpartition(".")[2].replace("count", "labels")
    named = {"all": "all labels", "keep": "labels of the recipe"}
    columns = [named.get(label, f"{label} {unit}") for label in arguments.labels]
    command = f"uv run tools/compare.py {shlex.join(arguments.words)}"
    found = Comparison("", columns, command)
    for label, column in zip(arguments.labels, columns, strict=True):
        for seed in range(arguments.seeds):
            folder = None
            for row in (use for use in LABEL_USES if use.word in arguments.rows):
                folder = arguments.out / f"{label}-{seed}-{row.name.replace(' ', '-').replace(',', '')}"
                metric, value = _trained(arguments, row, label, seed, folder)
                found.metric = metric
                found.add(row.name, column, value)
                console.print(f"{column}, seed {seed}: {row.name} {metric} {value:.4f}", markup=False)
            assert folder is not None
            for name, value in _baselines(folder, found.metric) if _BASELINES in arguments.rows else ():
                found.add(name, column, value)
                console.print(f"{column}, seed {seed}: {name} {found.metric} {value:.4f}", markup=False)
            content = (json.dumps(found.to_json(), indent=1) + "\n").encode()
            write_atomically(arguments.out / FILE_NAME, content)
    return found


def _trained(arguments: argparse.Namespace, row: LabelUse, label: str, seed: int, folder: Path) -> tuple[str, float]:
    """The main score of a run, and its value; a run that is finished is read."""
    report = folder / "report.json"
    if not report.is_file():
        given = {word.partition("=")[0]: word.partition("=")[2] for word in arguments.settings}
        words = [*arguments.settings, *row.settings, f"train.seed={seed}", f"train.folder={folder}"]
        if label != "keep":
            words.append(f"{arguments.key}={'null' if label == 'all' else label}")
        if row.longer > 1:
            updates = int(given.get("train.updates", 0)) or _updates(arguments, words)
            words = [word for word in words if not word.startswith("train.updates=")]
            words.append(f"train.updates={updates * row.longer}")
        done = subprocess.run(
            [sys.executable, arguments.experiment, *words], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ConfigError([f"{shlex.join([arguments.experiment, *words])}: {done.stderr.strip()[-600:]}"])
    recipe = configuration_of(folder)
    assert isinstance(recipe, FineTuning)
    key = arguments.metric or recipe.scores[0]
    return key, float(json.loads(report.read_text())["scores"][key])


def _updates(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """The updates of the experiment where nothing else is said."""
    sample = [] if any(word.startswith("data.train=") for word in words) else ["--sample"]
    printed = subprocess.run(
        [sys.executable, arguments.experiment, *words, "--print-config", *sample],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [line.split(":")[1] for line in printed.stdout.splitlines() if line.startswith("  updates:")]
    if printed.returncode or not lines:
        raise ConfigError([f"{arguments.experiment}: {printed.stderr.strip()[-600:]}"])
    return int(lines[0])


def _baselines(folder: Path, metric: str) -> Iterator[tuple[str, float]]:
    """The scores of what was made for the labels of a run alone."""
    recipe = configuration_of(folder)
    assert isinstance(recipe, FineTuning)
    kept = folder / "baselines.json"
    if not kept.is_file():
        write_atomically(kept, json.dumps(baseline_scores(recipe, folder)).encode())
    for name, scores in json.loads(kept.read_text()).items():
        if metric in scores:
            yield name, scores[metric]


def _table(found: Comparison) -> Table:
    better = "lower is better" if found.metric in LOWER_IS_BETTER else "higher is better"
    table = Table(caption=f"{found.metric}, {better}; mean and standard deviation over seeds", caption_justify="left")
    for heading in ("", *found.columns):
        table.add_column(heading)
    for name, values in found.rows.items():
        table.add_row(name, *(mean_and_deviation(values.get(column, ())) for column in found.columns))
    return table


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__, formatter_class=raw)
    parser.add_argument("experiment", help="the file of a fine-tuning experiment")
    parser.add_argument(
        "--labels", default="200,all", help="budgets, apart by commas; `keep`: as the recipe has it; default 200,all"
    )
    parser.add_argument("--key", default="labels.count", help="the setting of the budget; default labels.count")
    words_of_rows = [*(use.word for use in LABEL_USES), _BASELINES]
    parser.add_argument(
        "--rows", default=",".join(words_of_rows), help="of %(default)s; at least one that is no baseline"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="0 to N - 1; default 3")
    parser.add_argument("--metric", help="a score of report.json; default the main one")
    parser.add_argument("--out", type=Path, help="folder of all runs; default runs/compare_EXPERIMENT")
    parser.add_argument("--run", type=Path, help="the run whose report is to show the table")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of every run")
    parsed = parser.parse_intermixed_args(words)
    parsed.words = list(words)
    parsed.labels, parsed.rows = parsed.labels.split(","), parsed.rows.split(",")
    if unknown := sorted(set(parsed.rows) - set(words_of_rows)):
        parser.error(f"--rows: no {unknown[0]!r}; choose of {', '.join(words_of_rows)}")
    if not set(parsed.rows) - {_BASELINES}:
        parser.error("--rows: baselines read the labels of a run; name one of the others too")
    parsed.out = parsed.out or Path("runs") / f"compare_{Path(parsed.experiment).stem}"
    return parsed


def main(words: Sequence[str] | None = None) -> int:
    """Compare; returns the exit status: 0 done, 2 an error, 130 interrupted."""
    arguments = _parsed(sys.argv[1:] if words is None else words)
    console = Console(highlight=False, soft_wrap=True)
    try:
        found = compare(arguments, console)
        if arguments.run is not None:
            write_atomically(arguments.run / FILE_NAME, (json.dumps(found.to_json(), indent=1) + "\n").encode())
    except Data2VecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    console.print(_table(found))
    console.print(f"{arguments.out / FILE_NAME}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
