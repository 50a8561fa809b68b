"""The device on which a rank computes."""

from __future__ import annotations

import torch

from data2vec.core.distributed.launchers import place
from data2vec.core.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """``auto`` is this rank's GPU where there is one.

    Raises:
        ConfigError: no such device here.
    """
    local_rank = place().local_rank
    if name == "auto":
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError([f"train.device={name}: not usable here ({first}); choose auto or cpu"]) from None
    return device
