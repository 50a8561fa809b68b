"""Evaluate any run on frozen features, beside a random encoder of the same shape and beside the raw input.

    uv run tools/evaluate.py runs/vision_base_sample
    uv run tools/evaluate.py runs/vision_base --tasks knn,linear --data 'train-*.tar' --test 'val-*.tar'

kNN (cosine), a linear probe from a few and from all labels (its regularisation chosen on a part of the training
samples), and the effective rank (RankMe) of the teacher's and the student's features.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from data2vec.core.data.dataset import EvaluationData, TrainData
from data2vec.core.data.shards.beside import beside, require_same
from data2vec.core.errors import ConfigError, Data2VecError
from data2vec.core.evaluation.evaluate import evaluate_model
from data2vec.core.evaluation.probe import check_tasks
from data2vec.core.run.load import LoadedRun, load_run
from data2vec.core.run.prepare import open_data
from data2vec.core.run.pretraining import compared
from data2vec.core.settings.overrides import validate
from data2vec.core.settings.pretraining import Experiment

_TEST_SHARE = 0.2  # of --data when --test is not given


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = _parser().parse_args(argv)
    console = Console(highlight=False)
    try:
        result = _evaluate(arguments, console)
    except Data2VecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument("--tasks", help="of knn, linear, rank, positions, by commas (default: the run's)")
    parser.add_argument("--data", help="labelled shards for the probes (default: the run's own data)")
    parser.add_argument("--test", help="shards to judge by (default: a fifth of --data, or the run's validation data)")
    parser.add_argument("--modality", help="which one, when the run has several")
    parser.add_argument("--layers", help="top_k, last, all, extractor or a block's number (default: the run's)")
    parser.add_argument("--max-samples", type=int, help="at most this many of each set")
    parser.add_argument("--workers", type=int, help="loader processes (default: the run's data.workers)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda ... (default: auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table there")
    return parser


def _evaluate(arguments: argparse.Namespace, console: Console) -> dict[str, object]:
    run = load_run(arguments.run, device=arguments.device)
    experiment = _settings(run, arguments)
    name = arguments.modality or next(iter(experiment.modalities))
    if name not in experiment.modalities:
        raise ConfigError([f"--modality {name}: the run has {', '.join(experiment.modalities)}"])
    train, test = _data(experiment, run, arguments, name)
    for data in (train, test):
        require_same(run.folder, beside(data.shards, experiment.modalities[name].assets))
    console.print(
        f"{experiment.name}, update {run.update:,}: {train.total:,} samples to fit the probes, {test.total:,} to judge"
    )
    with console.status("taking features") as status:
        evaluated = evaluate_model(
            experiment,
            compared(experiment, run.model, run.device),
            run.device,
            name,
            train,
            test,
            progress=status.update,
        )
    console.print(evaluated.table.to_rich())
    return {"run": str(run.folder), "update": run.update, "modality": name, **evaluated.table.to_json()}


def _settings(run: LoadedRun, arguments: argparse.Namespace) -> Experiment:
    given: dict[str, object] = {}
    if arguments.tasks is not None:
        given["tasks"] = tuple(task.strip() for task in arguments.tasks.split(",") if task.strip())
        check_tasks(given["tasks"])  # type: ignore[arg-type]
    if arguments.layers is not None:
        given["layers"] = arguments.layers
    if arguments.max_samples is not None:
        given["max_samples"] = arguments.max_samples
    if not isinstance(run.experiment, Experiment):
        kind = run.experiment.kind
        raise ConfigError([f"{run.folder}: a run of {kind}, not of pretraining; its report has its scores"])
    experiment = run.experiment.replace(evaluation=given)
    if arguments.workers is not None:
        experiment = experiment.replace(data={"workers": arguments.workers})
    validate(experiment)
    return experiment


def _data(
    experiment: Experiment, run: LoadedRun, arguments: argparse.Namespace, name: str
) -> tuple[TrainData, EvaluationData]:
    cache, modality, seed = run.folder / "cache", experiment.modalities[name], experiment.train.seed
    if arguments.data is None:
        train, validation = open_data(experiment, cache)
        if arguments.test is None:
            return train[name], validation[name]
        test = EvaluationData.open(arguments.test, modality, data=experiment.data, seed=seed, cache=cache)
        return train[name], test
    opened = TrainData.open(arguments.data, modality, data=experiment.data, seed=seed, cache=cache)
    if arguments.test is None:
        return opened.hold_out(_TEST_SHARE)
    return opened, EvaluationData.open(arguments.test, modality, data=experiment.data, seed=seed, cache=cache)


if __name__ == "__main__":
    sys.exit(main())
