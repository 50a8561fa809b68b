"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on the linear layers of blocks, by way of peft."""

from __future__ import annotations

import importlib.util

from torch import nn

from data2vec.core.errors import ConfigError
from data2vec.core.settings.finetuning import AdapterConfig

_LAYERS = ["attention.qkv", "attention.proj", "feed_forward.fc1", "feed_forward.fc2"]
_BASE = ".base_layer."  # in the names of the weights under an adapter


def add_adapters(module: nn.Module, config: AdapterConfig) -> None:
    """Put adapters on the linear layers of every block of a module; nothing else of it learns from then on.

    Raises:
        ConfigError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            [f"adapters.rank={config.rank}: needs peft; install data2vec-core[lora], or set adapters.rank=0"]
        )
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    chosen = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=_LAYERS, bias="none"
    )
    inject_adapter_in_model(chosen, module)


def under_adapters(names: list[str], own: list[str]) -> dict[str, str]:
    """For each name of a state without adapters the name here, where adapters may stand on the layer."""
    below = {name.replace(_BASE, "."): name for name in own if _BASE in name}
    return {name: below.get(name, name) for name in names}


def is_adapter(name: str) -> bool:
    """Tell whether a parameter is an adapter's."""
    return ".lora_" in name
