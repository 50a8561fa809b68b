r"""data2vec 1.0, ViT-L/16 on ImageNet-1k (Baevski et al. 2022, arXiv 2202.03555, "paper 1").

    uv run experiments/vision_large.py                                              # sample images, on a CPU
    uv run experiments/vision_large.py data.train='imagenet/train-{0000..1023}.tar' # the published recipe, first half

Published result: 86.6 % ImageNet top-1 after fine-tuning (paper 1, table 1), 1,600 epochs.

The paper trains in two halves of 800 epochs: the second starts from the first's weights with a new schedule, a new
teacher (a copy of the student) and teacher decay 0.9999 (paper 1, section 4.1). This file is the first half; continue
with the second in another folder once the first is done:

    uv run experiments/vision_large.py data.train=... train.folder=runs/vision_large_2 \\
        train.init_from=runs/vision_large teacher.decay_start=0.9999 teacher.decay_end=0.9999
"""

from vision_base import experiment as base
from vision_base import sample as base_sample

from data2vec.core import main

_large = {"depth": 24, "width": 1024, "heads": 16}

experiment = base.replace(
    name="vision_large",
    transformer=_large,
    optim={"lr": 1e-3},
    train={"micro_batch": 64},
)

# The sample variant keeps the shape of what differs: twice the depth of vision_base's.
sample = base_sample.replace(name="vision_large_sample", transformer={"depth": 2 * base_sample.transformer.depth})

if __name__ == "__main__":
    main(experiment, sample)
