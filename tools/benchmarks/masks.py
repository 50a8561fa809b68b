"""The speed of the vision maskers."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from benchmarks.result import Result
from torch import Tensor

from data2vec.core.modality import Masker
from data2vec.vision import BlockMasker, InverseBlockMasker
from data2vec.vision.masker import block_hidden, inverse_block_hidden
from data2vec.vision.masker_reference import block_mask_reference, inverse_block_mask_reference


def masks(arguments: argparse.Namespace) -> Result:
    """Time the vision maskers against a plain Python loop over samples and patches."""
    side, samples = arguments.grid, arguments.batch
    shape, total = (side, side), side * side
    ids = torch.arange(samples)
    block, inverse = BlockMasker(), InverseBlockMasker()
    visible = total - inverse_block_hidden(inverse.ratio, total)
    plain = {
        "block": partial(block_mask_reference, hidden=block_hidden(block.ratio, total)),
        "inverse_block": partial(inverse_block_mask_reference, visible=visible),
    }
    rows = []
    for kind, masker in (("block", BlockMasker), ("inverse_block", InverseBlockMasker)):
        for count in arguments.masks:
            vectorised = partial(_call, masker(masks=count), ids, shape)
            loop = partial(_loop, partial(plain[kind], shape), samples * count)
            ours, theirs = _compared(vectorised, loop, arguments.rounds)
            rows.append(
                {
                    "masker": kind,
                    "masks": count,
                    "vectorised_ms": 1e3 * ours,
                    "loop_ms": 1e3 * theirs,
                    "ratio": theirs / ours,
                }
            )
    columns = {
        "masker": "masker",
        "masks": "masks",
        "vectorised_ms": "vectorised ms",
        "loop_ms": "loop ms",
        "ratio": "ratio",
    }
    settings = {"batch": samples, "grid": side, "rounds": arguments.rounds}
    notes = ["loop: one mask and one patch after the other, a generator for each mask; medians, measured in turns"]
    return Result("masks", f"masks of {samples} samples, grid {side} x {side}", columns, rows, settings, notes)


def _call(masker: Masker, ids: Tensor, shape: tuple[int, int], update: int) -> None:
    masker(ids, shape, seed=0, update=update)


def _loop(make: Callable[[random.Random], object], count: int, seed: int) -> None:
    for number in range(count):
        make(random.Random(seed * count + number))


def _compared(ours: Callable[[int], object], theirs: Callable[[int], object], rounds: int) -> tuple[float, float]:
    """Median seconds of both; ours runs ten times in every round, the first round warms up."""
    fast: list[float] = []
    slow: list[float] = []
    for number in range(rounds + 1):
        calls = [_timed(ours, 10 * number + repetition) for repetition in range(10)]
        looped = _timed(theirs, number)
        if number:
            fast += calls
            slow.append(looped)
    return statistics.median(fast), statistics.median(slow)


def _timed(call: Callable[[int], object], argument: int) -> float:
    start = time.perf_counter()
    call(argument)
    return time.perf_counter() - start
