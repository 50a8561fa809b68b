"""The teacher: its average, its schedule, what it shares, and that nothing else ever moves it."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data2vec.core.model.attention import AttentionBias
from data2vec.core.model.encoder import Encoder, Extractor, Frontend, Positions, Tokens
from data2vec.core.model.transformer import Transformer, build_blocks
from data2vec.core.pretraining.teacher import Teacher, decay
from data2vec.core.settings.fields import TransformerConfig
from data2vec.core.settings.pretraining import TeacherConfig, TeacherShares

TINY = TransformerConfig(depth=2, width=8, heads=2, mlp_ratio=1.0, dropout=0.3)


class Frames(Extractor):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 8)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tokens:
        return Tokens(self.dropout(self.proj(inputs)) * self.scale, (inputs.shape[1],))

    def grid(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[tuple[int, ...], Tensor | None]:
        return (inputs.shape[1],), None


class Scaled(Positions):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.dropout(self.linear(x))


class Distance(AttentionBias):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, shape: tuple[int, ...], *, prefix: int) -> Tensor:
        place = torch.arange(shape[0] + prefix)
        return (-self.slope * (place[:, None] - place).abs()).unsqueeze(0)


def student() -> Encoder:
    torch.manual_seed(0)
    frontend = Frontend(
        Frames(), width=8, positions=Scaled(), bias=Distance(), prefix_tokens=1, input_norm=nn.LayerNorm(8),
        dropout=0.5, blocks=build_blocks(TINY, 1),
    )  # fmt: skip
    return Encoder({"toy": frontend}, Transformer(TINY))


def move(encoder: Encoder, seed: int) -> None:
    """As an optimiser would: every parameter becomes another one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def constant(tau: float, shares: TeacherShares = TeacherShares.NOTHING) -> TeacherConfig:
    return TeacherConfig(tau, tau, 0, shares)


@settings(max_examples=40)
@given(st.floats(0.0, 1.0), st.integers(0, 2**31), st.sampled_from(TeacherShares))
def test_an_update_is_a_convex_combination(tau: float, seed: int, shares: TeacherShares) -> None:
    encoder = student()
    teacher = Teacher(encoder, constant(tau, shares))
    move(encoder, seed)
    before, theirs = snapshot(teacher.encoder), snapshot(encoder)
    teacher.update(encoder, 5)
    averaged = {name for name, _, _ in teacher.averaged(encoder)}
    for name, value in teacher.encoder.state_dict().items():
        low, high = torch.minimum(before[name], theirs[name]), torch.maximum(before[name], theirs[name])
        assert bool(((value >= low - 1e-5) & (value <= high + 1e-5)).all()), name
        if name in averaged:
            expected = tau * before[name].double() + (1 - tau) * theirs[name].double()
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, theirs[name])
    assert all(torch.equal(value, theirs[name]) for name, value in encoder.state_dict().items())


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.floats(0.0, 1.0))
def test_fixed_points(seed: int, tau: float) -> None:
    encoder = student()
    same = Teacher(encoder, constant(tau))
    before = snapshot(same.encoder)
    same.update(encoder, 0)
    assert all(torch.equal(value, before[name]) for name, value in same.encoder.state_dict().items())
    still, copying = Teacher(encoder, constant(1.0)), Teacher(encoder, constant(0.0))
    move(encoder, seed)
    still.update(encoder, 0)
    copying.update(encoder, 0)
    assert all(torch.equal(value, before[name]) for name, value in still.encoder.state_dict().items())
    for name, value in copying.encoder.state_dict().items():
        assert torch.equal(value, encoder.state_dict()[name]), name


def test_buffers_follow_the_student_as_they_are() -> None:
    encoder = student()
    teacher = Teacher(encoder, constant(0.9))
    own = teacher.encoder.frontend("toy").extractor
    assert isinstance(own, Frames)
    encoder.frontend("toy").extractor.scale.fill_(3.0)
    assert float(own.scale) == 1.0
    teacher.update(encoder, 0)
    assert float(own.scale) == 3.0


@settings(max_examples=60)
@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(0, 50))
def test_decay_rises_from_start_to_end(one: float, other: float, updates: int) -> None:
    config = TeacherConfig(min(one, other), max(one, other), updates)
    values = [decay(config, update) for update in range(updates + 3)]
    assert values[0] == (config.decay_start if updates else config.decay_end)
    assert values[updates:] == [config.decay_end] * 3
    assert all(low <= high + 1e-12 for low, high in itertools.pairwise(values))
    assert all(config.decay_start - 1e-12 <= value <= config.decay_end + 1e-12 for value in values)
    if updates:
        middle = config.decay_start + (config.decay_end - config.decay_start) / updates
        assert values[1] == pytest.approx(middle, abs=1e-12)


FRONT = "frontends.toy."
SHARED = {
    TeacherShares.NOTHING: (),
    TeacherShares.EXTRACTOR: (f"{FRONT}extractor.",),
    TeacherShares.POSITIONS: (f"{FRONT}extractor.", f"{FRONT}positions."),
    TeacherShares.FRONTEND: tuple(
        f"{FRONT}{part}" for part in ("extractor.", "positions.", "prefix", "input_norm.", "blocks.")
    ),
}


@pytest.mark.parametrize("shares", list(TeacherShares))
def test_what_is_shared_is_the_very_same_and_all_else_a_copy(shares: TeacherShares) -> None:
    encoder = student()
    teacher = Teacher(encoder, constant(0.9, shares))
    own, theirs = dict(teacher.encoder.named_parameters()), dict(encoder.named_parameters())
    assert own.keys() == theirs.keys()
    for name, value in own.items():
        if name.startswith(SHARED[shares]):
            assert value is theirs[name], name
            assert value.requires_grad, name
        else:
            assert value.data_ptr() != theirs[name].data_ptr(), name
            assert torch.equal(value, theirs[name]), name
            assert not value.requires_grad, name
            assert theirs[name].requires_grad, name
    assert {name for name, _, _ in teacher.averaged(encoder)} == {n for n in own if not n.startswith(SHARED[shares])}
    move(encoder, 1)
    for name, value in own.items():
        assert torch.equal(value, theirs[name]) == name.startswith(SHARED[shares]), name


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("shares", list(TeacherShares))
def test_modes(shares: TeacherShares, copied: bool) -> None:
    """Own modules stay in evaluation mode; shared ones follow the student, in a deep copy of both as well."""
    encoder = student()
    both = nn.ModuleDict({"student": encoder, "teacher": Teacher(encoder, constant(0.9, shares))})
    if copied:
        both = copy.deepcopy(both)
    teacher, encoder = both["teacher"], both["student"]
    assert isinstance(teacher, Teacher)
    theirs = {id(module) for module in encoder.modules()}
    for mode in (True, False, True):
        both.train(mode)
        assert all(module.training == mode for module in encoder.modules())
        for module in teacher.modules():
            assert module.training == (mode and id(module) in theirs)
    assert any(id(module) in theirs for module in teacher.modules()) == (shares is not TeacherShares.NOTHING)


@pytest.mark.parametrize("shares", list(TeacherShares))
def test_dropout_never_reaches_the_teacher(shares: TeacherShares) -> None:
    encoder = student()
    teacher = Teacher(encoder, constant(0.9, shares))
    encoder.train()
    teacher.train()
    x = torch.randn(2, 5, 3)
    modes = [module.training for module in encoder.modules()]
    outputs = []
    for _ in range(3):
        tokens = teacher.extract("toy", x, None)
        outputs.append(teacher.encode("toy", tokens).x)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert [module.training for module in encoder.modules()] == modes
    tokens = encoder.frontend("toy").extractor(x)
    assert not torch.equal(encoder.encode("toy", tokens).x, encoder.encode("toy", tokens).x)
    encoder.eval()
    torch.testing.assert_close(encoder.encode("toy", encoder.extract("toy", x)).x, outputs[0])


def test_shared_modes_come_back_after_an_error() -> None:
    encoder = student()
    teacher = Teacher(encoder, constant(0.9, TeacherShares.FRONTEND))
    encoder.train()
    with pytest.raises(RuntimeError):
        teacher.encode("toy", Tokens(torch.randn(2, 5, 7), (5,)))
    assert all(module.training for module in encoder.modules())


@pytest.mark.parametrize("shares", list(TeacherShares))
def test_no_gradient_and_no_change_until_an_update(shares: TeacherShares) -> None:
    encoder = student()
    teacher = Teacher(encoder, constant(0.5, shares))
    before, x = snapshot(teacher.encoder), torch.randn(2, 5, 3)
    optimiser = torch.optim.SGD(encoder.parameters(), lr=0.1)
    for _ in range(2):
        tokens = teacher.extract("toy", x, None)
        assert not tokens.x.requires_grad
        target = teacher.encode("toy", tokens).x
        assert not target.requires_grad
        features = encoder.frontend("toy").extractor(x)
        loss = (encoder.encode("toy", features).x - target - 1).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    own = {name: value for name, value, _ in teacher.averaged(encoder)}
    assert all(value.grad is None and torch.equal(value, before[name]) for name, value in own.items())
    teacher.update(encoder, 0)
    changed = {name for name, value in own.items() if not torch.equal(value, before[name])}
    assert {"transformer.blocks.0.attention.qkv.weight", "transformer.norm.weight"} <= changed
    assert f"{FRONT}bias.slope" in changed
