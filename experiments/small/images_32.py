r"""data2vec for images of 32 x 32 pixels in minutes of two CPU cores: a ViT of 6 blocks of 192 on patches of 4 x 4.

    uv run tools/shard.py vision CIFAR10/train shards/cifar10/train --validation 0.1     # class subfolders of images
    uv run experiments/small/images_32.py data.train='shards/cifar10/train/train-*.tar' \
        data.validation='shards/cifar10/train/validation-*.tar'
    uv run experiments/small/images_32_finetune.py start=runs/images_32 data.train=... data.validation=...

The means and deviations are CIFAR-10's. 2.0's targets and positions under 1.0's student, which sees the mask tokens:
what learns fastest in minutes (docs/log.md). docs/results.md has what it is worth.
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
    StudentSees,
    TargetNorm,
    TargetsConfig,
    TeacherConfig,
    TeacherShares,
)
from data2vec.vision import AugmentConfig, MaskConfig, MaskKind, PositionKind, Vision

experiment = Experiment(
    name="images_32",
    modalities={
        "vision": Vision(
            image_size=32,
            patch_size=4,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.247, 0.2435, 0.2616),
            evaluation_crop=1.0,
            positions=PositionKind.SINE,
            cls_token=True,
            mask=MaskConfig(kind=MaskKind.BLOCK, ratio=0.6, min_block=4, min_aspect=0.3),
            augment=AugmentConfig(crop_scale=(0.4, 1.0), colour_jitter=0.0),
        )
    },
    student_sees=StudentSees.ALL,
    transformer=TransformerConfig(depth=6, width=192, heads=3, norm_order=NormOrder.PRE),
    teacher=TeacherConfig(
        decay_start=0.992, decay_end=0.9995, decay_updates=1_500, shares=TeacherShares.FRONTEND
    ),
    targets=TargetsConfig(
        top_k=4, output=LayerOutput.FEED_FORWARD, layer_norm=TargetNorm.INSTANCE, mean_norm=TargetNorm.LAYER
    ),
    loss=LossConfig(beta=0.0),
    optim=OptimConfig(
        lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01, clip=3.0, schedule=Schedule.COSINE, warmup=150
    ),
    data=DataConfig(workers=1),
    train=TrainConfig(updates=1_500, batch=64, checkpoint_every=500),
    evaluation=EvaluationConfig(layers="last", max_samples=5_000),
)  # fmt: skip

if __name__ == "__main__":
    main(experiment)
