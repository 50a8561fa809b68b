"""data2vec 1.0 and 2.0 in one model; which of them it is follows from settings alone.

Shapes: B samples, M masks of each, N = B * M rows, T positions, V visible, H hidden positions over all rows,
K layers, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from data2vec.core.batch import Batch
from data2vec.core.evaluation.rank import effective_rank
from data2vec.core.modality import Masker, Modality
from data2vec.core.model.encoder import Collect, Encoded, Encoder, Features, Frontend, Tokens, View, mean_over_valid
from data2vec.core.model.initialisation import truncated_normal_
from data2vec.core.model.mask import Mask
from data2vec.core.model.resizing import resize
from data2vec.core.model.transformer import Transformer, dropped_layers
from data2vec.core.pretraining.masked import Masked
from data2vec.core.pretraining.objective import regression_loss
from data2vec.core.pretraining.predictor import Predictor, build_predictor
from data2vec.core.pretraining.targets import make_targets
from data2vec.core.pretraining.teacher import Teacher, decay
from data2vec.core.settings.fields import TrainConfig, TransformerConfig
from data2vec.core.settings.pretraining import Experiment, LossConfig, StudentSees, TargetsConfig, TeacherConfig
from data2vec.core.task import LOSS, Moments, Move, Step, Task, Vital, lerp

_RANK_SAMPLES, _RANK_VECTORS = 64, 1024  # whose teacher features show whether they span few directions
_LOWER_RATE = "lower optim.lr, raise optim.warmup, or clip gradients (optim.clip=1.0)"


def vitals(train: TrainConfig) -> tuple[Vital, ...]:
    """List what pretraining is judged by: the student's features, the targets, the predictions and the loss."""
    return (
        Vital("extractor_spread", "extractor", _LOWER_RATE),
        Vital(
            "target_spread", "teacher",
            "raise teacher.decay_start and teacher.decay_end, lower optim.lr, or raise optim.warmup",
            train.min_target_spread, "targets",
        ),
        Vital(
            "prediction_spread", "prediction",
            "lower optim.lr, raise optim.warmup, or mask less in longer or larger pieces",
            train.min_prediction_spread, "predictions", starts_flat=True,
        ),
        LOSS,
    )  # fmt: skip


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


class Data2Vec(Task[Masked]):
    """Pretraining: student, teacher and predictors of one or several modalities.

    Args:
        frontends: one for each modality.
        transformer: the Transformer they share.
        predictors: one for each modality.
        mask_tokens: modalities whose hidden positions are replaced by a learned vector (1.0).
        student_sees: all positions, or the visible ones only (2.0).
        teacher: decay and sharing.
        targets: which layers are averaged and how they are normalised.
        loss: the objective.
        train: what the run is judged by.
        modalities: their settings, which make masks; needed to :meth:`prepare` batches.
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
        train: TrainConfig | None = None,
        modalities: Mapping[str, Modality] | None = None,
    ) -> None:
        super().__init__()
        self.student = Encoder(frontends, transformer, Collect(targets.output, targets.top_k))
        self.predictors = nn.ModuleDict(dict(predictors))
        self.mask_tokens = MaskTokens(sorted(mask_tokens), transformer.config.width)
        self.teacher = Teacher(self.student, teacher)
        self.student_sees = student_sees
        self.targets = targets
        self.loss = loss
        self.modalities = dict(modalities or {})
        self._maskers: dict[str, Masker] = {}
        self._vitals = vitals(train or TrainConfig())

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
            train=experiment.train,
            modalities=modalities,
        )

    def prepare(self, batch: Batch, *, seed: int, update: int) -> Masked:
        """Make the masks of a batch, on the CPU."""
        name = batch.modality
        modality = self.modalities[name]
        if name not in self._maskers:
            self._maskers[name] = modality.build_masker()
        return Masked.of(
            batch, modality, self._maskers[name], self.student.frontend(name).extractor,
            visible_only=self.student_sees is StudentSees.VISIBLE, seed=seed, update=update,
        )  # fmt: skip

    def forward(self, prepared: Masked, *, seed: int = 0, update: int = 0) -> Step:
        """The regression loss of one batch.

        Args:
            prepared: B samples of one modality and M masks for each, on the model's device.
            seed: of the run; with ``update`` it decides which blocks layer drop skips, equally on every rank.
            update: number of the optimiser's next update.
        """
        batch, mask = prepared.batch, prepared.mask
        name = batch.modality
        read = batch.inputs if batch.student_inputs is None else batch.student_inputs
        tokens = self.student.extract(name, read, batch.lengths)
        targets = self.make_targets(batch, tokens)
        encoded, rows = self.encode_masked(name, tokens, mask, seed=seed, update=update)
        prediction = self.predictors[name](encoded.positions, mask, tokens.shape, rows.padding)
        hidden_targets = _repeat(targets, mask.masks).flatten(0, 1).index_select(0, mask.positions)
        positions = regression_loss(prediction, hidden_targets, beta=self.loss.beta, scale=self.loss.scale)
        total = positions.sum()
        losses = {"regression": positions.detach().mean()}
        if self.loss.cls_weight:
            cls = self._cls_loss(encoded, targets, tokens.padding, mask.masks)
            total = total + cls * (self.loss.cls_weight * mask.count)
            losses["cls"] = cls.detach()
        valid = tokens.x.flatten(0, 1) if tokens.padding is None else tokens.x[~tokens.padding]
        moments = {
            "target_spread": Moments.of(hidden_targets),
            "prediction_spread": Moments.of(prediction),
            "extractor_spread": Moments.of(valid),
        }
        return Step(total, mask.count, losses, moments)

    def encode_masked(
        self, name: str, tokens: Tokens, mask: Mask, *, seed: int = 0, update: int = 0
    ) -> tuple[Encoded, Tokens]:
        """The student's view: (N, P + V, D) encoded, and the N rows of tokens that it was given."""
        padding = None if tokens.padding is None else _repeat(tokens.padding, mask.masks)
        x, frontend = tokens.x, self.student.frontend(name)
        if mask.visible is None:
            token = self.mask_tokens(name, x.dtype) if name in self.mask_tokens else None
            x = _repeat(x, mask.masks)
            if token is not None:
                if tokens.positions is not None:  # (1 or B, T, D): what is hidden is the content, not the place
                    token = token + _repeat(tokens.positions, mask.masks if len(tokens.positions) > 1 else 1)
                x = torch.where(mask.hidden.flatten(0, 1).unsqueeze(-1), token, x)
        elif frontend.positions is not None:  # positions are computed from content: what is hidden must not leak
            x = _repeat(x, mask.masks).masked_fill(mask.hidden.flatten(0, 1).unsqueeze(-1), 0.0)
        transformer = self.student.transformer
        rate = transformer.config.layer_drop if self.training else 0.0
        dropped = dropped_layers(rate, transformer.config.depth, seed=seed, update=update) if rate else None
        rows = Tokens(x, tokens.shape, padding)
        view = None if mask.visible is None else View(mask.visible, mask.filler)
        return self.student.encode(name, rows, view, dropped=dropped), rows

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
        whole = Tokens(tokens.x.detach(), tokens.shape, tokens.padding)
        return self.teacher.encode(name, whole, collect=self.student.average).layer_positions, tokens

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
        mean = mean_over_valid(targets, padding)
        prediction = encoded.x[:, encoded.prefix - 1]
        loss = regression_loss(prediction, _repeat(mean, masks), beta=self.loss.beta, scale=self.loss.scale)
        return loss.mean()

    def followers(self) -> list[tuple[str, Tensor, Tensor]]:
        """Pair what the teacher averages with what it follows."""
        return self.teacher.averaged(self.student)

    def after_step(self, update: int, move: Move = lerp) -> None:
        """Move the teacher after an applied update."""
        self.teacher.update(self.student, update, move)

    def known(self, update: int) -> dict[str, float]:
        """The teacher's decay."""
        return {"teacher_decay": decay(self.teacher.config, update)}

    def inspect(self, prepared: Masked) -> dict[str, float]:
        """The effective rank of the teacher's position vectors of a few samples."""
        features = self.features(prepared.batch.first(_RANK_SAMPLES)).x.flatten(0, 1)
        chosen = torch.randperm(len(features), generator=torch.Generator())[:_RANK_VECTORS]
        return {"teacher_rank": float(effective_rank(features[chosen].cpu()))}

    def blocks(self) -> Iterable[nn.Module]:
        """The blocks of student and teacher, each once."""
        encoders = (self.student, self.teacher.encoder)
        stacks = [
            stack
            for encoder in encoders
            for stack in (encoder.transformer.blocks, *(encoder.frontend(name).blocks for name in encoder.frontends))
        ]
        return {id(block): block for stack in stacks for block in stack}.values()

    def encoders(self) -> Mapping[str, Encoder]:
        """The teacher, whose features are the better ones, and the student."""
        return {"teacher": self.teacher.encoder, "student": self.student}

    def vitals(self) -> Sequence[Vital]:
        """The spreads of the student's features, of targets and predictions, and the loss."""
        return self._vitals

    def own_state(self) -> dict[str, Tensor]:
        """The state without the teacher's second names for what it shares with the student."""
        state = self.state_dict()
        shared = self._shared_names(state)
        return {name: value for name, value in state.items() if name not in shared}

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

    @torch.no_grad()
    def features(self, batch: Batch, *, layers: str | int = "top_k", of: str = "teacher") -> Features:
        """Representations of unmasked inputs.

        Args:
            batch: B samples on the model's device.
            layers: see :meth:`data2vec.core.model.encoder.Encoder.features`.
            of: ``teacher`` or ``student``.

        Raises:
            ValueError: no such layer or encoder.
        """
        encoders = self.encoders()
        if of not in encoders:
            raise ValueError(f"of={of!r}: choose {' or '.join(encoders)}")
        return encoders[of].features(batch.modality, batch.inputs, batch.lengths, layers=layers)


def _repeat(x: Tensor, masks: int) -> Tensor:
    return x if masks == 1 else x.repeat_interleave(masks, 0)
