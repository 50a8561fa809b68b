"""Fine-tuning for texts and pairs of texts: the published recipes of data2vec for the tasks of GLUE.

    uv run experiments/text_glue.py                                             # the sample: topics of documentation
    uv run experiments/text_glue.py task=order                                  # the sample: sentences in their order?
    uv run tools/shard.py text-labelled GLUE/SST-2/train.tsv shards/sst2/train  # the shards of a task
    uv run experiments/text_glue.py start=runs/text_base task=sst2 data.train=shards/sst2/train data.validation=...

`task` is cola, mnli, mrpc, qnli, qqp, rte, sst2 or stsb, `method` 1.0 or 2.0. A pair of texts is read as
`<s> a </s></s> b </s>`. The classes of other tasks are learnt in the same way: name a task that is like yours, and its
updates. The sample variants pretrain first where runs/text_base_sample is not there.

Published averages over GLUE's development sets: 82.7 (1.0, paper 1, table 3), 82.5 (2.0, paper 2, table 4). Source:
examples/roberta/config/finetuning and config/v2/text_finetuning of fairseq. GLUE's test sets have no labels; mnli is
validated on the set that data.validation names, matched or mismatched.
"""

from dataclasses import dataclass

from text_base import experiment as base_v1
from text_base import sample as before
from text_base_v2 import experiment as base_v2

from data2vec.core import main
from data2vec.core.run.choices import Choices
from data2vec.core.settings.fields import DataConfig, OptimConfig, Schedule, TrainConfig
from data2vec.core.settings.finetuning import (
    Classification,
    HeadConfig,
    LabelConfig,
    LabelKind,
    Pool,
    ScoreConfig,
)


@dataclass(frozen=True)
class Task:
    """A task of GLUE: samples of an update, rates of 1.0 and 2.0, updates of warm-up and in all, and its main score."""

    batch: int
    lr: float
    lr_v2: float
    warmup: int
    updates: int
    score: str = "accuracy"
    kind: LabelKind = LabelKind.CLASS


TASKS = {
    "cola": Task(16, 1e-5, 2e-5, 320, 5_336, "matthews"),
    "mnli": Task(32, 1e-5, 2e-5, 7_432, 123_873),
    "mrpc": Task(16, 1e-5, 2e-5, 137, 2_296),
    "qnli": Task(32, 1e-5, 2e-5, 1_986, 33_112),
    "qqp": Task(32, 1e-5, 2e-5, 28_318, 113_272),
    "rte": Task(16, 2e-5, 2e-5, 122, 2_036),
    "sst2": Task(32, 1e-5, 2e-5, 1_256, 20_935),
    "stsb": Task(16, 2e-5, 4e-5, 214, 3_598, "pearson", LabelKind.NUMBER),
}


def recipe(task: str, method: str) -> Classification:
    """The recipe of a task, with the network of a method."""
    chosen, network = TASKS[task], {"1.0": base_v1, "2.0": base_v2}[method]
    trained = network.replace(
        text={"dropout": 0.1},
        transformer={"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.0, "layer_drop": 0.0},
    )
    return Classification(
        name=f"text_{task}",
        modalities=trained.modalities,
        transformer=trained.transformer,
        labels=LabelConfig(kind=chosen.kind),
        head=HeadConfig(pool=Pool.FIRST, norm=False, hidden=True),
        optim=OptimConfig(
            lr=chosen.lr if method == "1.0" else chosen.lr_v2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1,
            schedule=Schedule.LINEAR, warmup=chosen.warmup,
        ),
        data=DataConfig(workers=4),
        train=TrainConfig(
            updates=chosen.updates, batch=chosen.batch, keep_best=chosen.score,
            checkpoint_every=max(500, chosen.updates // 20),
        ),
        evaluation=ScoreConfig(every=max(100, chosen.updates // 10)),
    )  # fmt: skip


experiment = Choices({"task": ("sst2", *(task for task in TASKS if task != "sst2")), "method": ("1.0", "2.0")}, recipe)


def sample_recipe(task: str) -> Classification:
    """Small tasks on documentation strings; settings chosen by measurement (docs/log.md)."""
    return recipe("sst2", "1.0").replace(
        name=f"text_{task}_sample",
        start="runs/text_base_sample",
        labels={"count": 200} if task == "topic" else {},
        head={"pool": Pool.MEAN, "hidden": task == "order"},
        text={"dropout": 0.1},
        optim={"lr": 5e-4 if task == "topic" else 1e-3, "warmup": 40, "weight_decay": 0.01, "clip": 5.0},
        data={"workers": 1, "sample": None if task == "topic" else task},
        train={"updates": 200 if task == "topic" else 600, "batch": 32, "checkpoint_every": 500},
        evaluation={"every": 100},
    )


sample = Choices({"task": ("topic", "order")}, sample_recipe)

if __name__ == "__main__":
    main(experiment, sample, before=before)
