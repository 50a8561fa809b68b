"""Random input that stands for a batch of each modality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data2vec.core.settings.fields import Experiment
from data2vec.speech import Speech
from data2vec.text import Text
from data2vec.vision import Vision

_RATE = 16_000  # waveform samples of a second
_CLIP_SECONDS = 15  # about the mean of LibriSpeech's longer clips, and what the peers' rates were measured with


@dataclass(frozen=True)
class Inputs:
    """``inputs``: (B, ...) on the CPU. ``unit``, ``per_sample``: what a rate counts, and how many a sample has."""

    inputs: Tensor
    unit: str = "samples"
    per_sample: float = 1.0


def _vision(modality: Vision, samples: int) -> Inputs:
    size = modality.image_size
    return Inputs(torch.randn(samples, modality.channels, size, size, generator=_generator()), "images")


def _clip(modality: Speech) -> int:
    longest = modality.audio.max_length
    return _CLIP_SECONDS * _RATE if longest is None else min(longest, _CLIP_SECONDS * _RATE)


def _speech(modality: Speech, samples: int) -> Inputs:
    length = _clip(modality)
    return Inputs(torch.randn(samples, length, generator=_generator()), "audio s", length / _RATE)


def _text(modality: Text, samples: int) -> Inputs:
    specials = modality.loaded_tokenizer.specials
    ordinary = torch.tensor([token for token in range(modality.vocabulary) if token not in specials])
    drawn = torch.randint(len(ordinary), (samples, modality.block), generator=_generator())
    return Inputs(ordinary[drawn], "tokens", modality.block)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


INPUTS: dict[str, Callable[[Any, int], Inputs]] = {"speech": _speech, "text": _text, "vision": _vision}


def micro_batch(experiment: Experiment) -> int:
    """Samples of one forward pass of a recipe."""
    train = experiment.train
    if train.micro_length is None:
        return train.micro_batch or train.batch
    modality = next(iter(experiment.modalities.values()))
    length = _clip(modality) if isinstance(modality, Speech) else modality.length_range[1] or 1
    return max(1, train.micro_length // length)
