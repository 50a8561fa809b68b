"""data2vec for short spoken words in minutes of two CPU cores: 4 blocks of 128 on frames of 20 ms.

    uv run tools/shard.py speech WORDS/train shards/words/train          # class subfolders of clips
    uv run experiments/small/spoken_words.py data.train=shards/words/train data.validation=...
    uv run experiments/small/spoken_words_finetune.py start=runs/spoken_words data.train=... data.validation=...

The network is that of speech_base.py's sample: two convolutions, the first of which starts from filters on the mel
scale. Clips of another rate than 16 kHz are resampled when they are sharded or read. docs/results.md has what it is
worth.
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
from data2vec.speech import AudioConfig, MaskConfig, MaskKind, PositionsConfig, Speech

experiment = Experiment(
    name="spoken_words",
    modalities={
        "speech": Speech(
            channels=(128, 128),
            kernels=(256, 5),
            strides=(64, 5),
            mel=True,
            positions=PositionsConfig(width=20, depth=2, groups=8),
            input_norm=True,
            dropout=0.0,
            mask=MaskConfig(kind=MaskKind.SPAN, ratio=0.65, length=5),
            predictor=PredictorConfig(kind=PredictorKind.LINEAR),
            audio=AudioConfig(min_length=2_000, max_length=16_000, normalise=True),
        )
    },
    student_sees=StudentSees.ALL,
    transformer=TransformerConfig(depth=4, width=128, heads=4, norm_order=NormOrder.POST, norm_eps=1e-5),
    teacher=TeacherConfig(
        decay_start=0.99, decay_end=0.999, decay_updates=1_000, shares=TeacherShares.EXTRACTOR
    ),
    targets=TargetsConfig(
        top_k=3, output=LayerOutput.BLOCK, layer_norm=TargetNorm.INSTANCE, mean_norm=TargetNorm.NONE
    ),
    loss=LossConfig(beta=0.0),
    optim=OptimConfig(
        lr=3e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, schedule=Schedule.COSINE, warmup=50
    ),
    data=DataConfig(workers=1),
    train=TrainConfig(updates=2_000, batch_length=256_000, micro_length=256_000, checkpoint_every=500),
    evaluation=EvaluationConfig(layers="last", tasks=("knn", "linear", "rank")),
)  # fmt: skip

if __name__ == "__main__":
    main(experiment)
