"""data2vec 2.0 scaled to CIFAR-10: a ViT of 12 blocks of 384 on 64 patches of 4 x 4, for one GPU and minutes.

    uv run tools/shard.py vision CIFAR10/train shards/cifar10/train     # class subfolders of images
    uv run tools/shard.py vision CIFAR10/test shards/cifar10/test
    uv run experiments/cifar10.py data.train=shards/cifar10/train data.validation=shards/cifar10/test

With `train.max_minutes=M` it saves and stops after M minutes, and the same command continues: a schedule of any
length fits into short GPU allotments. The learning curve (kNN and linear probe of teacher and student every
`evaluation.every` updates) is in metrics.jsonl and in the report.

There is no published data2vec result on CIFAR-10. docs/log.md records what was measured here.
"""

from vision_base_v2 import experiment as base

from data2vec.core import main
from data2vec.core.settings.fields import NormOrder

experiment = base.replace(
    name="cifar10",
    vision={
        "image_size": 32,
        "patch_size": 4,
        "blocks": 0,
        "input_norm": False,
        "evaluation_crop": 1.0,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.247, 0.2435, 0.2616),
        "mask": {"ratio": 0.75, "masks": 8},
        "predictor": {"layers": 4, "width": 384, "groups": 8},
        "augment": {"crop_scale": (0.2, 1.0)},
    },
    transformer={"depth": 12, "width": 384, "heads": 6, "norm_order": NormOrder.PRE},
    teacher={"decay_start": 0.996, "decay_end": 0.9998, "decay_updates": 10_000},
    loss={"cls_weight": 1.0},
    optim={"warmup": 1_000},
    train={"updates": 12_000, "batch": 512, "micro_batch": None, "checkpoint_every": 1_000},
    evaluation={"every": 2_000, "tasks": ("knn", "linear"), "batch": 1_000},
)

# Without shards: the sample digits in colour, to try the file out on a CPU.
sample = experiment.replace(
    name="cifar10_sample",
    transformer={"depth": 4, "width": 128, "heads": 4},
    targets={"top_k": 4},
    vision={"mask": {"masks": 2}, "predictor": {"layers": 2, "width": 64, "groups": 1}},
    teacher={"decay_start": 0.99, "decay_end": 0.999, "decay_updates": 300},
    optim={"warmup": 50},
    data={"workers": 0},
    train={"updates": 200, "batch": 64},
    evaluation={"every": None},
)

if __name__ == "__main__":
    main(experiment, sample)
