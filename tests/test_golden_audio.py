"""Agreement with the authors' speech models: tiny random models whose every output they computed.

``golden/d2v1_audio.npz`` is data2vec 1.0, ``golden/d2v2_audio.npz`` data2vec 2.0. The two ``*_padded`` files show a
fault of the released code, in which what lies in the padding reaches the clip; ours has to differ from them there, and
by how much is stated here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data2vec.core import Batch, Data2Vec, Experiment
from data2vec.core.errors import CheckpointError
from data2vec.core.model.encoder import Collect, Positions, Tokens
from data2vec.core.model.mask import Mask
from data2vec.core.pretraining.masked import Masked
from data2vec.core.pretraining.predictor import ConvolutionalPredictor
from data2vec.core.settings.fields import LayerOutput, NormOrder, TransformerConfig
from data2vec.core.settings.overrides import validate
from data2vec.core.settings.pretraining import (
    PredictorConfig,
    PredictorKind,
    StudentSees,
    TargetsConfig,
    TeacherConfig,
    TeacherShares,
)
from data2vec.core.testing import Golden, load_golden, relative_error
from data2vec.speech import MaskConfig, MaskKind, PositionConvolutions, PositionsConfig, Speech
from data2vec.speech.published import load_published, our_name, teacher_state

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
WIDTH, FRAMES = 24, 39
LENGTHS = torch.tensor([1600, 1200])  # of the clips in the padded files: 39 and 29 frames
SPEECH = Speech(
    channels=(16,) * 4,
    kernels=(10, 3, 3, 2),
    strides=(5, 2, 2, 2),
    positions=PositionsConfig(width=10, depth=2, groups=4),
    dropout=0.0,
)
TEACHER = TeacherConfig(0.9, 0.99, 100, TeacherShares.EXTRACTOR)


def clips(golden: Golden, lengths: Tensor | None = None) -> Batch:
    inputs = golden["input"]
    return Batch("speech", inputs, torch.arange(len(inputs)), torch.full((len(inputs),), -1), lengths)


def alone(golden: Golden, index: int) -> Batch:
    """One clip of a padded file, cut to its own length."""
    inputs = golden["input"][index : index + 1, : int(LENGTHS[index])]
    return Batch("speech", inputs, torch.tensor([index]), torch.tensor([-1]))


def gradient_norms(model: Data2Vec, golden: Golden) -> dict[str, float]:
    """Relative error of every parameter's gradient norm; 1.0's queries, keys and values are parts of one of ours.

    A key bias changes no softmax, so its gradient is rounding alone (1e-10 in the file): below 1e-6 both count as 0.
    """
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    errors = {}
    for name, norm in golden.under("grad_norm").items():
        ours = our_name(name)
        assert ours is not None
        gradient = gradients[ours]
        for part, letter in enumerate("qkv"):
            if f".{letter}_proj." in name:
                gradient = gradient[part * WIDTH : (part + 1) * WIDTH]
        errors[name] = abs(float(gradient.norm()) - float(norm)) / max(float(norm), 1e-6)
    return errors


def build_1() -> Data2Vec:
    experiment = Experiment(
        modalities={"speech": SPEECH},
        transformer=TransformerConfig(
            depth=3, width=WIDTH, heads=3, mlp_ratio=2.0, norm_order=NormOrder.POST, norm_eps=1e-5
        ),
        teacher=TEACHER,
        targets=TargetsConfig(top_k=2),
    )
    validate(experiment)
    return Data2Vec.build(experiment)


def build_2() -> Data2Vec:
    predictor = PredictorConfig(kind=PredictorKind.CONV1D, layers=2, width=24, kernel=7, groups=4, mask_noise=0.0)
    experiment = Experiment(
        modalities={
            "speech": replace(
                SPEECH,
                alibi=True,
                blocks=1,
                mask=MaskConfig(kind=MaskKind.EXACT_SPAN, ratio=0.5, length=5, masks=2),
                predictor=predictor,
            )
        },
        student_sees=StudentSees.VISIBLE,
        transformer=TransformerConfig(depth=3, width=WIDTH, heads=3, norm_order=NormOrder.POST, norm_eps=1e-5),
        teacher=TEACHER,
        targets=TargetsConfig(top_k=2),
    )
    validate(experiment)
    return Data2Vec.build(experiment)


def teacher_before(golden: Golden) -> dict[str, Tensor]:
    """The teacher that computed the targets of a 2.0 file.

    ``teacher/*`` was written after the teacher's update and equals ``teacher_after_one_update/*``; undoing it,
    D = (D' - (1 - tau) theta) / tau, gives the teacher of the forward pass.
    """
    tau, student = golden.meta["ema_decay_used"], golden.under("state")
    return {
        name: ((after.double() - (1 - tau) * student[name].double()) / tau).float()
        for name, after in golden.under("teacher_after_one_update").items()
    }


class TestVersion1:
    @pytest.fixture(scope="class")
    @staticmethod
    def golden() -> Golden:
        return load_golden(GOLDEN / "d2v1_audio.npz")

    @pytest.fixture
    def model(self, golden: Golden) -> Data2Vec:
        model = build_1()
        load_published(model, golden.under("state"), golden.under("teacher"))
        return model

    @pytest.fixture
    def mask(self, golden: Golden) -> Mask:
        return Mask.of(golden["mask"].unsqueeze(1), visible_only=False)

    def test_features_and_their_layers(self, model: Data2Vec, golden: Golden) -> None:
        features = model.features(clips(golden), layers="last", of="student")
        assert features.shape == (FRAMES,)
        assert relative_error(features.x, golden["features"]) < TOLERANCE
        tokens = model.student.frontend("speech").extractor(golden["input"])
        encoded = model.student.encode("speech", tokens, collect=Collect(LayerOutput.FEED_FORWARD))
        assert len(encoded.layers) == 3
        for ours, theirs in zip(encoded.layers, golden["feature_layers"], strict=True):
            assert relative_error(ours, theirs) < TOLERANCE

    def test_the_students_output_under_the_mask(self, model: Data2Vec, golden: Golden, mask: Mask) -> None:
        tokens = model.student.frontend("speech").extractor(golden["input"])
        encoded, _ = model.encode_masked("speech", tokens, mask)
        assert relative_error(encoded.x, golden["student_encoder"]) < TOLERANCE

    def test_loss_targets_and_predictions(self, model: Data2Vec, golden: Golden, mask: Mask) -> None:
        output = model(Masked(clips(golden), mask))
        assert output.count == int(golden["sample_size"])
        assert relative_error(output.loss, golden["loss"]) < TOLERANCE
        assert relative_error(output.moments["target_spread"].spread(), golden["target_std"]) < TOLERANCE
        assert relative_error(output.moments["prediction_spread"].spread(), golden["pred_std"]) < TOLERANCE

    def test_gradient_norm_of_every_parameter(self, model: Data2Vec, golden: Golden, mask: Mask) -> None:
        model(Masked(clips(golden), mask)).loss.backward()
        errors = gradient_norms(model, golden)
        assert len(errors) == 73
        assert max(errors.values()) < GRADIENT_TOLERANCE, errors

    def test_the_mask_matters(self, model: Data2Vec, golden: Golden, mask: Mask) -> None:
        inverted = Mask.of(~mask.hidden, visible_only=False)
        assert relative_error(model(Masked(clips(golden), inverted)).loss, golden["loss"]) > 1e-3


class TestVersion2:
    @pytest.fixture(scope="class")
    @staticmethod
    def golden() -> Golden:
        return load_golden(GOLDEN / "d2v2_audio.npz")

    @pytest.fixture
    def model(self, golden: Golden) -> Data2Vec:
        model = build_2()
        load_published(model, golden.under("state"), teacher_before(golden))
        return model

    @pytest.fixture
    def mask(self, golden: Golden) -> Mask:
        return Mask.of(golden["mask"].bool().view(2, 2, FRAMES), visible_only=True)

    def test_student_encoder_and_prediction(self, model: Data2Vec, golden: Golden, mask: Mask) -> None:
        tokens = model.student.frontend("speech").extractor(golden["input"])
        encoded, _ = model.encode_masked("speech", tokens, mask)
        # The file's visible frames stand in the order of an unstable sort, ours in time: every one has its own partner.
        partner = torch.cdist(encoded.x, golden["student_encoder"]).argmin(-1)
        assert all(sorted(row) == list(range(19)) for row in partner.tolist())
        paired = golden["student_encoder"].gather(1, partner.unsqueeze(-1).expand(-1, -1, WIDTH))
        assert relative_error(encoded.x, paired) < TOLERANCE
        head = model.predictors["speech"]
        assert isinstance(head, ConvolutionalPredictor)
        everywhere = head.projection(head.decode(head.place(encoded.positions, mask), (FRAMES,)))
        assert relative_error(everywhere, golden["prediction"]) < TOLERANCE
        hidden = golden["prediction"].flatten(0, 1)[mask.positions]
        assert relative_error(head(encoded.positions, mask, (FRAMES,)), hidden) < TOLERANCE

    def test_teacher_layers_and_targets(self, model: Data2Vec, golden: Golden) -> None:
        layers, _ = model.teacher_layers(clips(golden))
        assert len(layers) == 2
        for ours, theirs in zip(layers, golden["teacher_layers"][-2:], strict=True):
            assert relative_error(ours, theirs) < TOLERANCE
        assert relative_error(model.make_targets(clips(golden)), golden["targets"]) < TOLERANCE

    def test_loss(self, model: Data2Vec, golden: Golden, mask: Mask) -> None:
        output, count = model(Masked(clips(golden), mask)), int(golden["sample_size"])
        assert output.count == count
        assert relative_error(output.loss, golden["loss"]) < TOLERANCE
        assert relative_error(output.total, golden["losses/AUDIO_regression"]) < TOLERANCE

    def test_gradient_norm_of_every_parameter(self, model: Data2Vec, golden: Golden, mask: Mask) -> None:
        model(Masked(clips(golden), mask)).loss.backward()
        errors = gradient_norms(model, golden)
        assert len(errors) == 77
        assert "modality_encoders.AUDIO.alibi_scale" in errors
        assert max(errors.values()) < GRADIENT_TOLERANCE, errors

    def test_features_and_their_layers(self, model: Data2Vec, golden: Golden) -> None:
        features = model.features(clips(golden), layers="last", of="student")
        assert relative_error(features.x, golden["features"]) < TOLERANCE
        tokens = model.student.frontend("speech").extractor(golden["input"])
        encoded = model.student.encode("speech", tokens, collect=Collect(LayerOutput.FEED_FORWARD))
        for ours, theirs in zip(encoded.layers, golden["feature_layers"], strict=True):
            assert relative_error(ours, theirs) < TOLERANCE

    def test_teacher_after_one_update(self, model: Data2Vec, golden: Golden) -> None:
        model.after_step(11)
        assert model.known(11)["teacher_decay"] == pytest.approx(golden.meta["ema_decay_used"], abs=1e-12)
        state = model.state_dict()
        after = teacher_state(golden.under("teacher_after_one_update"))
        assert len(after) == 55
        for name, value in after.items():
            assert relative_error(state[name], value) < TOLERANCE, name


class LeakingPositions(Positions):
    """As released: 1.0 zeroes padded frames before the first convolution only, 2.0 never."""

    def __init__(self, convolutions: nn.ModuleList, *, zero_first: bool) -> None:
        super().__init__()
        self.convolutions = convolutions
        self.zero_first = zero_first

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        if self.zero_first and padding is not None:
            x = x.masked_fill(padding.unsqueeze(-1), 0.0)
        for convolution in self.convolutions:
            x = convolution(x.transpose(1, 2)).transpose(1, 2)
            x = nn.functional.gelu(nn.functional.layer_norm(x, x.shape[-1:]))
        return x


@pytest.mark.parametrize(("version", "difference"), [(1, 1.35), (2, 3.45)])
class TestPadding:
    """The second clip is 1200 samples long and followed by 400 of noise; ``difference``: see the second test."""

    @staticmethod
    def load(version: int) -> tuple[Golden, Data2Vec]:
        golden = load_golden(GOLDEN / f"d2v{version}_audio_padded.npz")
        teacher = golden.under("teacher") if version == 1 else teacher_before(golden)
        model = build_1() if version == 1 else build_2()
        load_published(model, golden.under("state"), teacher)
        return golden, model

    def test_a_clip_without_padding_agrees(self, version: int, difference: float) -> None:
        golden, model = self.load(version)
        features = model.features(clips(golden, LENGTHS), layers="last", of="student")
        assert relative_error(features.x[0], golden["features"][0]) < TOLERANCE

    def test_a_padded_clip_gets_what_it_gets_alone_and_not_what_the_released_code_gives(
        self, version: int, difference: float
    ) -> None:
        golden, model = self.load(version)
        padded = model.features(clips(golden, LENGTHS), layers="last", of="student")
        assert padded.padding is not None
        assert (~padded.padding).sum(1).tolist() == [39, 29]
        ours = padded.x[1, :29]
        single = model.features(alone(golden, 1), layers="last", of="student").x[0]
        assert relative_error(ours, single) < TOLERANCE
        theirs = float((golden["features"][1, :29] - single).abs().max())
        assert theirs == pytest.approx(difference, rel=0.01)

    def test_with_the_released_leak_ours_gives_what_the_released_code_gives(
        self, version: int, difference: float
    ) -> None:
        golden, model = self.load(version)
        frontend = model.student.frontend("speech")
        positions = frontend.positions
        assert isinstance(positions, PositionConvolutions)
        frontend.positions = LeakingPositions(positions.convolutions, zero_first=version == 1)
        padding = torch.arange(FRAMES) >= torch.tensor([[39], [29]])
        x = frontend.extractor(golden["input"]).x  # not zeroed on padding
        encoded = model.student.encode("speech", Tokens(x, (FRAMES,), padding))
        assert relative_error(encoded.x[1, :29], golden["features"][1, :29]) < TOLERANCE

    def test_targets_and_loss_too(self, version: int, difference: float) -> None:
        golden, model = self.load(version)
        hidden = golden["mask"].bool().view(2, -1, FRAMES)
        padding = torch.arange(FRAMES) >= torch.tensor([[39], [29]])
        sees_visible = version == 2
        together = model(Masked(clips(golden, LENGTHS), Mask.of(hidden, visible_only=sees_visible, padding=padding)))
        singles = [
            model(
                Masked(alone(golden, index), Mask.of(hidden[index : index + 1, :, :frames], visible_only=sees_visible))
            )
            for index, frames in enumerate((39, 29))
        ]
        assert together.count == sum(single.count for single in singles)
        assert relative_error(together.total, singles[0].total + singles[1].total) < TOLERANCE
        targets = model.make_targets(clips(golden, LENGTHS))
        for index, frames in enumerate((39, 29)):
            single = model.make_targets(alone(golden, index))[0]
            assert relative_error(targets[index, :frames], single) < TOLERANCE
        assert relative_error(together.loss, golden["loss"]) > 0.05


def test_weights_of_another_shape_are_one_clear_error_and_change_nothing() -> None:
    golden = load_golden(GOLDEN / "d2v1_audio.npz")
    model = build_1()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    student = golden.under("state")
    with pytest.raises(CheckpointError, match=r"feed_forward\.fc1\.weight"):
        load_published(model, {**student, "encoder.layers.0.fc1.weight": torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match="no place"):
        load_published(model, {**student, "encoder.layers.0.surprise": torch.zeros(1)})
    del student["encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(CheckpointError, match=r"no encoder\.layers\.1\.self_attn\.k_proj\.bias"):
        load_published(model, student)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
