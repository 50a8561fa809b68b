"""What users of a trained model call: features, and its state."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data2vec.core.batch import Batch
from data2vec.core.errors import CheckpointError
from data2vec.core.model.encoder import Collect, Extractor, Frontend, Tokens
from data2vec.core.model.transformer import Transformer
from data2vec.core.pretraining.data2vec import Data2Vec
from data2vec.core.pretraining.predictor import build_predictor
from data2vec.core.settings.fields import LayerOutput, TransformerConfig
from data2vec.core.settings.pretraining import (
    LossConfig,
    PredictorConfig,
    StudentSees,
    TargetsConfig,
    TeacherConfig,
    TeacherShares,
)

TINY = TransformerConfig(depth=4, width=8, heads=2, mlp_ratio=1.0, dropout=0.5)


class Frames(Extractor):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 8)

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tokens:
        return Tokens(self.proj(inputs), (inputs.shape[1],))

    def grid(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[tuple[int, ...], Tensor | None]:
        return (inputs.shape[1],), None


def build(shares: TeacherShares = TeacherShares.EXTRACTOR, *, seed: int = 0, perturb: bool = True) -> Data2Vec:
    torch.manual_seed(seed)
    model = Data2Vec(
        {"toy": Frontend(Frames(), width=8, prefix_tokens=2, input_norm=nn.LayerNorm(8))},
        Transformer(TINY),
        {"toy": build_predictor(8, PredictorConfig())},
        mask_tokens=frozenset({"toy"}),
        student_sees=StudentSees.ALL,
        teacher=TeacherConfig(shares=shares),
        targets=TargetsConfig(top_k=2, output=LayerOutput.FEED_FORWARD),
        loss=LossConfig(),
    )
    with torch.no_grad():
        for parameter in model.parameters() if perturb else ():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def toy(inputs: Tensor) -> Batch:
    return Batch("toy", inputs, torch.arange(len(inputs)), torch.full((len(inputs),), -1))


@pytest.fixture
def batch() -> Batch:
    return toy(torch.randn(3, 6, 3, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("of", ["teacher", "student"])
def test_features_of_every_choice_of_layers(batch: Batch, of: str) -> None:
    model = build().eval()
    encoder = model.teacher.encoder if of == "teacher" else model.student
    x = encoder.frontend("toy").extractor(batch.inputs).x
    forwards = encoder.encode("toy", Tokens(x, (6,)), collect=Collect(LayerOutput.FEED_FORWARD)).layers
    blocks = encoder.encode("toy", Tokens(x, (6,)), collect=Collect(LayerOutput.BLOCK)).layers
    normed = [F.layer_norm(layer[:, 2:], (8,)) for layer in forwards]
    expected = {
        "top_k": (normed[2] + normed[3]) / 2,
        "all": sum(normed[1:], normed[0]) / 4,
        "last": encoder.encode("toy", Tokens(x, (6,))).x[:, 2:],
        1: blocks[0][:, 2:],
        "3": blocks[2][:, 2:],
        4: blocks[3][:, 2:],
    }
    for layers, value in expected.items():
        features = model.features(batch, layers=layers, of=of)
        torch.testing.assert_close(features.x, value.detach())
        assert features.shape == (6,)
        assert features.padding is None
        assert not features.x.requires_grad
        torch.testing.assert_close(features.mean(), value.detach().mean(1))
    assert torch.equal(model.features(batch).x, model.features(batch, layers="top_k", of="teacher").x)


@pytest.mark.parametrize("layers", ["middle", "0", "5", 0, 5, -1, "1.5", ""])
def test_no_such_layer(batch: Batch, layers: str | int) -> None:
    with pytest.raises(ValueError, match=r"layers=.*choose top_k, all, last, extractor or a block from 1 to 4"):
        build().features(batch, layers=layers)


def test_no_such_encoder(batch: Batch) -> None:
    with pytest.raises(ValueError, match="of='pupil': choose teacher or student"):
        build().features(batch, of="pupil")


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("shares", list(TeacherShares))
def test_features_are_without_dropout_and_leave_the_mode_as_it_was(
    batch: Batch, mode: bool, shares: TeacherShares
) -> None:
    model = build(shares).train(mode)
    model.student.transformer.blocks[1].eval()
    before = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    for of in ("teacher", "student"):
        assert torch.equal(model.features(batch, of=of).x, model.features(batch, of=of).x)
    with pytest.raises(RuntimeError):
        model.features(toy(torch.randn(1, 6, 5)))
    assert {name: module.training for name, module in model.named_modules(remove_duplicate=False)} == before


@pytest.mark.parametrize("shares", list(TeacherShares))
def test_state_round_trip(batch: Batch, shares: TeacherShares) -> None:
    model, other = build(shares, seed=1), build(shares, seed=2)
    places = {name: value.data_ptr() for name, value in other.state_dict().items()}
    state = {name: value.clone() for name, value in model.own_state().items()}
    pointers = [value.data_ptr() for value in model.own_state().values()]
    assert len(set(pointers)) == len(pointers)
    extractor = "teacher.encoder.frontends.toy.extractor.proj.weight"
    assert (extractor in state) == (shares is TeacherShares.NOTHING)
    assert ("teacher.encoder.frontends.toy.prefix" in state) == (shares is not TeacherShares.FRONTEND)
    assert "teacher.encoder.transformer.norm.weight" in state
    assert "mask_tokens.toy" in state
    assert not torch.equal(model.features(batch).x, other.features(batch).x)
    other.load_own_state(state)
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
        assert value.data_ptr() == places[name], name
    assert torch.equal(model.features(batch).x, other.features(batch).x)
    same = other.teacher.encoder.frontend("toy").extractor is other.student.frontend("toy").extractor
    assert same == (shares is not TeacherShares.NOTHING)


@pytest.mark.parametrize("shares", list(TeacherShares))
def test_a_state_that_does_not_fit_is_one_clear_error_and_changes_nothing(shares: TeacherShares) -> None:
    model = build(shares)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: torch.zeros_like(value) for name, value in model.own_state().items()}
    missing = {name: value for name, value in state.items() if name != "mask_tokens.toy"}
    with pytest.raises(CheckpointError, match=r"do not fit this model: it has no mask_tokens\.toy$"):
        model.load_own_state(missing)
    with pytest.raises(CheckpointError, match="surprise has no place here"):
        model.load_own_state({**state, "surprise": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"mask_tokens\.toy is \(5,\) there and \(8,\) here"):
        model.load_own_state({**state, "mask_tokens.toy": torch.zeros(5)})
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        model.load_own_state({})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_of_other_sharing_does_not_fit() -> None:
    with pytest.raises(CheckpointError, match=r"it has no teacher\.encoder\.frontends\.toy\.extractor\.proj\.bias"):
        build(TeacherShares.NOTHING).load_own_state(build(TeacherShares.EXTRACTOR).own_state())
    with pytest.raises(CheckpointError, match="has no place here"):
        build(TeacherShares.EXTRACTOR).load_own_state(build(TeacherShares.NOTHING).own_state())


def test_every_parameter_is_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that no initialiser writes would show as NaN; what chance decides differs between seeds."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    one, other = (dict(build(seed=seed, perturb=False).named_parameters()) for seed in (1, 2))
    constant = {name for name, value in one.items() if torch.equal(value, other[name])}
    assert all(bool(value.isfinite().all()) for value in one.values())
    assert all(one[name].ndim == 1 and ("norm" in name or name.endswith("bias")) for name in constant)
    assert {
        "mask_tokens.toy",
        "student.frontends.toy.prefix",
        "predictors.toy.layers.0.weight",
    } <= one.keys() - constant


@pytest.mark.parametrize("shares", list(TeacherShares))
def test_a_new_run_starts_from_another_ones_student_with_a_new_teacher(shares: TeacherShares) -> None:
    trained, fresh = build(shares, seed=1), build(shares, seed=2)
    fresh.start_from(trained.own_state())
    for name, value in trained.student.state_dict().items():
        assert torch.equal(fresh.student.state_dict()[name], value)
        assert torch.equal(fresh.teacher.encoder.state_dict()[name], value)  # not the trained teacher, which differs
    assert torch.equal(fresh.mask_tokens["toy"], trained.mask_tokens["toy"])
    different = [
        name for name, mine, theirs in trained.teacher.averaged(trained.student) if not torch.equal(mine, theirs)
    ]
    assert different


def test_starting_from_another_shape_changes_nothing() -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = model.own_state()
    state["mask_tokens.toy"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"mask_tokens\.toy"):
        model.start_from(state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
