"""data2vec 1.0 for speech, base size, on LibriSpeech's 960 hours (Baevski et al. 2022, arXiv 2202.03555, "paper 1").

    uv run experiments/speech_base.py                                          # synthetic speech, minutes on a CPU
    uv run experiments/speech_base.py data.train='librispeech/train-*.tar'     # the published recipe

Published result: word error rate on test-other with a 4-gram language model after fine-tuning on 10 min / 1 h / 10 h /
100 h / 960 h of labelled speech: 12.3 / 9.1 / 8.1 / 6.8 / 5.5 (paper 1, table 2).

Shards are made by `tools/shard.py speech`. Values follow paper 1, section 4.2 and appendix, which the released
configuration agrees with: 16 GPUs with 3.8 M samples of audio each, 63 minutes an update.
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
    name="speech_base",
    modalities={
        "speech": Speech(
            channels=(512,) * 7,
            kernels=(10, 3, 3, 3, 3, 2, 2),
            strides=(5, 2, 2, 2, 2, 2, 2),
            positions=PositionsConfig(width=95, depth=5, groups=16),
            input_norm=True,
            dropout=0.1,
            mask=MaskConfig(kind=MaskKind.SPAN, ratio=0.65, length=10),  # spans start with p = 0.065; 49 % hidden
            predictor=PredictorConfig(kind=PredictorKind.LINEAR),
            audio=AudioConfig(min_length=32_000, max_length=320_000, normalise=True),  # 2 s to 20 s
        )
    },
    student_sees=StudentSees.ALL,
    transformer=TransformerConfig(
        depth=12,
        width=768,
        heads=12,
        norm_order=NormOrder.POST,
        norm_eps=1e-5,
        layer_drop=0.05,
        dropout=0.1,
        attention_dropout=0.1,
    ),
    teacher=TeacherConfig(decay_start=0.999, decay_end=0.9999, decay_updates=30_000, shares=TeacherShares.POSITIONS),
    targets=TargetsConfig(
        top_k=8, output=LayerOutput.FEED_FORWARD, layer_norm=TargetNorm.INSTANCE, mean_norm=TargetNorm.NONE
    ),
    loss=LossConfig(beta=0.0),
    optim=OptimConfig(
        lr=5e-4,
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=0.01,
        schedule=Schedule.TRI_STAGE,  # 3 / 90 / 7 %
        warmup=12_000,
        hold=360_000,
        start_lr_ratio=0.01,
        final_lr_ratio=0.01,
    ),
    data=DataConfig(workers=6),
    train=TrainConfig(updates=400_000, batch_length=16 * 3_800_000, micro_length=3_800_000, checkpoint_every=5_000),
)

# A small model for a few minutes of a CPU, on 45 minutes of speech that espeak-ng synthesises. The first convolution
# starts from filters on the mel scale, which random ones would not become in this time, and the teacher shares the
# extractor (docs/log.md).
sample = experiment.replace(
    name="speech_base_sample",
    speech={
        "channels": (128, 128),
        "kernels": (256, 5),
        "strides": (64, 5),
        "mel": True,
        "positions": {"width": 20, "depth": 2, "groups": 8},
        "dropout": 0.0,
        "audio": {"min_length": 4_000, "max_length": 16_000},
        "mask": {"length": 5},
    },
    transformer={"depth": 4, "width": 128, "heads": 4, "layer_drop": 0.0, "dropout": 0.0, "attention_dropout": 0.0},
    teacher={"decay_start": 0.99, "decay_end": 0.999, "decay_updates": 1_000, "shares": TeacherShares.EXTRACTOR},
    targets={"top_k": 3, "output": LayerOutput.BLOCK},
    optim={
        "lr": 3e-3,
        "schedule": Schedule.COSINE,
        "warmup": 50,
        "hold": 0,
        "final_lr_ratio": 0.0,
    },
    data={"workers": 1},
    train={"updates": 1_200, "batch_length": 256_000, "micro_length": 256_000, "checkpoint_every": 600},
    evaluation={"tasks": ("knn", "linear", "rank", "positions"), "layers": "last"},
)

if __name__ == "__main__":
    main(experiment, sample)
