"""Agreement with the authors' implementation: tiny random models whose every output they computed.

``golden/d2v1_vision.npz`` is data2vec 1.0, ``golden/d2v2_image.npz`` data2vec 2.0.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data2vec.core import Batch, Data2Vec, Experiment
from data2vec.core.errors import CheckpointError
from data2vec.core.model.encoder import Collect, Tokens
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
from data2vec.vision import MaskConfig, MaskKind, PositionKind, Vision
from data2vec.vision.published import load_published, our_name, teacher_state

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
WIDTH = 24
ROWS = 6  # of the 2.0 file, 2 images x 3 masks: the released CLS loss is summed over them, ours averaged


def images(golden: Golden) -> Batch:
    inputs = golden["input"]
    return Batch("vision", inputs, torch.arange(len(inputs)), torch.full((len(inputs),), -1))


def gradient_norms(model: Data2Vec, golden: Golden) -> dict[str, float]:
    """Relative error of every parameter's gradient norm; the query and value biases are parts of one of ours."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    errors = {}
    for name, norm in golden.under("grad_norm").items():
        ours = our_name(name)
        assert ours is not None
        gradient = gradients[ours]
        if name.endswith("q_bias"):
            gradient = gradient[:WIDTH]
        elif name.endswith("v_bias"):
            gradient = gradient[2 * WIDTH :]
        errors[name] = abs(float(gradient.norm()) - float(norm)) / float(norm)
    return errors


class TestVersion1:
    @pytest.fixture
    def golden(self) -> Golden:
        return load_golden(GOLDEN / "d2v1_vision.npz")

    @pytest.fixture
    def model(self, golden: Golden) -> Data2Vec:
        experiment = Experiment(
            modalities={
                "vision": Vision(
                    image_size=32,
                    patch_size=8,
                    mask=MaskConfig(ratio=9 / 16, min_block=2),
                    predictor=PredictorConfig(kind=PredictorKind.IDENTITY),
                )
            },
            transformer=TransformerConfig(depth=3, width=WIDTH, heads=3, norm_eps=1e-5, layer_scale=1e-4),
            teacher=TeacherConfig(0.9, 0.99, 100, TeacherShares.FRONTEND),
            targets=TargetsConfig(2, LayerOutput.BLOCK, TargetNorm.NONE, TargetNorm.LAYER),
            loss=LossConfig(beta=2.0),
        )
        validate(experiment)
        model = Data2Vec.build(experiment)
        # The released vision code has a head, final_proj, that its forward pass never uses.
        student = {name: v for name, v in golden.under("state").items() if not name.startswith("final_proj")}
        load_published(model, student, golden.under("teacher"))
        return model

    @pytest.fixture
    def mask(self, golden: Golden) -> Mask:
        return Mask.of(golden["mask"].flatten(1).bool().unsqueeze(1), visible_only=False)

    def test_teacher_layers_of_the_top_k(self, model: Data2Vec, golden: Golden) -> None:
        layers, _ = model.teacher_layers(images(golden))
        assert len(layers) == 2
        for ours, theirs in zip(layers, golden["teacher_layers"][-2:], strict=True):
            assert relative_error(ours, theirs) < TOLERANCE

    def test_features_and_student_output(self, model: Data2Vec, golden: Golden) -> None:
        features = model.features(images(golden), layers="last", of="student")
        assert features.shape == (4, 4)
        assert relative_error(features.x, golden["features"]) < TOLERANCE
        # What the file calls student_encoder is the same forward pass, without a mask.
        assert relative_error(features.x, golden["student_encoder"]) < TOLERANCE

    def test_loss_targets_and_predictions(self, model: Data2Vec, golden: Golden, mask: Mask) -> None:
        output = model(Masked(images(golden), mask))
        assert output.count == int(golden["sample_size"])
        assert relative_error(output.loss, golden["loss"]) < TOLERANCE
        assert relative_error(output.moments["target_spread"].spread(), golden["target_std"]) < TOLERANCE
        assert relative_error(output.moments["prediction_spread"].spread(), golden["pred_std"]) < TOLERANCE

    def test_gradient_norm_of_every_parameter(self, model: Data2Vec, golden: Golden, mask: Mask) -> None:
        model(Masked(images(golden), mask)).loss.backward()
        errors = gradient_norms(model, golden)
        assert len(errors) == 52
        assert max(errors.values()) < GRADIENT_TOLERANCE, errors

    def test_the_mask_matters(self, model: Data2Vec, golden: Golden, mask: Mask) -> None:
        inverted = Mask.of(~mask.hidden, visible_only=False)
        assert relative_error(model(Masked(images(golden), inverted)).loss, golden["loss"]) > 1e-3


class TestVersion2:
    """The file's ``teacher/*`` was written after the teacher's update, and so equals ``teacher_after_one_update/*``.

    The teacher that computed the targets follows from undoing the update, D = (D' - (1 - tau) theta) / tau. Its sine
    positions were overwritten by the update (frozen parameters are copied from the student), so they are solved for
    from the teacher's layers: 384 unknowns, 2304 equations, and a residual at rounding only if all else agrees.
    """

    @pytest.fixture(scope="class")
    @staticmethod
    def golden() -> Golden:
        return load_golden(GOLDEN / "d2v2_image.npz")

    @pytest.fixture(scope="class")
    @staticmethod
    def restored(golden: Golden) -> dict[str, Tensor]:
        tau, student = golden.meta["ema_decay_used"], golden.under("state")
        return {
            name: ((after.double() - (1 - tau) * student[name].double()) / tau).float()
            for name, after in golden.under("teacher_after_one_update").items()
        }

    @staticmethod
    def build() -> Data2Vec:
        experiment = Experiment(
            modalities={
                "vision": Vision(
                    image_size=32,
                    patch_size=8,
                    positions=PositionKind.SINE,
                    blocks=1,
                    input_norm=True,
                    mask=MaskConfig(kind=MaskKind.INVERSE_BLOCK, ratio=0.7, masks=3),
                    predictor=PredictorConfig(
                        kind=PredictorKind.CONV2D, layers=2, width=16, kernel=3, groups=4, mask_noise=0.0
                    ),
                )
            },
            student_sees=StudentSees.VISIBLE,
            transformer=TransformerConfig(depth=3, width=WIDTH, heads=3, norm_order=NormOrder.POST, norm_eps=1e-6),
            teacher=TeacherConfig(0.9, 0.99, 100, TeacherShares.NOTHING),
            targets=TargetsConfig(2, LayerOutput.FEED_FORWARD, TargetNorm.INSTANCE, TargetNorm.LAYER),
            loss=LossConfig(cls_weight=0.01 * ROWS),
        )
        validate(experiment)
        return Data2Vec.build(experiment)

    @pytest.fixture(scope="class")
    @staticmethod
    def positions(golden: Golden, restored: dict[str, Tensor]) -> Tensor:
        """(1, T, D) the teacher's positions in the golden forward pass, by Gauss-Newton in float64."""
        model = TestVersion2.build()
        load_published(model, golden.under("state"), restored)
        model.double().requires_grad_(False)
        encoder, expected = model.teacher.encoder, golden["teacher_layers"].double()
        extractor = encoder.frontend("vision").extractor
        patches, start = extractor.embed(golden["input"].double()), extractor.positions.positions

        def residual(change: Tensor) -> Tensor:
            tokens = Tokens(patches + start + change, (4, 4))
            encoded = encoder.encode("vision", tokens, collect=Collect(LayerOutput.FEED_FORWARD))
            return torch.stack([layer[:, 1:] for layer in encoded.layers]) - expected

        change = torch.zeros_like(start)
        for _ in range(2):
            jacobian = torch.autograd.functional.jacobian(residual, change, vectorize=True)
            matrix, right = jacobian.flatten(0, 3).flatten(1), residual(change).flatten()
            change = change - torch.linalg.lstsq(matrix, right, driver="gelsd", rcond=1e-9).solution.view_as(change)
        assert float(residual(change).norm() / expected.norm()) < 1e-6
        return (start + change).float()

    @pytest.fixture
    def model(self, golden: Golden, restored: dict[str, Tensor], positions: Tensor) -> Data2Vec:
        model = self.build()
        load_published(model, golden.under("state"), restored)
        model.teacher.encoder.frontend("vision").extractor.positions.positions.copy_(positions)
        return model

    @pytest.fixture
    def mask(self, golden: Golden) -> Mask:
        return Mask.of(golden["mask"].bool().view(2, 3, 16), visible_only=True)

    def test_student_encoder_and_prediction(self, model: Data2Vec, golden: Golden, mask: Mask) -> None:
        tokens = model.student.frontend("vision").extractor(golden["input"])
        encoded, _ = model.encode_masked("vision", tokens, mask)
        assert relative_error(encoded.x, golden["student_encoder"]) < TOLERANCE
        head = model.predictors["vision"]
        assert isinstance(head, ConvolutionalPredictor)
        everywhere = head.projection(head.decode(head.place(encoded.positions, mask), (4, 4)))
        assert relative_error(everywhere, golden["prediction"]) < TOLERANCE
        hidden = golden["prediction"].flatten(0, 1)[mask.positions]
        assert relative_error(head(encoded.positions, mask, (4, 4)), hidden) < TOLERANCE

    def test_teacher_layers_and_targets(self, model: Data2Vec, golden: Golden) -> None:
        layers, _ = model.teacher_layers(images(golden))
        for ours, theirs in zip(layers, golden["teacher_layers"][-2:], strict=True):
            assert relative_error(ours, theirs) < TOLERANCE
        assert relative_error(model.make_targets(images(golden)), golden["targets"]) < TOLERANCE

    def test_loss_and_its_parts(self, model: Data2Vec, golden: Golden, mask: Mask) -> None:
        output, count = model(Masked(images(golden), mask)), int(golden["sample_size"])
        assert output.count == count
        assert relative_error(output.loss, golden["loss"]) < TOLERANCE
        assert relative_error(output.losses["regression"] * count, golden["losses/IMAGE_regression"]) < TOLERANCE
        assert relative_error(output.losses["cls"] * 0.01 * ROWS * count, golden["losses/cls"]) < TOLERANCE

    def test_gradient_norm_of_every_parameter(self, model: Data2Vec, golden: Golden, mask: Mask) -> None:
        model(Masked(images(golden), mask)).loss.backward()
        errors = gradient_norms(model, golden)
        assert len(errors) == 59
        assert max(errors.values()) < GRADIENT_TOLERANCE, errors

    def test_features_and_their_layers(self, model: Data2Vec, golden: Golden) -> None:
        batch = images(golden)
        assert relative_error(model.features(batch, layers="last", of="student").x, golden["features"]) < TOLERANCE
        tokens = Tokens(*self._tokens(model, golden))
        encoded = model.student.encode("vision", tokens, collect=Collect(LayerOutput.FEED_FORWARD))
        for ours, theirs in zip(encoded.layers, golden["feature_layers"], strict=True):
            assert relative_error(ours, theirs) < TOLERANCE

    @staticmethod
    def _tokens(model: Data2Vec, golden: Golden) -> tuple[Tensor, tuple[int, ...]]:
        tokens = model.student.frontend("vision").extractor(golden["input"])
        return tokens.x, tokens.shape

    def test_teacher_after_one_update(self, model: Data2Vec, golden: Golden) -> None:
        model.after_step(11)
        assert model.known(11)["teacher_decay"] == pytest.approx(golden.meta["ema_decay_used"], abs=1e-12)
        state = model.state_dict()
        after = teacher_state(golden.under("teacher_after_one_update"))
        assert len(after) == 54
        for name, value in after.items():
            assert relative_error(state[name], value) < TOLERANCE, name


def test_weights_of_another_shape_are_one_clear_error_and_change_nothing() -> None:
    golden = load_golden(GOLDEN / "d2v2_image.npz")
    model = TestVersion2.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    student = golden.under("state")
    student["blocks.0.mlp.fc1.weight"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match=r"feed_forward\.fc1\.weight"):
        load_published(model, student)
    with pytest.raises(CheckpointError, match="no place"):
        load_published(model, {**golden.under("state"), "decoder.surprise": torch.zeros(1)})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
