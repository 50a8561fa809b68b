"""A pretrained encoder under a head: how its parts learn, and where its weights come from.

Shapes: B samples, T positions, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from data2vec.core.errors import CheckpointError, ConfigError
from data2vec.core.finetuning.adapters import add_adapters, is_adapter, under_adapters
from data2vec.core.model.encoder import Backbone, Encoder
from data2vec.core.model.resizing import resize
from data2vec.core.model.transformer import Transformer, dropped_layers
from data2vec.core.settings.fields import OptimConfig
from data2vec.core.settings.finetuning import AdapterConfig, FineTuning, Freeze, Weights
from data2vec.core.task import Group, Prepared, Task

P = TypeVar("P", bound=Prepared)
_STUDENT, _TEACHER, _TUNED = "student.", "teacher.encoder.", "backbone.encoder."


@dataclass(frozen=True)
class Learning:
    """The way in which the parts of an encoder learn; see :class:`data2vec.core.settings.finetuning.FineTuning`."""

    weights: Weights = Weights.STUDENT
    freeze: Freeze = Freeze.NONE
    freeze_layers: int = 0
    freeze_updates: int = 0
    layer_decay: float = 1.0
    layer_decay_embeddings: bool = True
    adapters: AdapterConfig = field(default_factory=AdapterConfig)

    @classmethod
    def of(cls, recipe: FineTuning) -> Learning:
        """The settings of a recipe."""
        return cls(
            recipe.weights, recipe.freeze, recipe.freeze_layers, recipe.freeze_updates, recipe.layer_decay,
            recipe.layer_decay_embeddings, recipe.adapters,
        )  # fmt: skip


class FineTuned(Task[P], Generic[P]):
    """A backbone whose last layers are a head's, which a subclass adds.

    Args:
        backbone: the encoder of one modality.
        learning: which parts learn, when, and how fast.

    Raises:
        ConfigError: more layers are to be frozen than there are.
    """

    def __init__(self, backbone: Backbone, learning: Learning | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.learning = learning or Learning()
        self._freeze()
        if self.learning.adapters.rank:
            add_adapters(self.backbone, self.learning.adapters)

    @staticmethod
    def build_backbone(recipe: FineTuning) -> Backbone:
        """A freshly initialised encoder; draws from torch's global generator."""
        ((name, modality),) = recipe.modalities.items()
        config = recipe.transformer
        return Encoder({name: modality.build_frontend(config)}, Transformer(config)).single(name)

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks from the lowest to the highest: the modality's own, then the shared ones."""
        encoder = self.backbone.encoder
        return [*encoder.frontend(self.backbone.modality).blocks, *encoder.transformer.blocks]

    def _freeze(self) -> None:
        learning, blocks = self.learning, self.layers
        frontend = self.backbone.encoder.frontend(self.backbone.modality)
        frozen: list[nn.Parameter] = []
        if learning.freeze is Freeze.ALL:
            frozen = list(self.backbone.parameters())
        elif learning.freeze is Freeze.EXTRACTOR:
            frozen = list(frontend.extractor.features.parameters())
        elif learning.freeze is Freeze.LAYERS:
            if learning.freeze_layers > len(blocks):
                raise ConfigError(
                    [f"freeze_layers={learning.freeze_layers}: there are {len(blocks)} blocks; choose at most that"]
                )
            above = {id(p) for block in blocks[learning.freeze_layers :] for p in block.parameters()}
            below = [frontend, *blocks[: learning.freeze_layers]]
            frozen = [p for module in below for p in module.parameters() if id(p) not in above]
        for parameter in frozen:
            parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """A backbone that never learns stays in evaluation mode: nothing of it is dropped."""
        super().train(mode)
        if self.learning.freeze is Freeze.ALL:
            self.backbone.eval()
        return self

    def encoding(self, update: int) -> contextlib.AbstractContextManager[object]:
        """The context of the backbone's forward pass: without gradients where it does not learn in this update."""
        still = self.learning.freeze is Freeze.ALL or (self.training and update < self.learning.freeze_updates)
        return torch.no_grad() if still else contextlib.nullcontext()

    def dropped(self, seed: int, update: int) -> Sequence[bool] | None:
        """For each shared block whether layer drop skips it in this update; None for none."""
        config = self.backbone.encoder.transformer.config
        rate = config.layer_drop if self.backbone.training else 0.0
        return dropped_layers(rate, config.depth, seed=seed, update=update) if rate else None

    def groups(self, optim: OptimConfig) -> list[Group]:
        """Trained parameters by the height at which they stand, those that decay apart from those that do not.

        The rate of block i of N (from 0) is ``layer_decay ** (N - i)`` of the head's, that of what is below the blocks
        ``layer_decay ** (N + 1)`` (BEiT, Bao et al. 2021); the attention bias learns like the head.
        """
        scales, decay = self._scales(), self.learning.layer_decay
        encoder = {id(p) for p in self.backbone.parameters()}
        found: dict[tuple[float, float, int], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            # The released code of 2.0, which leaves the rates below the blocks alone, lets the CLS token decay.
            still = name.endswith(".prefix") and self.learning.layer_decay_embeddings
            vector = still or (parameter.squeeze().ndim < 2 and not name.endswith(".prefix"))
            starts = self.learning.freeze_updates if id(parameter) in encoder else 0
            key = (0.0 if vector else optim.weight_decay, decay ** scales.get(id(parameter), 0), starts)
            found.setdefault(key, []).append(parameter)
        return [Group(tuple(own), weight_decay, scale, starts) for (weight_decay, scale, starts), own in found.items()]

    def _scales(self) -> dict[int, int]:
        """Count how often the rate of each parameter (by identity) is multiplied by the layer decay."""
        blocks = self.layers
        frontend = self.backbone.encoder.frontend(self.backbone.modality)
        below = len(blocks) + 1 if self.learning.layer_decay_embeddings else 0
        scales = {id(p): below for p in frontend.parameters()}
        scales |= {id(p): len(blocks) - number for number, block in enumerate(blocks) for p in block.parameters()}
        if frontend.bias is not None:
            scales |= {id(p): 0 for p in frontend.bias.parameters()}
        return scales

    def blocks(self) -> Iterable[nn.Module]:
        """The backbone's blocks."""
        return self.layers

    def encoders(self) -> Mapping[str, Encoder]:
        """The backbone's encoder."""
        return {"fine-tuned": self.backbone.encoder}

    def start_from(self, state: Mapping[str, Tensor]) -> list[str]:
        """Take the encoder of a pretraining run, or of another fine-tuned one; the head stays as it is.

        Raises:
            CheckpointError: names or shapes that do not fit; the task is then unchanged.
        """
        name = self.backbone.modality
        found = self._encoder_of(state)
        wanted = {key: value for key, value in self.own_state().items() if key.startswith(_TUNED)}
        places = under_adapters([f"{_TUNED}{key}" for key in found], list(wanted))
        own = {places[f"{_TUNED}{key}"]: value for key, value in found.items() if self._is_own(key)}
        if isinstance(self.backbone.encoder.transformer.norm, nn.Identity):  # the head has a norm of its own
            own = {key: value for key, value in own.items() if not key.startswith(f"{_TUNED}transformer.norm.")}
        frontend = self.backbone.encoder.frontend(name)
        own, lines = resize(frontend, own, f"{_TUNED}frontends.{name}.")
        fresh = {key: value for key, value in self.own_state().items() if key not in wanted or is_adapter(key)}
        self.load_own_state(own | fresh)
        return [f"{name}: {line}" for line in lines]

    def _is_own(self, key: str) -> bool:
        """Tell whether a part of an encoder's state is of this modality, or shared."""
        return not key.startswith("frontends.") or key.split(".")[1] == self.backbone.modality

    def _encoder_of(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state of the wanted encoder in another task's.

        Raises:
            CheckpointError: there is none.
        """

        def part(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}

        found = part(_TUNED) or part(_STUDENT)
        if not found:
            raise CheckpointError("the saved weights hold no encoder; choose a run of pretraining or of fine-tuning")
        if self.learning.weights is Weights.TEACHER:
            teacher = part(_TEACHER)
            if not teacher:
                raise CheckpointError("weights=teacher: the saved weights hold no teacher; choose weights=student")
            found |= teacher  # what the teacher shares with the student stands under the student's names alone
        return found
