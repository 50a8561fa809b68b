"""The arithmetic of a training step, and the rate of the device."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from data2vec.core.task import Step, Task


def _attention(query: tuple[int, ...], key: tuple[int, ...], *rest: Any, **named: Any) -> int:
    """Two products of (B, H, T, D) shapes: scores, and their mean of the values."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * width


def _attention_backward(gradient: Any, query: tuple[int, ...], key: tuple[int, ...], *rest: Any, **named: Any) -> int:
    """Five products: the scores again, and the gradients of values, scores, queries and keys."""
    return 5 * _attention(query, key) // 2


# torch counts its GPU attention kernels, but not those of the CPU.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def step_flops(task: Task[Any], prepared: Any) -> int:
    """Floating-point operations of forward and backward on this batch, every pass included, a multiply-add being two.

    Counts matrix products, convolutions and attention, as is usual for MFU. Runs the step once, before any
    compilation, and leaves gradients, parameters and random states as they were.
    """
    gradients = {id(p): p.grad for p in task.parameters()}
    for parameter in task.parameters():
        parameter.grad = None  # else backward would add to it in place
    devices = {parameter.device for parameter in task.parameters() if parameter.device.type == "cuda"}
    with (
        torch.random.fork_rng(devices=list(devices)),
        FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter,
    ):
        step: Step = task(prepared)
        step.loss.backward()
    for parameter in task.parameters():
        parameter.grad = gradients[id(parameter)]
    return int(counter.get_total_flops())


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product: the practical limit that MFU compares with."""
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)  # not the global one: a resumed run would draw otherwise
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
