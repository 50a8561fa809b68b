"""data2vec 1.0 for speech, large size, on Libri-light's 60,000 hours (arXiv 2202.03555, "paper 1").

    uv run experiments/speech_large.py data.train='libri-light/train-*.tar'     # the published recipe

24 blocks of 1,024 with 16 heads. Paper 1 trains 600,000 updates in two phases, with a rate of 3e-4 in the first and
1.5e-4 in the second; it does not say when the second begins. The second phase is a run of its own that starts from the
first: train.init_from=runs/speech_large optim.lr=1.5e-4 train.folder=runs/speech_large_2. Without data.train the sample
variant of speech_base runs.
"""

from speech_base import experiment as base
from speech_base import sample as base_sample

from data2vec.core import main

experiment = base.replace(
    name="speech_large",
    transformer={"depth": 24, "width": 1024, "heads": 16},
    optim={"lr": 3e-4, "warmup": 18_000, "hold": 540_000},  # 3 / 90 / 7 % of 600,000
    train={"updates": 600_000},
)

sample = base_sample.replace(name="speech_large_sample")

if __name__ == "__main__":
    main(experiment, sample)
