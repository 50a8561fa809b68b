"""Classes of sentences from few labels, from a run of reviews.py.

    uv run tools/shard.py text-labelled SENTENCES.jsonl shards/sentences/train
    uv run experiments/small/reviews_finetune.py start=runs/reviews labels.count=200 data.train=... data.validation=...
    uv run tools/compare.py experiments/small/reviews_finetune.py --labels 200 -- start=runs/reviews ...

labels.count=null takes all labels.
"""

from reviews import experiment as network

from data2vec.core import main
from data2vec.core.settings.fields import DataConfig, OptimConfig, Schedule, TrainConfig
from data2vec.core.settings.finetuning import Classification, HeadConfig, LabelConfig, ScoreConfig

_tuned = network.replace(text={"dropout": 0.1}, transformer={"dropout": 0.1, "attention_dropout": 0.1})
experiment = Classification(
    name="reviews_finetune",
    modalities=_tuned.modalities,
    transformer=_tuned.transformer,
    labels=LabelConfig(count=200),
    head=HeadConfig(norm=False),
    optim=OptimConfig(
        lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, clip=5.0, schedule=Schedule.LINEAR, warmup=40
    ),
    data=DataConfig(workers=1),
    train=TrainConfig(updates=300, batch=32, keep_best="accuracy"),
    evaluation=ScoreConfig(every=100),
)  # fmt: skip

if __name__ == "__main__":
    main(experiment)
