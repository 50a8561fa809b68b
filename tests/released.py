"""Fine-tuned models as the authors' code wrote them: weights, and what that code computes from them.

``golden/finetuned/NAME.safetensors`` holds the weights of a checkpoint file, ``NAME.npz`` inputs and outputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from data2vec.core.testing import Golden

FOLDER = Path(__file__).parent / "golden" / "finetuned"


def released(name: str) -> tuple[Golden, dict[str, Tensor]]:
    """The values of a model, and its weights under their own names."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        values = {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files if key != "meta"}
        meta = json.loads(bytes(arrays["meta"]).decode())
    return Golden(values, meta), load_file(FOLDER / f"{name}.safetensors")


def loaded(task: Any, encoder: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> None:
    """Put an encoder's state (``student.``) and a head's into a task."""
    state = {name: value for name, value in encoder.items() if name.startswith("student.")}
    task.load_own_state({**task.own_state(), **head})
    assert task.start_from(state) == []
    task.eval()


def gradient_errors(task: nn.Module, golden: Golden, parts: Callable[[str], tuple[str, slice]]) -> dict[str, float]:
    """The relative error of each gradient norm; ``parts`` names our parameter and those of its rows that are meant."""
    gradients = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    errors = {}
    for name, norm in golden.under("grad_norm").items():
        ours, rows = parts(name)
        errors[name] = abs(float(gradients[ours][rows].norm()) - float(norm)) / max(float(norm), 1e-6)
    return errors
