"""data2vec 1.0 for text, base size, on Books and English Wikipedia (Baevski et al. 2022, arXiv 2202.03555, "paper 1").

    uv run experiments/text_base.py                                         # documentation strings, minutes on a CPU
    uv run experiments/text_base.py data.train='books-wiki/train-*.tar'     # the published recipe

Published result: GLUE development average 82.7 after fine-tuning, 82.9 with span masks (paper 1, table 3).

Shards are made by `tools/shard.py text`, with RoBERTa's vocabulary of 50,265 byte-pair codes where its tokenizer.json
is given. Values follow paper 1, section 4.4 and appendix. The released configuration ("config") differs from the paper
in these, and the paper is followed: it hides spans of 4 tokens at 35 % and always puts the mask token in their place
(the paper: 15 % as BERT; text.mask.kind=span text.mask.ratio=0.35 text.mask.random_share=0 text.mask.kept_share=0 gives
the spans), its rate follows a cosine after 10,000 updates of warm-up, and its decay rises over 300,000 updates.
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
from data2vec.text import MaskConfig, MaskKind, Text

experiment = Experiment(
    name="text_base",
    modalities={
        "text": Text(
            vocabulary=50_265,
            block=512,
            dropout=0.1,
            mask=MaskConfig(kind=MaskKind.TOKEN, ratio=0.15, replace=True, random_share=0.1, kept_share=0.1),
            predictor=PredictorConfig(kind=PredictorKind.MLP, layers=2, width=1536),
        )
    },
    student_sees=StudentSees.ALL,
    transformer=TransformerConfig(
        depth=12,
        width=768,
        heads=12,
        norm_order=NormOrder.POST,
        norm_eps=1e-5,
        dropout=0.1,
        attention_dropout=0.1,
    ),
    teacher=TeacherConfig(decay_start=0.999, decay_end=0.9999, decay_updates=100_000, shares=TeacherShares.FRONTEND),
    targets=TargetsConfig(
        top_k=10, output=LayerOutput.FEED_FORWARD, layer_norm=TargetNorm.LAYER, mean_norm=TargetNorm.NONE
    ),
    loss=LossConfig(beta=4.0, scale=1.0),
    optim=OptimConfig(
        lr=2e-4,
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=0.01,
        clip=5.0,
        schedule=Schedule.TRI_STAGE,  # 5 / 80 / 15 %
        warmup=50_000,
        hold=800_000,
        start_lr_ratio=0.01,
        final_lr_ratio=0.01,
    ),
    data=DataConfig(workers=4),
    train=TrainConfig(updates=1_000_000, batch=256, micro_batch=16, checkpoint_every=5_000),
)

# A small model for the documentation strings of installed libraries, in blocks of 128 tokens of a vocabulary of 4,096.
# Many small updates; longer hidden spans and a teacher with its own embeddings (docs/log.md says why).
sample = experiment.replace(
    name="text_base_sample",
    text={
        "vocabulary": 4096,
        "block": 128,
        "dropout": 0.0,
        "mask": {"kind": MaskKind.SPAN, "ratio": 0.6, "length": 5, "random_share": 0.0, "kept_share": 0.0},
        "predictor": {"width": None},
    },
    transformer={"depth": 2, "width": 128, "heads": 4, "dropout": 0.0, "attention_dropout": 0.0},
    teacher={"decay_start": 0.99, "decay_end": 0.9995, "decay_updates": 1000, "shares": TeacherShares.NOTHING},
    targets={"top_k": 2},
    optim={
        "lr": 5e-4,
        "schedule": Schedule.COSINE,
        "warmup": 100,
        "hold": 0,
        "start_lr_ratio": 0.0,
        "final_lr_ratio": 0.0,
    },
    data={"workers": 1},
    train={"updates": 1000, "batch": 16, "micro_batch": None, "checkpoint_every": 500},
    evaluation={"layers": "last"},
)

if __name__ == "__main__":
    main(experiment, sample)
