r"""Which word a clip is, from few labels, from a run of spoken_words.py.

    uv run experiments/small/spoken_words_finetune.py start=runs/spoken_words labels.count=100 data.train=... \
        data.validation=...
    uv run tools/compare.py experiments/small/spoken_words_finetune.py --labels 100 -- start=runs/spoken_words ...

labels.count=null takes all labels.
"""

from spoken_words import experiment as network

from data2vec.core import main
from data2vec.core.settings.fields import DataConfig, OptimConfig, Schedule, TrainConfig
from data2vec.core.settings.finetuning import Classification, LabelConfig, ScoreConfig

_tuned = network.replace(speech={"audio": {"max_length": None}}, transformer={"dropout": 0.1})
experiment = Classification(
    name="spoken_words_finetune",
    modalities=_tuned.modalities,
    transformer=_tuned.transformer,
    layer_decay=1.0,
    labels=LabelConfig(count=100, smoothing=0.1),
    optim=OptimConfig(
        lr=1e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01, clip=1.0, schedule=Schedule.COSINE, warmup=30
    ),
    data=DataConfig(workers=1),
    train=TrainConfig(updates=300, batch=32, keep_best="accuracy"),
    evaluation=ScoreConfig(every=50, batch=128),
)  # fmt: skip

if __name__ == "__main__":
    main(experiment)
