"""Fine-tuning for letters with CTC: the published recipes of data2vec for LibriSpeech.

    uv run experiments/speech_ctc.py                                          # the sample: 5 minutes of transcripts
    uv run experiments/speech_ctc.py start=runs/speech_base labels=10h data.train=... data.validation=...
    uv run experiments/speech_ctc.py start=runs/speech_large labels=100h size=large data.train=... data.validation=...

`labels` is 10m, 1h, 10h, 100h or 960h, `size` base or large. Shards hold clips and their transcripts (member txt); the
symbols are the authors' 32 letters, transcripts are read in upper case. letters.symbols=[] takes the letters of the
data instead. The sample variant pretrains first where runs/speech_base_sample is not there.

Published word error rates on test-other with a 4-gram language model, base: 12.3 / 9.1 / 8.1 / 6.8 / 5.5 for 10 min /
1 h / 10 h / 100 h / 960 h (paper 1, table 2). Source: examples/wav2vec/config/finetuning of fairseq, as the authors use
it. An update sees as many waveform samples as on their GPUs together.
"""

from typing import Any

from speech_base import experiment as base
from speech_base import sample as before
from speech_large import experiment as large

from data2vec.core import main
from data2vec.core.run.choices import Choices
from data2vec.core.settings.fields import DataConfig, OptimConfig, Schedule, TrainConfig
from data2vec.core.settings.finetuning import (
    Case,
    FrameMaskConfig,
    Freeze,
    LetterConfig,
    Recognition,
    ScoreConfig,
)

LETTERS = ("<s>", "<pad>", "</s>", "<unk>", *"|ETAONIHSRDLUMWCFGYPBVK'XJQZ")

# Learning rate, updates, updates with the encoder frozen, masks of time and channels, waveform samples of an update.
_BUDGETS: dict[str, dict[str, tuple[float, int, int, float, float, int]]] = {
    "base": {
        "10m": (5e-5, 13_000, 10_000, 0.65, 0.25, 8 * 3_200_000),
        "1h": (5e-5, 13_000, 10_000, 0.65, 0.25, 8 * 3_200_000),
        "10h": (5e-5, 20_000, 10_000, 0.65, 0.5, 8 * 3_200_000),
        "100h": (3e-5, 80_000, 0, 0.65, 0.5, 8 * 3_200_000),
        "960h": (1e-4, 320_000, 0, 0.5, 0.1, 8 * 3_200_000),
    },
    "large": {
        "10m": (1e-4, 13_000, 10_000, 0.65, 0.25, 20 * 1_280_000),
        "1h": (3e-4, 13_000, 10_000, 0.75, 0.25, 20 * 1_280_000),
        "10h": (1e-4, 20_000, 10_000, 0.75, 0.25, 20 * 1_280_000),
        "100h": (3e-5, 80_000, 10_000, 0.5, 0.5, 20 * 1_280_000),
        "960h": (3e-5, 320_000, 10_000, 0.5, 0.25, 24 * 1_280_000),
    },
}


def recipe(labels: str, size: str) -> Recognition:
    """The recipe of a label budget and a size of the network."""
    lr, updates, frozen, time, channels, length = _BUDGETS[size][labels]
    network = {"base": base, "large": large}[size]
    audio = {"audio": {"max_length": None, "min_length": 2_000}, "dropout": 0.0}
    layer_drop = 0.05 if labels == "10h" else 0.1
    return Recognition(
        name=f"speech_ctc_{size}_{labels}",
        modalities={"speech": network.replace(speech=audio).modalities["speech"]},
        transformer=network.replace(
            transformer={
                "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.1, "layer_drop": layer_drop,
            }
        ).transformer,
        freeze=Freeze.EXTRACTOR,
        freeze_updates=frozen,
        letters=LetterConfig(symbols=LETTERS, case=Case.UPPER),
        frame_masks=FrameMaskConfig(time=time, channels=channels),
        optim=OptimConfig(
            lr=lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, schedule=Schedule.TRI_STAGE,
            warmup=updates // 10, hold=updates * 4 // 10, start_lr_ratio=0.01, final_lr_ratio=0.05,
        ),
        data=DataConfig(workers=6),
        train=TrainConfig(
            updates=updates, batch_length=length, micro_length=length // (8 if size == "base" else 20),
            keep_best="wer", checkpoint_every=1_000,
        ),
        evaluation=ScoreConfig(every=1_000, batch=16),
    )  # fmt: skip


experiment = Choices({"labels": tuple(_BUDGETS["base"]), "size": tuple(_BUDGETS)}, recipe)

# Five minutes of synthetic speech with transcripts, in voices that validation does not have; letters of the data.
_sample: dict[str, Any] = {
    "name": "speech_ctc_sample",
    "start": "runs/speech_base_sample",
    "freeze": Freeze.NONE,
    "freeze_updates": 0,
    "letters": {"symbols": (), "case": Case.LOWER, "minutes": 5.0, "min_words": 3},
    "frame_masks": {"time": 0.3, "time_length": 5, "channels": 0.1, "channel_length": 16},
    "transformer": {"activation_dropout": 0.1, "layer_drop": 0.0},
    "optim": {"lr": 1e-3, "warmup": 60, "hold": 240, "weight_decay": 0.01, "clip": 5.0},
    "data": {"workers": 1},
    "train": {
        "updates": 600, "batch_length": 160_000, "micro_length": 160_000, "checkpoint_every": 500, "keep_best": "cer",
    },
    "evaluation": {"every": 100},
}  # fmt: skip
sample = recipe("10m", "base").replace(**_sample)

if __name__ == "__main__":
    main(experiment, sample, before=before)
