"""data2vec 1.0 and 2.0 in one model; which of them it is follows from settings alone.

Shapes: B samples, M masks of each, N = B * M rows, T positions, V visible, H hidden positions over all rows,
K layers, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from data2vec.core.batch import Batch
from data2vec.core.config import (
    Experiment,
    LayerOutput,
    LossConfig,
    StudentSees,
    TargetsConfig,
    TeacherConfig,
    TransformerConfig,
)
from data2vec.core.errors import CheckpointError
from data2vec.core.model.encoder import Encoded, Encoder, Frontend, Tokens
from data2vec.core.model.initialisation import truncated_normal_
from data2vec.core.model.mask import Mask
from data2vec.core.model.objective import regression_loss, spread
from data2vec.core.model.predictor import Predictor, build_predictor
from data2vec.core.model.resizing import resize
from data2vec.core.model.targets import make_targets
from data2vec.core.model.teacher import Teacher
from data2vec.core.model.transformer import Transformer, dropped_layers


@dataclass(frozen=True)
class Output:
    """``total``: the loss summed over hidden positions, ``count`` of them; ``losses``: its parts, each a mean.

    ``statistics`` (detached, over all ranks): ``target_spread``, ``prediction_spread``, ``extractor_spread``.
    """

    total: Tensor
    count: int
    losses: dict[str, Tensor]
    statistics: dict[str, Tensor]

    @property
    def loss(self) -> Tensor:
        """Mean over hidden positions."""
        return self.total / self.count


@dataclass(frozen=True)
class Features:
    """``x``: (B, T, D) without prefix tokens. ``shape``: their grid. ``padding``: (B, T) bool or None."""

    x: Tensor
    shape: tuple[int, ...]
    padding: Tensor | None

    def mean(self) -> Tensor:
        """(B, D), the mean over valid positions."""
        if self.padding is None:
            return self.x.mean(1)
        valid = (~self.padding).unsqueeze(-1).to(self.x.dtype)
        return (self.x * valid).sum(1) / valid.sum(1)


class MaskTokens(nn.Module):
    """The learned vectors that stand at hidden positions (1.0), by modality.

    Args:
        names: modalities that have one.
        width: D.
    """

    def __init__(self, names: Iterable[str], width: int) -> None:
        super().__init__()
        for name in names:
            token = nn.Parameter(torch.empty(width))
            truncated_normal_(token)
            self.register_parameter(name, token)

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def __len__(self) -> int:
        return len(self._parameters)

    def __getitem__(self, name: str) -> Tensor:
        return self.get_parameter(name)

    def forward(self, name: str, dtype: torch.dtype) -> Tensor:
        """(1, D): a call, because a sharded parameter is gathered for the module that is called."""
        return self[name].to(dtype).unsqueeze(0)


class Data2Vec(nn.Module):
    """Student, teacher and predictors of one or several modalities.

    Args:
        frontends: one for each modality.
        transformer: the Transformer they share.
        predictors: one for each modality.
        mask_tokens: modalities whose hidden positions are replaced by a learned vector (1.0).
        student_sees: all positions, or the visible ones only (2.0).
        teacher: decay and sharing.
        targets: which layers are averaged and how they are normalised.
        loss: the objective.
    """

    def __init__(
        self,
        frontends: Mapping[str, Frontend],
        transformer: Transformer,
        predictors: Mapping[str, Predictor],
        *,
        mask_tokens: frozenset[str],
        student_sees: StudentSees,
        teacher: TeacherConfig,
        targets: TargetsConfig,
        loss: LossConfig,
    ) -> None:
        super().__init__()
        self.student = Encoder(frontends, transformer)
        self.predictors = nn.ModuleDict(dict(predictors))
        self.mask_tokens = MaskTokens(sorted(mask_tokens), transformer.config.width)
        self.teacher = Teacher(self.student, teacher)
        self.student_sees = student_sees
        self.targets = targets
        self.loss = loss

    @classmethod
    def build(cls, experiment: Experiment) -> Self:
        """A freshly initialised model of an experiment; draws from torch's global generator."""
        modalities = experiment.modalities
        config: TransformerConfig = experiment.transformer
        sees_all = experiment.student_sees is StudentSees.ALL
        return cls(
            {name: modality.build_frontend(config) for name, modality in modalities.items()},
            Transformer(config),
            {name: build_predictor(config.width, modality.predictor_config) for name, modality in modalities.items()},
            mask_tokens=frozenset(name for name, m in modalities.items() if sees_all and m.uses_mask_token),
            student_sees=experiment.student_sees,
            teacher=experiment.teacher,
            targets=experiment.targets,
            loss=experiment.loss,
        )

    def forward(self, batch: Batch, mask: Mask, *, seed: int = 0, update: int = 0) -> Output:
        """The regression loss of one batch.

        Args:
            batch: B samples of one modality, on the model's device.
            mask: M masks for each, on the same device.
            seed: of the run; with ``update`` it decides which blocks layer drop skips, equally on every rank.
            update: number of the optimiser's next update.
        """
        name = batch.modality
        student_inputs = batch.inputs if batch.student_inputs is None else batch.student_inputs
        tokens: Tokens = self.student.frontend(name).extractor(student_inputs, batch.lengths)
        targets = self.make_targets(batch, tokens)
        encoded, padding = self.encode_masked(name, tokens, mask, seed=seed, update=update)
        prediction = self.predictors[name](encoded.positions, mask, tokens.shape, padding)
        hidden_targets = self._repeat(targets, mask.masks).flatten(0, 1).index_select(0, mask.positions)
        positions = regression_loss(prediction, hidden_targets, beta=self.loss.beta, scale=self.loss.scale)
        total = positions.sum()
        losses = {"regression": positions.detach().mean()}
        if self.loss.cls_weight:
            cls = self._cls_loss(encoded, targets, tokens.padding, mask.masks)
            total = total + cls * (self.loss.cls_weight * mask.count)
            losses["cls"] = cls.detach()
        statistics = {
            "target_spread": spread(hidden_targets),
            "prediction_spread": spread(prediction),
            "extractor_spread": spread(tokens.x.flatten(0, 1) if tokens.padding is None else tokens.x[~tokens.padding]),
        }
        return Output(total, mask.count, losses, statistics)

    def encode_masked(
        self, name: str, tokens: Tokens, mask: Mask, *, seed: int = 0, update: int = 0
    ) -> tuple[Encoded, Tensor | None]:
        """The student's view: (N, P + V, D) encoded, and the (N, T) padding of its rows."""
        padding = None if tokens.padding is None else self._repeat(tokens.padding, mask.masks)
        x, frontend = tokens.x, self.student.frontend(name)
        if mask.visible is None:
            token = self.mask_tokens(name, x.dtype) if name in self.mask_tokens else None
            x = self._repeat(x, mask.masks)
            if token is not None:
                if tokens.positions is not None:  # (1 or B, T, D): what is hidden is the content, not the place
                    token = token + self._repeat(tokens.positions, mask.masks if len(tokens.positions) > 1 else 1)
                x = torch.where(mask.hidden.flatten(0, 1).unsqueeze(-1), token, x)
        elif frontend.positions is not None:  # positions are computed from content: what is hidden must not leak
            x = self._repeat(x, mask.masks).masked_fill(mask.hidden.flatten(0, 1).unsqueeze(-1), 0.0)
        transformer = self.student.transformer
        rate = transformer.config.layer_drop if self.training else 0.0
        dropped = dropped_layers(rate, transformer.config.depth, seed=seed, update=update) if rate else None
        encoded: Encoded = self.student(
            name, x, tokens.shape, padding=padding, visible=mask.visible, filler=mask.filler, dropped=dropped
        )
        return encoded, padding

    @torch.no_grad()
    def teacher_layers(self, batch: Batch, tokens: Tokens | None = None) -> tuple[list[Tensor], Tokens]:
        """The teacher's last K layer outputs (B, T, D) of the unmasked input, lowest first, without prefix tokens.

        ``tokens`` are the student's features of the same batch: they are used where the recipe shares the extractor
        and both read the same input.
        """
        name = batch.modality
        shared = self.teacher.encoder.frontend(name).extractor is self.student.frontend(name).extractor
        if tokens is None or not shared or batch.student_inputs is not None:
            tokens = self.teacher.extract(name, batch.inputs, batch.lengths)
        encoded = self.teacher(
            name,
            tokens.x.detach(),
            tokens.shape,
            padding=tokens.padding,
            collect=self.targets.output,
            top_k=self.targets.top_k,
        )
        return [layer[:, encoded.prefix :] for layer in encoded.layers], tokens

    @torch.no_grad()
    def make_targets(self, batch: Batch, tokens: Tokens | None = None) -> Tensor:
        """(B, T, D) float32 targets at every position."""
        layers, tokens = self.teacher_layers(batch, tokens)
        return make_targets(
            layers, layer_norm=self.targets.layer_norm, mean_norm=self.targets.mean_norm, padding=tokens.padding
        )

    def _cls_loss(self, encoded: Encoded, targets: Tensor, padding: Tensor | None, masks: int) -> Tensor:
        """Regression of the mean target by the last prefix token (paper 2, section 3.1), averaged over rows.

        The released code sums over the rows of a GPU instead, so that its weight depends on the batch of a GPU.
        """
        mean = Features(targets, (), padding).mean()
        prediction = encoded.x[:, encoded.prefix - 1]
        loss = regression_loss(prediction, self._repeat(mean, masks), beta=self.loss.beta, scale=self.loss.scale)
        return loss.mean()

    @staticmethod
    def _repeat(x: Tensor, masks: int) -> Tensor:
        return x if masks == 1 else x.repeat_interleave(masks, 0)

    def own_state(self) -> dict[str, Tensor]:
        """The state without the teacher's second names for what it shares with the student."""
        state = self.state_dict()
        shared = self._shared_names(state)
        return {name: value for name, value in state.items() if name not in shared}

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        """Undo :meth:`own_state`, in place.

        Raises:
            CheckpointError: names or shapes that do not fit; the model is then unchanged.
        """
        self.check_state(state, {name: value.shape for name, value in self.own_state().items()})
        self.load_state_dict(dict(state), strict=False)

    @staticmethod
    def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
        """Check that a state has the names and shapes of a model's.

        Raises:
            CheckpointError: it has not; the first problems are named.
        """
        problems = [f"it has no {name}" for name in sorted(shapes.keys() - state.keys())]
        problems += [f"{name} has no place here" for name in sorted(state.keys() - shapes.keys())]
        for name in sorted(state.keys() & shapes.keys()):
            shape = tuple(state[name].shape)
            if shape != tuple(shapes[name]):
                problems.append(f"{name} is {shape} there and {tuple(shapes[name])} here")
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise CheckpointError("the saved weights do not fit this model: " + "; ".join(problems[:5]) + more)

    def start_from(self, state: Mapping[str, Tensor]) -> list[str]:
        """Take the student, predictors and mask tokens of another model's :meth:`own_state`, with a new teacher.

        Positions of inputs of another size are made to fit; returns a line on each.

        Raises:
            CheckpointError: names or shapes that do not fit; the model is then unchanged.
        """
        taken = {name: value for name, value in state.items() if not name.startswith("teacher.")}
        lines = []
        for name in self.student.frontends:
            taken, found = resize(self.student.frontend(name), taken, f"student.frontends.{name}.")
            lines += [f"{name}: {line}" for line in found]
        teacher = {name: value for name, value in self.own_state().items() if name.startswith("teacher.")}
        self.load_own_state(taken | teacher)
        self.teacher.restart(self.student)
        return lines

    @staticmethod
    def _shared_names(state: Mapping[str, Tensor]) -> set[str]:
        prefix = "teacher.encoder."
        return {
            name
            for name, value in state.items()
            if name.startswith(prefix) and value.data_ptr() == state["student." + name.removeprefix(prefix)].data_ptr()
        }

    def update_teacher(self, update: int) -> float:
        """Move the teacher after an applied optimiser update; returns the decay that was used."""
        return self.teacher.update(self.student, update)

    @torch.no_grad()
    def features(self, batch: Batch, *, layers: str | int = "top_k", of: str = "teacher") -> Features:
        """Representations of unmasked inputs.

        Args:
            batch: B samples on the model's device.
            layers: ``top_k`` (mean of the layer-normalised outputs of the last K blocks, as the method averages
                them), ``all`` (the same over every block), ``last`` (the Transformer's output), ``extractor`` (what
                comes before any block), or the number of one block from 1, whose output is returned as it is.
            of: ``teacher`` or ``student``.

        Raises:
            ValueError: no such layer or encoder.
        """
        if of not in ("teacher", "student"):
            raise ValueError(f"of={of!r}: choose teacher or student")
        encoder = self.teacher.encoder if of == "teacher" else self.student
        depth = encoder.transformer.config.depth
        if isinstance(layers, str) and layers.isdecimal():
            layers = int(layers)
        if layers not in ("top_k", "all", "last", "extractor") and not (
            isinstance(layers, int) and 1 <= layers <= depth
        ):
            raise ValueError(f"layers={layers!r}: choose top_k, all, last, extractor or a block from 1 to {depth}")
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            return self._features(encoder, batch, layers, depth)
        finally:
            for module in training:
                module.training = True

    def _features(self, encoder: Encoder, batch: Batch, layers: str | int, depth: int) -> Features:
        name = batch.modality
        tokens: Tokens = encoder.frontend(name).extractor(batch.inputs, batch.lengths)
        if layers == "extractor":
            return Features(tokens.x.float(), tokens.shape, tokens.padding)
        top_k = {"top_k": self.targets.top_k, "last": 1}.get(str(layers), depth)
        output = LayerOutput.BLOCK if isinstance(layers, int) else self.targets.output
        encoded = encoder(name, tokens.x, tokens.shape, padding=tokens.padding, collect=output, top_k=top_k)
        if layers == "last":
            x = encoded.positions.float()
        elif isinstance(layers, int):
            x = encoded.layers[layers - 1][:, encoded.prefix :].float()
        else:
            stacked = [layer[:, encoded.prefix :].float() for layer in encoded.layers]
            x = torch.stack([torch.nn.functional.layer_norm(layer, layer.shape[-1:]) for layer in stacked]).mean(0)
        return Features(x, tokens.shape, tokens.padding)
