r"""data2vec for text in minutes of two CPU cores: 2 blocks of 128 on 8,192 tokens, in samples of 128.

    uv run tools/shard.py text REVIEWS.txt shards/reviews --train-tokenizer 8192 --block 128 --validation 0.01
    uv run experiments/small/reviews.py data.train='shards/reviews/train-*.tar' \
        data.validation='shards/reviews/validation-*.tar'
    uv run experiments/small/reviews_finetune.py start=runs/reviews data.train=... data.validation=...

The method is that of text_base.py's sample: spans of 5 tokens at 60 %, and a teacher with its own embeddings.
docs/results.md has what it is worth for sentences about films.
"""

from data2vec.core import Experiment, main
from data2vec.core.settings.fields import (
    DataConfig,
    LayerOutput,
    NormOrder,
    OptimConfig,
    Schedule,
    TrainConfig,
    TransformerConfig,
)
from data2vec.core.settings.pretraining import (
    EvaluationConfig,
    LossConfig,
    PredictorConfig,
    PredictorKind,
    StudentSees,
    TargetNorm,
    TargetsConfig,
    TeacherConfig,
    TeacherShares,
)
from data2vec.text import MaskConfig, MaskKind, Text

experiment = Experiment(
    name="reviews",
    modalities={
        "text": Text(
            vocabulary=8_192,
            block=128,
            dropout=0.0,
            mask=MaskConfig(kind=MaskKind.SPAN, ratio=0.6, length=5, replace=True),
            predictor=PredictorConfig(kind=PredictorKind.MLP, layers=2),
        )
    },
    student_sees=StudentSees.ALL,
    transformer=TransformerConfig(depth=2, width=128, heads=4, norm_order=NormOrder.POST, norm_eps=1e-5),
    teacher=TeacherConfig(
        decay_start=0.99, decay_end=0.9998, decay_updates=4_000, shares=TeacherShares.NOTHING
    ),
    targets=TargetsConfig(
        top_k=2, output=LayerOutput.FEED_FORWARD, layer_norm=TargetNorm.LAYER, mean_norm=TargetNorm.NONE
    ),
    loss=LossConfig(beta=4.0, scale=1.0),
    optim=OptimConfig(
        lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, clip=5.0, schedule=Schedule.COSINE, warmup=300
    ),
    data=DataConfig(workers=1),
    train=TrainConfig(updates=6_000, batch=32, checkpoint_every=1_000),
    evaluation=EvaluationConfig(layers="last", tasks=("rank",)),
)  # fmt: skip

if __name__ == "__main__":
    main(experiment)
