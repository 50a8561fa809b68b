"""Small experiments of every kind, and batches for them, on which engines are compared."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import soundfile
import torch
from PIL import Image
from torch import Tensor

from data2vec.core import Batch, Experiment
from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.hashing import derive
from data2vec.core.settings.fields import LayerOutput, NormOrder, OptimConfig, TrainConfig, TransformerConfig
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
from data2vec.speech import AudioConfig, PositionsConfig, Speech
from data2vec.speech import MaskConfig as SpeechMask
from data2vec.speech import MaskKind as SpeechMaskKind
from data2vec.text import MaskConfig as TextMask
from data2vec.text import MaskKind as TextMaskKind
from data2vec.text import Text
from data2vec.vision import MaskConfig as VisionMask
from data2vec.vision import MaskKind as VisionMaskKind
from data2vec.vision import PositionKind, Vision

WIDTH = 20  # no power of two: shards of two and three ranks are padded
SAMPLES = 4  # of an update
_CONV1D = PredictorConfig(PredictorKind.CONV1D, layers=1, width=12, kernel=3, groups=2, mask_noise=0.0)
_BASE = Experiment(
    name="scenario",
    transformer=TransformerConfig(depth=3, width=WIDTH, heads=2, norm_order=NormOrder.POST, layer_drop=0.3),
    teacher=TeacherConfig(decay_start=0.9, decay_end=0.95, decay_updates=10),
    targets=TargetsConfig(top_k=2),
    loss=LossConfig(),
    optim=OptimConfig(lr=1e-3, clip=0.5, weight_decay=0.05, warmup=4),
    train=TrainConfig(updates=20, batch=SAMPLES, device="cpu", min_target_spread=0.0, min_prediction_spread=0.0),
)


def _vision(version: int) -> Vision:
    if version == 1:
        return Vision(
            image_size=16, patch_size=4, positions=PositionKind.RELATIVE, cls_token=True,
            mask=VisionMask(kind=VisionMaskKind.BLOCK, ratio=0.5, min_block=2),
        )  # fmt: skip
    return Vision(
        image_size=16, patch_size=4, positions=PositionKind.SINE, cls_token=True, blocks=1,
        mask=VisionMask(kind=VisionMaskKind.INVERSE_BLOCK, ratio=0.6, block=2, masks=2),
        predictor=PredictorConfig(PredictorKind.CONV2D, layers=1, width=12, kernel=3, groups=2, mask_noise=0.0),
    )  # fmt: skip


def _speech(version: int) -> Speech:
    one = version == 1
    return Speech(
        channels=(12, 12, 12), kernels=(10, 3, 3), strides=(8, 4, 4), dropout=0.0,
        positions=PositionsConfig(width=3, depth=1, groups=2), alibi=not one,
        mask=SpeechMask(SpeechMaskKind.SPAN, ratio=0.5, length=3)
        if one
        else SpeechMask(SpeechMaskKind.EXACT_SPAN, ratio=0.5, length=3, masks=2),
        predictor=PredictorConfig(PredictorKind.LINEAR) if one else _CONV1D,
        audio=AudioConfig(min_length=1_000, max_length=4_000),
    )  # fmt: skip


def _text(version: int) -> Text:
    one = version == 1
    return Text(
        vocabulary=300, block=24, dropout=0.0,
        mask=TextMask(TextMaskKind.TOKEN, ratio=0.3, replace=one, masks=1 if one else 2),
        predictor=PredictorConfig(PredictorKind.MLP, layers=2) if one else _CONV1D,
    )  # fmt: skip


def scenario(name: str) -> Experiment:
    """``vision``, ``speech``, ``text``, each also with ``_v2``, or ``alternating`` with all three."""
    if name == "alternating":
        modalities: dict[str, Any] = {"vision": _vision(1), "speech": _speech(1), "text": _text(1)}
        return _BASE.replace(modalities=modalities, teacher={"shares": TeacherShares.EXTRACTOR})
    kind, _, second = name.partition("_")
    version = 2 if second else 1
    build = {"vision": _vision, "speech": _speech, "text": _text}[kind]
    experiment = _BASE.replace(modalities={kind: build(version)})
    if version == 2:
        return experiment.replace(
            student_sees=StudentSees.VISIBLE,
            targets={"mean_norm": TargetNorm.LAYER},
            loss={"cls_weight": 0.5 if kind == "vision" else 0.0},
            teacher={"shares": TeacherShares.NOTHING if kind == "vision" else TeacherShares.FRONTEND},
        )
    if kind == "vision":
        return experiment.replace(
            transformer={"norm_order": NormOrder.PRE, "layer_scale": 0.1},
            targets={"output": LayerOutput.BLOCK, "layer_norm": TargetNorm.NONE, "mean_norm": TargetNorm.LAYER},
            loss={"beta": 2.0},
        )
    shares = TeacherShares.POSITIONS if kind == "speech" else TeacherShares.FRONTEND
    return experiment.replace(teacher={"shares": shares})


def batch_of(experiment: Experiment, update: int, which: slice) -> Batch:
    """Some samples of an update; samples of different lengths where the modality has them."""
    name = list(experiment.modalities)[update % len(experiment.modalities)]
    ids = torch.arange(SAMPLES) + SAMPLES * update
    unknown = torch.full((SAMPLES,), -1)
    made = [_sample(name, int(number)) for number in ids]
    lengths = None if name == "vision" else torch.tensor([len(sample) for sample in made])[which]
    made = made[which]
    inputs = torch.stack(made) if lengths is None else torch.nn.utils.rnn.pad_sequence(made, batch_first=True)
    if name == "text" and lengths is not None:
        pad = experiment.modalities["text"].loaded_tokenizer.pad
        inputs[torch.arange(inputs.shape[1]) >= lengths[:, None]] = pad
    return Batch(name, inputs, ids[which], unknown[which], lengths)


def _sample(name: str, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive(7, number))
    if name == "vision":
        return torch.randn(3, 16, 16, generator=generator)
    if name == "speech":
        length = 1_500 + 500 * (number % 4)
        return torch.randn(length, generator=generator)
    tokens = torch.randint(10, 260, (12 + 3 * (number % 4),), generator=generator)
    return tokens


def members_of(name: str, number: int, shift: float = 0.0) -> dict[str, bytes]:
    """One sample as shards hold it; ``shift``: of an image's grey level, in deviations of its noise."""
    sample = _sample(name, number)
    file = io.BytesIO()
    if name == "vision":
        pixels = ((sample + shift).movedim(0, -1) * 40 + 128).clamp(0, 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(file, format="PNG")
        return {"png": file.getvalue()}
    if name == "speech":
        soundfile.write(file, (0.1 * sample).numpy(), 16_000, format="WAV", subtype="PCM_16")
        return {"wav": file.getvalue()}
    return {"txt": bytes(97 + int(token) % 26 for token in sample)}


def write_shards(folder: Path, name: str, count: int = 40) -> Path:
    """Shards of one modality with samples of different lengths, for runs; returns the folder."""
    with ShardWriter(folder, "train", name, samples_per_shard=9) as writer:
        for number in range(count):
            writer.write(f"sample{number:03d}", members_of(name, number))
    return folder


def run_of(name: str, shards: Path, folder: Path) -> Experiment:
    """A scenario that trains on shards of :func:`write_shards` in a run's folder, with a line for every update."""
    experiment = scenario(name)
    first = next(iter(experiment.modalities))
    return experiment.replace(
        data={"train": str(shards / first / "train-*.tar"), "workers": 0},
        train={"folder": str(folder), "log_every": 1, "checkpoint_every": 1, "batch": SAMPLES},
        evaluation={"tasks": ("rank",)},
    )
