"""Learning rate as a function of the update number."""

from __future__ import annotations

import math

from data2vec.core.settings.fields import OptimConfig, Schedule


def learning_rate(config: OptimConfig, update: int, updates: int) -> float:
    """The rate of update ``update`` (from 0) of ``updates``.

    Linear warm-up from ``start_lr_ratio``; then a half cosine, a straight line, or ``hold`` updates at the full rate
    and an exponential decay (linear where it ends at zero), to ``final_lr_ratio`` at the last update.
    """
    if update < config.warmup:
        start = config.start_lr_ratio
        return config.lr * (start + (1.0 - start) * (update + 1) / config.warmup)
    final = config.final_lr_ratio
    first = config.warmup + (config.hold if config.schedule is Schedule.TRI_STAGE else 0)
    if update < first:
        return config.lr
    progress = min((update - first) / max(updates - first, 1), 1.0)
    if config.schedule is Schedule.COSINE:
        return config.lr * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress)))
    if config.schedule is Schedule.LINEAR:
        return config.lr * (final + (1.0 - final) * (1.0 - progress))
    return config.lr * (math.exp(math.log(final) * progress) if final > 0.0 else 1.0 - progress)
