"""data2vec 1.0 and 2.0 in training: one model, told apart by settings alone. A toy modality of short sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data2vec.core.batch import Batch
from data2vec.core.model.attention import AttentionBias
from data2vec.core.model.encoder import Extractor, Frontend, Positions, Tokens
from data2vec.core.model.mask import Mask
from data2vec.core.model.transformer import build_blocks
from data2vec.core.pretraining.data2vec import Data2Vec
from data2vec.core.pretraining.masked import Masked
from data2vec.core.settings.fields import LayerOutput, NormOrder, TransformerConfig
from data2vec.core.settings.pretraining import (
    Experiment,
    LossConfig,
    PredictorConfig,
    PredictorKind,
    StudentSees,
    TargetNorm,
    TargetsConfig,
    TeacherConfig,
    TeacherShares,
)
from data2vec.core.task import Step

WIDTH, INPUT, LENGTH = 12, 3, 10


class Frames(Extractor):
    """One linear layer over (B, T, F), a table of positions where asked for, padding from lengths."""

    def __init__(self, table: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(INPUT, WIDTH)
        self.table = nn.Parameter(torch.randn(1, LENGTH, WIDTH)) if table else None

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tokens:
        x, length = self.proj(inputs), inputs.shape[1]
        padding = None if lengths is None else torch.arange(length) >= lengths.unsqueeze(1)
        if self.table is None:
            return Tokens(x, (length,), padding)
        positions = self.table[:, :length]
        return Tokens(x + positions, (length,), padding, positions)

    def grid(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[tuple[int, ...], Tensor | None]:
        return (inputs.shape[1],), lengths


class Neighbours(Positions):
    """A convolution over the features, as speech computes its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 5, padding=2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        if padding is not None:
            x = x.masked_fill(padding.unsqueeze(-1), 0.0)
        out: Tensor = self.convolution(x.transpose(1, 2)).transpose(1, 2)
        return out


class Distance(AttentionBias):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1))

    def forward(self, shape: tuple[int, ...], *, prefix: int) -> Tensor:
        place = torch.arange(shape[0] + prefix)
        return (-self.slope * (place[:, None] - place).abs()).unsqueeze(0)


@dataclass(frozen=True)
class Toy:
    """What Data2Vec.build asks of a modality."""

    predictor_config: PredictorConfig
    uses_mask_token: bool = True
    table: bool = True
    neighbours: bool = False
    bias: bool = False
    prefix: int = 1
    blocks: int = 1

    def build_frontend(self, transformer: TransformerConfig) -> Frontend:
        return Frontend(
            Frames(self.table), width=WIDTH, positions=Neighbours() if self.neighbours else None,
            bias=Distance() if self.bias else None, prefix_tokens=self.prefix, input_norm=nn.LayerNorm(WIDTH),
            blocks=build_blocks(transformer, self.blocks),
        )  # fmt: skip


TRANSFORMER = TransformerConfig(depth=3, width=WIDTH, heads=3, mlp_ratio=2.0)
VERSION1 = Experiment(
    modalities={"toy": Toy(PredictorConfig(kind=PredictorKind.MLP, layers=2))},
    transformer=TRANSFORMER,
    teacher=TeacherConfig(shares=TeacherShares.EXTRACTOR),
    targets=TargetsConfig(2, LayerOutput.FEED_FORWARD, TargetNorm.INSTANCE, TargetNorm.NONE),
    loss=LossConfig(beta=1.0),
)
VERSION2 = Experiment(
    modalities={"toy": Toy(PredictorConfig(kind=PredictorKind.CONV1D, layers=2, groups=2, mask_noise=0.0))},
    student_sees=StudentSees.VISIBLE,
    transformer=replace(TRANSFORMER, norm_order=NormOrder.POST),
    teacher=TeacherConfig(shares=TeacherShares.NOTHING),
    targets=TargetsConfig(2, LayerOutput.FEED_FORWARD, TargetNorm.INSTANCE, TargetNorm.LAYER),
)
VERSIONS = pytest.mark.parametrize("experiment", [VERSION1, VERSION2], ids=["1.0", "2.0"])


def build(experiment: Experiment, **toy: object) -> Data2Vec:
    """A model whose teacher is no longer its student, and none of whose parameters is close to 0 or 1."""
    modality = replace(experiment.modalities["toy"], **toy)
    torch.manual_seed(0)
    model = Data2Vec.build(replace(experiment, modalities={"toy": modality}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch_of(inputs: Tensor, lengths: list[int] | None = None) -> Batch:
    count = len(inputs)
    valid = None if lengths is None else torch.tensor(lengths)
    return Batch("toy", inputs, torch.arange(count), torch.full((count,), -1), lengths=valid)


def masks_for(experiment: Experiment, samples: int, masks: int, *, length: int = LENGTH, count: int = 4) -> Mask:
    hidden = torch.rand(samples, masks, LENGTH).argsort(-1) < count
    if length < LENGTH:  # hidden within the shortest sample only
        hidden = torch.zeros(samples, masks, LENGTH, dtype=torch.bool)
        hidden[..., :length] = torch.rand(samples, masks, length).argsort(-1) < count
    return Mask.of(hidden, visible_only=experiment.student_sees is StudentSees.VISIBLE)


def predict(model: Data2Vec, batch: Batch, mask: Mask) -> Tensor:
    tokens = model.student.frontend("toy").extractor(batch.inputs, batch.lengths)
    encoded, rows = model.encode_masked("toy", tokens, mask)
    out: Tensor = model.predictors["toy"](encoded.positions, mask, tokens.shape, rows.padding)
    return out


@VERSIONS
@pytest.mark.parametrize("shares", list(TeacherShares))
@pytest.mark.parametrize("neighbours", [False, True])
def test_every_parameter_of_student_and_predictor_learns(
    experiment: Experiment, shares: TeacherShares, neighbours: bool
) -> None:
    model = build(replace(experiment, teacher=TeacherConfig(shares=shares)), neighbours=neighbours, bias=True)
    batch, mask = batch_of(torch.randn(3, LENGTH, INPUT)), masks_for(experiment, 3, 2)
    output = model(Masked(batch, mask))
    assert output.count == 3 * 2 * 4
    torch.testing.assert_close(output.losses["regression"], output.loss.detach())
    output.loss.backward()
    learning = dict(model.student.named_parameters()) | dict(model.predictors.named_parameters())
    learning |= dict(model.mask_tokens.named_parameters())
    assert ("toy" in model.mask_tokens) == (experiment is VERSION1)
    for name, parameter in learning.items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert float(parameter.grad.abs().max()) > 1e-7, name
    for name, value, _ in model.teacher.averaged(model.student):
        assert value.grad is None, name


@VERSIONS
def test_many_masks_equal_as_many_passes_of_one(experiment: Experiment) -> None:
    model = build(experiment, neighbours=True, bias=True)
    batch, mask = batch_of(torch.randn(3, LENGTH, INPUT)), masks_for(experiment, 3, 4)
    together = model(Masked(batch, mask))
    visible_only = mask.visible is not None
    alone = [
        model(Masked(batch, Mask.of(mask.hidden[:, number : number + 1], visible_only=visible_only)))
        for number in range(4)
    ]
    torch.testing.assert_close(together.loss, torch.stack([output.loss for output in alone]).mean())
    torch.testing.assert_close(together.total, torch.stack([output.total for output in alone]).sum())


@VERSIONS
@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_what_is_hidden_does_not_reach_the_student(experiment: Experiment, neighbours: bool, table: bool) -> None:
    model = build(experiment, neighbours=neighbours, table=table, bias=True)
    hidden = torch.rand(3, 1, LENGTH).argsort(-1) < 4
    mask = Mask.of(hidden.expand(3, 2, LENGTH).contiguous(), visible_only=experiment is VERSION2)
    inputs = torch.randn(3, LENGTH, INPUT)
    changed = torch.where(hidden[:, 0, :, None], torch.randn_like(inputs) * 9, inputs)
    before = predict(model, batch_of(inputs), mask)
    torch.testing.assert_close(predict(model, batch_of(changed), mask), before, rtol=1e-5, atol=1e-6)
    seen = torch.where(hidden[:, 0, :, None], inputs, inputs + 1)
    assert not torch.allclose(predict(model, batch_of(seen), mask), before, atol=1e-3)
    assert not torch.allclose(model.make_targets(batch_of(changed)), model.make_targets(batch_of(inputs)), atol=1e-3)


@VERSIONS
@settings(max_examples=10)
@given(lengths=st.lists(st.integers(5, LENGTH), min_size=2, max_size=4), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("neighbours", [False, True])
def test_a_padded_batch_equals_its_samples_one_by_one(
    experiment: Experiment, neighbours: bool, lengths: list[int], seed: int
) -> None:
    model = build(experiment, neighbours=neighbours, bias=True)
    torch.manual_seed(seed)
    inputs = torch.randn(len(lengths), LENGTH, INPUT)
    batch = batch_of(inputs, lengths)
    mask = masks_for(experiment, len(lengths), 2, length=5, count=3)
    together, features = model(Masked(batch, mask)), model.features(batch)
    assert features.padding is not None
    outputs: list[Step] = []
    for sample, length in enumerate(lengths):
        alone = batch_of(inputs[sample : sample + 1, :length])
        hidden = mask.hidden[sample : sample + 1, :, :length]
        outputs.append(model(Masked(alone, Mask.of(hidden, visible_only=mask.visible is not None))))
        single = model.features(alone)
        torch.testing.assert_close(features.x[sample, :length], single.x[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(features.mean()[sample], single.mean()[0], rtol=1e-3, atol=1e-4)
        assert int((~features.padding[sample]).sum()) == length
    assert together.count == sum(output.count for output in outputs)
    torch.testing.assert_close(together.total, torch.stack([o.total for o in outputs]).sum(), rtol=1e-3, atol=1e-4)


@VERSIONS
def test_accumulated_batches_equal_one(experiment: Experiment) -> None:
    """Sum of totals over sum of counts, for parts of any size; gradients too."""
    model = build(experiment)
    inputs, mask = torch.randn(5, LENGTH, INPUT), masks_for(experiment, 5, 2)
    whole = model(Masked(batch_of(inputs), mask))
    whole.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total, count = 0.0, 0
    for part in (slice(0, 1), slice(1, 5)):
        output = model(
            Masked(batch_of(inputs[part]), Mask.of(mask.hidden[part], visible_only=mask.visible is not None))
        )
        (output.total / whole.count).backward()
        total, count = total + float(output.total.detach()), count + output.count
    assert count == whole.count
    assert total / count == pytest.approx(float(whole.loss.detach()), rel=1e-5)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


def test_a_mask_token_keeps_its_position() -> None:
    """Two hidden positions of an input that is the same everywhere: only Tokens.positions can tell them apart."""
    hidden = torch.zeros(1, 2, LENGTH, dtype=torch.bool)
    hidden[..., [2, 7]] = True
    mask, batch = Mask.of(hidden, visible_only=False), batch_of(torch.ones(1, LENGTH, INPUT))
    first, second, *_ = predict(build(VERSION1), batch, mask)
    assert not torch.allclose(first, second, atol=1e-2)
    first, second, *_ = predict(build(VERSION1, table=False), batch, mask)
    torch.testing.assert_close(first, second)


def test_positions_may_differ_between_samples() -> None:
    """(B, T, D) positions reach the M rows of their own sample."""
    model = build(VERSION1)
    tokens = model.student.frontend("toy").extractor(torch.randn(2, LENGTH, INPUT))
    assert tokens.positions is not None
    mask = masks_for(VERSION1, 2, 3)
    one, _ = model.encode_masked("toy", tokens, mask)
    both, _ = model.encode_masked("toy", replace(tokens, positions=tokens.positions.expand(2, -1, -1)), mask)
    torch.testing.assert_close(both.x, one.x)
    other = torch.cat([tokens.positions, tokens.positions.flip(1)])
    differs, _ = model.encode_masked("toy", replace(tokens, positions=other), mask)
    torch.testing.assert_close(differs.x[:3], one.x[:3])
    assert not torch.allclose(differs.x[3:], one.x[3:], atol=1e-2)


def test_student_inputs_are_for_the_student_alone() -> None:
    model = build(VERSION1, uses_mask_token=False)
    assert len(model.mask_tokens) == 0
    batch, mask = batch_of(torch.randn(2, LENGTH, INPUT)), masks_for(VERSION1, 2, 1)
    corrupted = replace(batch, student_inputs=batch.inputs + 1)
    tokens = model.student.frontend("toy").extractor(corrupted.student_inputs)
    torch.testing.assert_close(model.make_targets(corrupted, tokens), model.make_targets(batch))
    output, plain = model(Masked(corrupted, mask)), model(Masked(batch, mask))
    torch.testing.assert_close(output.moments["target_spread"].spread(), plain.moments["target_spread"].spread())
    assert not torch.allclose(output.loss, plain.loss)


@VERSIONS
def test_the_cls_token_regresses_the_mean_target(experiment: Experiment) -> None:
    model = build(replace(experiment, loss=LossConfig(cls_weight=0.25)))
    batch, mask = batch_of(torch.randn(3, LENGTH, INPUT)), masks_for(experiment, 3, 2)
    output = model(Masked(batch, mask))
    encoded, _ = model.encode_masked("toy", model.student.frontend("toy").extractor(batch.inputs), mask)
    mean = model.make_targets(batch).mean(1).repeat_interleave(2, 0)
    expected = (encoded.x[:, 0] - mean).square().sum(-1).mean() / WIDTH**0.5
    torch.testing.assert_close(output.losses["cls"], expected.detach())
    torch.testing.assert_close(output.loss, output.losses["regression"] + 0.25 * expected)


def test_layer_drop_follows_seed_and_update_and_only_in_training() -> None:
    model = build(replace(VERSION1, transformer=replace(TRANSFORMER, layer_drop=0.5)))
    batch, mask = batch_of(torch.randn(2, LENGTH, INPUT)), masks_for(VERSION1, 2, 1)

    def losses() -> list[float]:
        return [
            round(float(model(Masked(batch, mask), seed=3, update=update).loss.detach()), 5) for update in range(12)
        ]

    training = losses()
    assert training == losses()
    assert len(set(training)) > 2
    model.eval()
    assert len(set(losses())) == 1


@VERSIONS
def test_bf16_autocast_keeps_targets_and_loss_in_fp32(experiment: Experiment) -> None:
    model = build(experiment, neighbours=True, bias=True)
    batch, mask = batch_of(torch.randn(4, LENGTH, INPUT), [10, 8, 7, 10]), masks_for(experiment, 4, 3, length=7)
    exact = model(Masked(batch, mask))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(Masked(batch, mask))
        assert predict(model, batch, mask).dtype == torch.bfloat16
        assert model.make_targets(batch).dtype == torch.float32
    assert output.total.dtype == torch.float32
    output.loss.backward()
    assert float(output.loss.detach()) == pytest.approx(float(exact.loss.detach()), rel=0.1)
    assert all(
        p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all())
        for p in model.parameters()
        if p.grad is not None
    )
