"""Plan the training of a recipe on many GPUs, without one.

    tools/plan.py experiments/vision_large.py --gpus 64 --memory 80
    tools/plan.py speech_large --gpus 32 --memory 80 train.activation_checkpointing=true
    tools/plan.py vision_base --gpus 8 --memory 80 --step step.json

Prints parameters, memory of a rank under plain torch and ZeRO stages 0 to 3, what a rank sends in an update, the time
of an update, and which stage to use with which command. A time needs to know how fast one GPU is: --step takes what
`tools/benchmark.py step EXPERIMENT --json step.json` measured there, --step-ms its column ms/step. Without either it is
predicted from the recipe's arithmetic and says so. --json FILE also writes everything to a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planning.choose import MARGIN, Choice, Cluster, PlanRow, Settings, choose, command, plan_settings, rows
from planning.cost import Rate
from planning.memory import TORCH
from planning.rate import from_file, given, predicted
from planning.trace import Trace, trace
from recipes import EXPERIMENTS, chosen_experiment
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from data2vec.core.errors import ConfigError, Data2VecError
from data2vec.core.settings.overrides import validate
from data2vec.core.settings.pretraining import Experiment

_GIB = 2.0**30
_INSIDE, _BETWEEN = 300.0, 50.0  # GB/s of an all-reduce within a host (NVLink) and between hosts (400 Gbit/s a GPU)
_NAMES = {TORCH: "torch", 0: "ZeRO 0", 1: "ZeRO 1", 2: "ZeRO 2", 3: "ZeRO 3"}


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="plan.py", description=__doc__, formatter_class=raw)
    text = "a name in experiments/, or the path of a file, which is run; then settings to change"
    parser.add_argument("words", nargs="*", metavar="EXPERIMENT KEY=VALUE", help=text)
    parser.add_argument("--sample", action="store_true", help="its sample variant")
    parser.add_argument("--gpus", type=_positive, required=True, metavar="N", help="GPUs, a rank each")
    parser.add_argument("--memory", type=_above_zero, required=True, metavar="GIB", help="memory of one, in GiB")
    parser.add_argument("--node", type=_positive, default=8, metavar="N", help="GPUs of a host (default 8)")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--step", type=Path, metavar="FILE", help="what tools/benchmark.py step --json FILE measured")
    text = "measured milliseconds of forward, backward and update of one micro-batch of the recipe on one GPU"
    speed.add_argument("--step-ms", type=_above_zero, metavar="MS", help=text)
    text = "without a measurement: what the GPU's matrix products reach (default 750, bf16 on an H100)"
    parser.add_argument("--tflops", type=_above_zero, default=750.0, metavar="T", help=text)
    text = "without a measurement: the share of it that training reaches (default 0.4; a prototype of ViT-B got 0.39)"
    parser.add_argument("--mfu", type=_above_zero, default=0.4, metavar="SHARE", help=text)
    text = f"bytes that a rank sends in a second, in GB (default {_INSIDE:g} within a host, else {_BETWEEN:g})"
    parser.add_argument("--bandwidth", type=_above_zero, metavar="GB/S", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the plan there")
    return parser


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parsed, with settings wherever they stand among the options; the first word is the experiment."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    words = [*arguments.words, *rest]
    if not words or "=" in words[0]:
        parser.error("name an experiment first")
    arguments.experiment, arguments.overrides = words[0], tuple(words[1:])
    return arguments


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan that is printed."""

    experiment: Experiment
    trace: Trace
    cluster: Cluster
    settings: Settings
    rate: Rate
    rows: list[PlanRow]
    choice: Choice
    command: str | None
    assumed: bool  # the bandwidth


def plan(arguments: argparse.Namespace) -> Plan:
    """Work it out.

    Raises:
        ConfigError: settings that do not exist or do not go together, or a measurement of something else.
    """
    chosen = chosen_experiment(arguments.experiment, sample=arguments.sample, overrides=arguments.overrides)
    validate(chosen)
    gpus, node = arguments.gpus, arguments.node
    if arguments.mfu > 1:
        raise ConfigError([f"--mfu {arguments.mfu:g}: no GPU does more than it can; give a share of 1 at most"])
    if gpus > node and gpus % node:
        raise ConfigError([f"--gpus {gpus}: not whole hosts of {node}; give a multiple of it, or another --node"])
    bandwidth = arguments.bandwidth or (_INSIDE if gpus <= node else _BETWEEN)
    cluster = Cluster(gpus, min(node, gpus), arguments.memory * _GIB, bandwidth * 1e9)
    traced = trace(chosen)
    settings = plan_settings(chosen, traced, gpus)

    def rates(checkpointing: bool) -> Rate:
        if arguments.step is not None:
            return from_file(arguments.step, traced, chosen, checkpointing=checkpointing)
        if arguments.step_ms is not None:
            return given(traced, arguments.step_ms, plan_settings(chosen, traced, 1).samples, chosen, checkpointing)
        return predicted(traced, tflops=arguments.tflops, mfu=arguments.mfu, checkpointing=checkpointing)

    choice = choose(traced, settings, cluster, rates)
    line = None
    if choice.row is not None:
        file = arguments.experiment
        path = file if file.endswith(".py") else f"{EXPERIMENTS.name}/{file}.py"
        line = command(choice, cluster, path, arguments.overrides, sample=arguments.sample)
    shown = choice.settings
    return Plan(
        chosen, traced, cluster, shown, rates(shown.checkpointing), rows(traced, shown, cluster, rates), choice, line,
        assumed=arguments.bandwidth is None,
    )  # fmt: skip


def shown(found: Plan) -> Group:
    """For a terminal."""
    table = Table()
    columns = ("engine", "student", "teacher", "optimiser", "gradients", "buffers", "activations", "peak GiB",
               "sent GB", "update ms", "exchanged ms", "samples/s")  # fmt: skip
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found.rows:
        table.add_row(*_cells(row, found), style="" if row.fits else "dim")
    chosen = found.choice.row
    head = "recommended: nothing" if chosen is None else f"recommended: {_NAMES[chosen.stage]}"
    lines = [f"{head} ({found.choice.reason})"]
    if found.command is not None:
        lines.append(f"  {found.command}")
    return Group(*(Text(line) for line in _opening(found)), table, *(Text(n) for n in _notes(found)),
                 *(Text(line, style="bold") for line in lines))  # fmt: skip


def _opening(found: Plan) -> list[str]:
    traced, cluster = found.trace, found.cluster
    encoder = (traced.trained - traced.predictors) / 1e6
    return [
        f"{found.experiment.name} on {cluster.gpus} GPU{'s' if cluster.gpus > 1 else ''} of "
        f"{cluster.memory / _GIB:g} GiB: student {encoder:.1f} M parameters, predictors and mask tokens "
        f"{traced.predictors / 1e6:.1f} M, teacher {traced.frozen / 1e6:.1f} M of its own",
        f"{found.settings.share.describe(cluster.gpus)}; an update is {found.experiment.train.described_batch}"
        + (f"; {' '.join(found.settings.changes)}" if found.settings.changes else ""),
    ]


def _cells(row: PlanRow, found: Plan) -> list[str]:
    account = row.memory
    parts = (
        account.student, account.teacher, account.optimiser, account.gradients, account.peak - account.activations
        - account.student - account.teacher - account.optimiser - account.gradients, account.activations,
    )  # fmt: skip
    fits = "" if row.fits else " too much"
    total = row.time.total
    rate = found.settings.samples * found.settings.share.passes * found.cluster.gpus / total
    return [
        _NAMES[row.stage], *(f"{max(0, part) / _GIB:.2f}" for part in parts), f"{account.peak / _GIB:.1f}{fits}",
        f"{row.sent.total / 1e9:.2f}", f"{1e3 * total:,.0f}", f"{1e3 * row.time.exchange:,.1f}", f"{rate:,.0f}",
    ]  # fmt: skip


def _notes(found: Plan) -> list[str]:
    cluster, rate, samples = found.cluster, found.rate, found.settings.samples
    notes = [
        f"memory in GiB a rank; a stage fits when its peak leaves {MARGIN:.0%} for CUDA, NCCL and fragmentation",
        rate.source,
    ]
    if rate.samples is not None and samples < 0.5 * rate.samples:
        notes.append(
            f"a rank's pass has {samples:.3g} samples, far fewer than were measured: it will be slower than this"
        )
    if cluster.gpus > 1:
        source = "assumed; --bandwidth" if found.assumed else "--bandwidth"
        notes.append(f"exchanged at {cluster.bandwidth / 1e9:g} GB/s ({source}), nothing of it hidden behind compute")
        notes.append(
            "ZeRO's cost over plain torch is that of ViT-B on one H100: 8-9 % at stages 0 to 2, three times as long at "
            "stage 3, where compiling is refused"
        )
    plain, three = found.rows[0], next(row for row in found.rows if row.stage == 3)
    if cluster.gpus > 1 and found.settings.share.passes > 1:
        notes.append("stages 2 and 3 exchange gradients in each of a rank's passes, the others once an update")
    if cluster.gpus > 1 and plain.fits:
        notes.append("plain torch fits: engine.kind=torch trains on several GPUs too, without the cost of ZeRO")
    if cluster.gpus > 1 and three.memory.gathered > _GIB:
        notes.append(
            f"stage 3 holds {three.memory.gathered / _GIB:.1f} GiB of gathered parameters from forward to backward; "
            "engine.deepspeed='{zero_optimization: {stage3_max_live_parameters: N, stage3_max_reuse_distance: N}}' "
            "lets it hold N of them and gather the others again"
        )
    if three.memory.host:
        notes.append(
            "offloading: memory is planned from DeepSpeed's code, no run has checked it; times leave the copies out"
        )
    return notes


def to_json(found: Plan) -> dict[str, Any]:
    """Plain values: bytes, seconds, elements."""
    traced, choice = found.trace, found.choice

    def plain(row: PlanRow) -> dict[str, Any]:
        account = dataclasses.asdict(row.memory) | {"peak": row.memory.peak, "lasting": row.memory.lasting}
        time = dataclasses.asdict(row.time) | {"total": row.time.total}
        sent = dataclasses.asdict(row.sent) | {"total": row.sent.total}
        return {"engine": _NAMES[row.stage], "fits": row.fits, "memory": account, "sent": sent, "seconds": time}

    return {
        "experiment": found.experiment.name,
        "cluster": dataclasses.asdict(found.cluster),
        "parameters": {"trained": traced.trained, "predictors": traced.predictors, "teacher": traced.frozen},
        "share": dataclasses.asdict(found.settings.share) | {"samples": found.settings.samples},
        "rate": dataclasses.asdict(found.rate) | {"measured": found.rate.measured},
        "flops_per_sample": traced.flops,
        "engines": [plain(row) for row in found.rows],
        "recommended": None if choice.row is None else _NAMES[choice.row.stage],
        "changes": list(choice.settings.changes),
        "reason": choice.reason,
        "command": found.command,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Plan and print; returns the exit status: 0 done, 2 a user's error, 130 interrupted."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    arguments = _arguments(argv)
    console = Console(highlight=False)
    try:
        found = plan(arguments)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(to_json(found), indent=2) + "\n", encoding="utf-8")
    except (Data2VecError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if not console.is_terminal:
        console.width = max(console.width, 140)
    console.print(shown(found), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
