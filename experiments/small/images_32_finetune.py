r"""Classes of images of 32 x 32 pixels from few labels, from a run of images_32.py.

    uv run experiments/small/images_32_finetune.py start=runs/images_32 labels.count=1000 data.train=... \
        data.validation=...
    uv run tools/compare.py experiments/small/images_32_finetune.py --labels 1000 -- start=runs/images_32 ...

labels.count=null takes all labels; raise train.updates with it.
"""

from images_32 import experiment as network

from data2vec.core import main
from data2vec.core.settings.fields import DataConfig, OptimConfig, Schedule, TrainConfig
from data2vec.core.settings.finetuning import Classification, LabelConfig, ScoreConfig

_tuned = network.replace(vision={"augment": {"crop_scale": (0.6, 1.0), "flip": 0.5}})
experiment = Classification(
    name="images_32_finetune",
    modalities=_tuned.modalities,
    transformer=_tuned.transformer,
    layer_decay=1.0,
    labels=LabelConfig(count=1_000, smoothing=0.1),
    optim=OptimConfig(
        lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05, clip=3.0, schedule=Schedule.COSINE, warmup=100
    ),
    data=DataConfig(workers=1),
    train=TrainConfig(updates=1_000, batch=64, keep_best="accuracy", checkpoint_every=500),
    evaluation=ScoreConfig(every=250, batch=256),
)  # fmt: skip

if __name__ == "__main__":
    main(experiment)
