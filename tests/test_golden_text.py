"""Agreement with the authors' implementation: tiny random models whose every output they computed.

``golden/d2v1_text.npz`` is data2vec 1.0, ``golden/d2v2_text.npz`` data2vec 2.0.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data2vec.core import Batch, Data2Vec, Experiment
from data2vec.core.errors import CheckpointError
from data2vec.core.model.encoder import Collect
from data2vec.core.model.mask import Mask
from data2vec.core.pretraining.masked import Masked
from data2vec.core.pretraining.predictor import ConvolutionalPredictor
from data2vec.core.settings.fields import LayerOutput, NormOrder, TransformerConfig
from data2vec.core.settings.overrides import validate
from data2vec.core.settings.pretraining import (
    LossConfig,
    PredictorConfig,
    PredictorKind,
    StudentSees,
    TargetNorm,
    TargetsConfig,
    TeacherConfig,
    TeacherShares,
)
from data2vec.core.testing import Golden, load_golden, relative_error
from data2vec.text import MaskConfig, Text
from data2vec.text.published import load_published, our_place, teacher_state

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
WIDTH = 24
TINY = TransformerConfig(depth=3, width=WIDTH, heads=3, norm_order=NormOrder.POST, norm_eps=1e-5)


def texts(tokens: Tensor, pad: int = 1) -> Batch:
    lengths = (tokens != pad).sum(1)
    padded = bool((lengths < tokens.shape[1]).any())
    unknown = torch.full((len(tokens),), -1)
    return Batch("text", tokens, torch.arange(len(tokens)), unknown, lengths if padded else None)


def gradient_norms(model: Data2Vec, golden: Golden) -> dict[str, tuple[float, float]]:
    """Our and the authors' norm of every parameter's gradient; queries, keys and values are thirds of one of ours."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = {}
    for name, norm in golden.under("grad_norm").items():
        place = our_place(name)
        assert place is not None
        gradient = gradients[place.name]
        if place.part is not None:
            gradient = gradient.chunk(3)[place.part]
        norms[name] = float(gradient.norm()), float(norm)
    return norms


class TestVersion1:
    @pytest.fixture
    def golden(self) -> Golden:
        return load_golden(GOLDEN / "d2v1_text.npz")

    @pytest.fixture
    def model(self, golden: Golden) -> Data2Vec:
        experiment = Experiment(
            modalities={"text": Text(vocabulary=41, block=64, dropout=0.0)},
            transformer=replace(TINY, mlp_ratio=2.0),
            teacher=TeacherConfig(0.9, 0.99, 100, TeacherShares.NOTHING),
            targets=TargetsConfig(2, LayerOutput.FEED_FORWARD, TargetNorm.LAYER, TargetNorm.NONE),
            loss=LossConfig(beta=4.0, scale=1.0),
        )
        validate(experiment)
        model = Data2Vec.build(experiment)
        load_published(model, golden.under("state"), golden.under("teacher"))
        return model

    @pytest.fixture
    def batch(self, golden: Golden) -> Batch:
        batch = texts(golden["tokens"])
        assert batch.lengths is not None  # the second text is padded
        return replace(batch, student_inputs=golden["masked_tokens"])

    @pytest.fixture
    def mask(self, golden: Golden) -> Mask:
        assert torch.equal(golden["mask"], golden["masked_tokens"] == golden.meta["cfg"]["mask"])
        return Mask.of(golden["mask"].unsqueeze(1), visible_only=False, padding=golden["tokens"] == 1)

    def test_features(self, model: Data2Vec, golden: Golden) -> None:
        features = model.features(texts(golden["tokens"]), layers="last", of="student")
        assert features.padding is not None
        valid = ~features.padding
        assert int((~valid).sum()) == 5
        assert relative_error(features.x[valid], golden["features"][valid]) < TOLERANCE

    def test_loss(self, model: Data2Vec, golden: Golden, batch: Batch, mask: Mask) -> None:
        output = model(Masked(batch, mask))
        assert output.count == int(golden["sample_size"])
        assert relative_error(output.loss, golden["loss"]) < TOLERANCE
        assert relative_error(output.total, golden["losses/main"]) < TOLERANCE

    def test_gradient_norm_of_every_parameter(self, model: Data2Vec, golden: Golden, batch: Batch, mask: Mask) -> None:
        model(Masked(batch, mask)).loss.backward()
        norms = gradient_norms(model, golden)
        # A bias of the keys cannot change a softmax: what both sides have there is rounding.
        constant = {name: norms.pop(name) for name in list(norms) if name.endswith("k_proj.bias")}
        assert len(constant) == 3
        assert max(max(pair) for pair in constant.values()) < 1e-8
        errors = {name: abs(ours - theirs) / theirs for name, (ours, theirs) in norms.items()}
        assert len(errors) == 53
        assert max(errors.values()) < GRADIENT_TOLERANCE, errors

    def test_the_mask_and_the_replaced_tokens_matter(
        self, model: Data2Vec, golden: Golden, batch: Batch, mask: Mask
    ) -> None:
        read = model(Masked(replace(batch, student_inputs=None), mask))
        assert relative_error(read.loss, golden["loss"]) > 1e-3
        shifted = Mask.of(mask.hidden.roll(1, dims=2), visible_only=False)
        assert relative_error(model(Masked(batch, shifted)).loss, golden["loss"]) > 1e-3


class TestVersion2:
    """The file's ``teacher/*`` was written after the teacher's update, and so equals ``teacher_after_one_update/*``.

    The teacher that computed the targets follows from undoing the update, D = (D' - (1 - tau) theta) / tau.
    """

    @pytest.fixture(scope="class")
    @staticmethod
    def golden() -> Golden:
        return load_golden(GOLDEN / "d2v2_text.npz")

    @staticmethod
    def build() -> Data2Vec:
        experiment = Experiment(
            modalities={
                "text": Text(
                    vocabulary=40,
                    block=64,
                    dropout=0.0,
                    mask=MaskConfig(ratio=0.45, masks=2, replace=False),
                    predictor=PredictorConfig(
                        kind=PredictorKind.CONV1D,
                        layers=2,
                        width=24,
                        kernel=9,
                        groups=1,
                        residual=False,
                        projection_layers=2,
                        mask_noise=0.0,
                    ),
                )
            },
            student_sees=StudentSees.VISIBLE,
            transformer=TINY,
            teacher=TeacherConfig(0.9, 0.99, 100, TeacherShares.FRONTEND),
            targets=TargetsConfig(3, LayerOutput.FEED_FORWARD, TargetNorm.INSTANCE, TargetNorm.NONE),
            loss=LossConfig(scale=1.0),
        )
        validate(experiment)
        return Data2Vec.build(experiment)

    @pytest.fixture
    def model(self, golden: Golden) -> Data2Vec:
        model = self.build()
        tau, student = golden.meta["ema_decay_used"], golden.under("state")
        restored = {
            name: ((after.double() - (1 - tau) * student[f"blocks.{name}"].double()) / tau).float()
            for name, after in golden.under("teacher_after_one_update").items()
        }
        load_published(model, student, restored)
        return model

    @pytest.fixture
    def batch(self, golden: Golden) -> Batch:
        # Token 1 is an ordinary one in this file: nothing is padded.
        tokens = golden["input"]
        return Batch("text", tokens, torch.arange(len(tokens)), torch.full((len(tokens),), -1))

    @pytest.fixture
    def mask(self, golden: Golden) -> Mask:
        return Mask.of(golden["mask"].bool().view(2, 2, 20), visible_only=True)

    def test_the_teacher_of_the_file_is_the_updated_one(self, golden: Golden) -> None:
        after = golden.under("teacher_after_one_update")
        assert all(torch.equal(value, after[name]) for name, value in golden.under("teacher").items())

    def test_student_encoder_and_prediction(self, model: Data2Vec, golden: Golden, batch: Batch, mask: Mask) -> None:
        tokens = model.student.frontend("text").extractor(batch.inputs)
        encoded, _ = model.encode_masked("text", tokens, mask)
        # The authors' encoder has the visible tokens of a row in the random order in which they were drawn.
        order = torch.cdist(encoded.x, golden["student_encoder"]).argmin(2)
        assert torch.equal(order.sort(1).values, torch.arange(11).expand(4, 11))
        theirs = torch.take_along_dim(golden["student_encoder"], order.unsqueeze(2), 1)
        assert relative_error(encoded.x, theirs) < TOLERANCE
        head = model.predictors["text"]
        assert isinstance(head, ConvolutionalPredictor)
        everywhere = head.projection(head.decode(head.place(encoded.positions, mask), (20,)))
        assert relative_error(everywhere, golden["prediction"]) < TOLERANCE
        hidden = golden["prediction"].flatten(0, 1)[mask.positions]
        assert relative_error(head(encoded.positions, mask, (20,)), hidden) < TOLERANCE

    def test_teacher_layers_and_targets(self, model: Data2Vec, golden: Golden, batch: Batch) -> None:
        layers, _ = model.teacher_layers(batch)
        assert len(layers) == 3
        for ours, theirs in zip(layers, golden["teacher_layers"], strict=True):
            assert relative_error(ours, theirs) < TOLERANCE
        assert relative_error(model.make_targets(batch), golden["targets"]) < TOLERANCE

    def test_loss(self, model: Data2Vec, golden: Golden, batch: Batch, mask: Mask) -> None:
        output = model(Masked(batch, mask))
        assert output.count == int(golden["sample_size"])
        assert relative_error(output.loss, golden["loss"]) < TOLERANCE
        assert relative_error(output.losses["regression"] * output.count, golden["losses/TEXT_regression"]) < TOLERANCE

    def test_gradient_norm_of_every_parameter(self, model: Data2Vec, golden: Golden, batch: Batch, mask: Mask) -> None:
        model(Masked(batch, mask)).loss.backward()
        errors = {name: abs(a - b) / b for name, (a, b) in gradient_norms(model, golden).items()}
        assert len(errors) == 48
        assert max(errors.values()) < GRADIENT_TOLERANCE, errors

    def test_features_and_their_layers(self, model: Data2Vec, golden: Golden, batch: Batch) -> None:
        assert relative_error(model.features(batch, layers="last", of="student").x, golden["features"]) < TOLERANCE
        tokens = model.student.frontend("text").extractor(batch.inputs)
        encoded = model.student.encode("text", tokens, collect=Collect(LayerOutput.FEED_FORWARD))
        for ours, theirs in zip(encoded.layers, golden["feature_layers"], strict=True):
            assert relative_error(ours, theirs) < TOLERANCE

    def test_teacher_after_one_update(self, model: Data2Vec, golden: Golden) -> None:
        model.after_step(11)
        assert model.known(11)["teacher_decay"] == pytest.approx(golden.meta["ema_decay_used"], abs=1e-12)
        state = model.state_dict()
        after = teacher_state(golden.under("teacher_after_one_update"))
        assert len(after) == 36
        for name, value in after.items():
            assert relative_error(state[name], value) < TOLERANCE, name


def test_weights_that_do_not_fit_are_one_clear_error_and_change_nothing() -> None:
    student = load_golden(GOLDEN / "d2v2_text.npz").under("state")
    model = TestVersion2.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"feed_forward\.fc1\.weight"):
        load_published(model, {**student, "blocks.0.mlp.fc1.weight": torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match="no place"):
        load_published(model, {**student, "decoder.surprise": torch.zeros(1)})
    other = load_golden(GOLDEN / "d2v1_text.npz").under("state")
    incomplete = {name: value for name, value in other.items() if not name.endswith("1.self_attn.k_proj.bias")}
    with pytest.raises(CheckpointError, match="queries, keys and values do not match"):
        load_published(model, incomplete)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
