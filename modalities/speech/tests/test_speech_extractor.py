"""The waveform's convolutions and the position convolutions, and that padding reaches nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data2vec.core import Batch, Data2Vec, Experiment
from data2vec.core.model.mask import Mask
from data2vec.core.pretraining.masked import Masked
from data2vec.core.settings.fields import NormOrder, TransformerConfig
from data2vec.core.settings.pretraining import PredictorConfig, PredictorKind, StudentSees, TargetsConfig, TeacherConfig
from data2vec.core.testing import relative_error
from data2vec.speech import Geometry, MaskConfig, MaskKind, PositionConvolutions, PositionsConfig, Speech
from data2vec.speech import SpeechExtractor as Extractor
from data2vec.speech.extractor import mel_filters, position_kernel
from data2vec.speech.features import hertz_to_mel

TINY = Speech(
    channels=(8, 8, 8),
    kernels=(10, 3, 2),
    strides=(5, 2, 2),  # receptive field 30, hop 20
    positions=PositionsConfig(width=8, depth=2, groups=2),
    dropout=0.0,
    mask=MaskConfig(length=3),
)
TRANSFORMER = TransformerConfig(depth=2, width=16, heads=2, norm_order=NormOrder.POST, norm_eps=1e-5)
GARBAGE = [0.0, 7.5, float("inf"), float("nan")]


def tiny_extractor() -> Extractor:
    torch.manual_seed(0)
    return Extractor(TINY.channels, TINY.kernels, TINY.strides, width=16)


def test_the_published_shape():
    speech = Speech()
    assert (speech.geometry.receptive_field, speech.geometry.hop) == (400, 320)
    assert speech.geometry.frames(16_000) == 49
    assert position_kernel(95, 5) == 19
    assert position_kernel(4, 5) == 3


def test_filters_on_the_mel_scale():
    filters = mel_filters(64, 256)
    assert filters.shape == (64, 1, 256)
    torch.testing.assert_close(filters.norm(dim=-1), torch.ones(64, 1))
    spectrum = torch.fft.rfft(filters[:, 0], n=16_000).abs()  # a coefficient for every Hz
    places = hertz_to_mel(spectrum.argmax(dim=1).double())
    expected = torch.linspace(float(hertz_to_mel(torch.tensor(60.0))), float(hertz_to_mel(torch.tensor(7600.0))), 16)
    assert ((places - expected.repeat_interleave(4)).abs() < 30)[4:].all()  # the lowest band mixes with its mirror
    phases = filters.view(16, 4, 256)
    torch.testing.assert_close(phases[:, 0], -phases[:, 2])
    torch.testing.assert_close(phases[:, 1], -phases[:, 3])


def test_the_first_convolution_starts_from_filters_and_is_trained():
    torch.manual_seed(0)
    extractor = Extractor((8, 8), (64, 4), (16, 4), width=16, mel=True)
    weights = [module.weight for module in extractor.convolutions.modules() if isinstance(module, nn.Conv1d)]
    assert torch.equal(weights[0], mel_filters(8, 64))
    assert weights[0].requires_grad
    assert not torch.equal(weights[1][:4], weights[1][4:])
    speech = replace(TINY, channels=(8, 8, 8), kernels=(64, 3, 2), mel=True)
    built = speech.build_frontend(TRANSFORMER).extractor
    first = next(module for module in built.modules() if isinstance(module, nn.Conv1d))
    assert torch.equal(first.weight, mel_filters(8, 64))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=4), st.integers(1, 300))
def test_frames_are_what_the_convolutions_give(layers, length):
    kernels, strides = zip(*layers, strict=True)
    geometry = Geometry(kernels, strides)
    expected = length
    for kernel, stride in layers:
        expected = (expected - kernel) // stride + 1 if expected >= kernel else 0
    assert geometry.frames(length) == expected
    assert geometry.frames(torch.tensor([length])).tolist() == [expected]
    x = torch.zeros(1, 1, length)
    if expected:
        for kernel, stride in layers:
            x = nn.functional.conv1d(x, torch.ones(1, 1, kernel), stride=stride)
        assert x.shape[-1] == expected
    assert geometry.frames(geometry.receptive_field) == 1
    assert geometry.frames(geometry.receptive_field - 1) == 0
    assert geometry.frames(geometry.receptive_field + geometry.hop) == 2


@settings(max_examples=20)
@given(st.integers(30, 200))
def test_the_extractor_gives_as_many_frames_as_it_says(length):
    extractor = tiny_extractor()
    tokens = extractor(torch.randn(2, length))
    assert tokens.x.shape == (2, extractor.frames(length), 16)
    assert tokens.shape == (extractor.frames(length),)
    assert tokens.padding is None
    assert (extractor.hop, extractor.receptive_field) == (20, 30)
    assert extractor.grid(torch.empty(2, length)) == (tokens.shape, None)


def test_a_frame_sees_its_receptive_field_and_nothing_else():
    extractor = tiny_extractor()
    x = torch.randn(1, 150).requires_grad_()
    extractor(x).x[0, 3].square().sum().backward()
    assert x.grad is not None
    assert x.grad[0].nonzero().flatten().tolist() == list(range(60, 90))


@settings(max_examples=25)
@given(st.lists(st.integers(30, 160), min_size=1, max_size=4), st.sampled_from(GARBAGE), st.integers(0, 40))
def test_padding_changes_no_frame(lengths, garbage, extra):
    extractor = tiny_extractor()
    clips, inputs = pad(lengths, garbage, extra)
    tokens = extractor(inputs, torch.tensor(lengths))
    assert tokens.padding is not None
    assert (tokens.x[tokens.padding] == 0).all()
    for clip, x, padding in zip(clips, tokens.x, tokens.padding, strict=True):
        assert int((~padding).sum()) == extractor.frames(len(clip))
        torch.testing.assert_close(x[~padding], extractor(clip[None]).x[0], rtol=1e-5, atol=1e-6)


def pad(lengths: list[int], garbage: float, extra: int) -> tuple[list[Tensor], Tensor]:
    """Random clips, and the same side by side with ``garbage`` behind each."""
    generator = torch.Generator().manual_seed(sum(lengths))
    clips = [torch.randn(length, generator=generator) for length in lengths]
    inputs = torch.full((len(clips), max(lengths) + extra), garbage)
    for row, clip in zip(inputs, clips, strict=True):
        row[: len(clip)] = clip
    return clips, inputs


@pytest.mark.parametrize(
    ("inputs", "lengths", "message"),
    [
        (torch.zeros(2, 1, 100), None, r"must be \(B, L\)"),
        (torch.zeros(2, 29), None, "a clip of 29 samples has no frame; 30 make the first one"),
        (torch.zeros(2, 100), torch.tensor([100, 29]), "a clip of 29 samples has no frame"),
    ],
)
def test_what_has_no_frames_is_one_clear_error(inputs, lengths, message):
    with pytest.raises(ValueError, match=message):
        tiny_extractor()(inputs, lengths)


@pytest.mark.parametrize("kernel", [3, 4, 7, 8])
@pytest.mark.parametrize("depth", [1, 3])
def test_position_convolutions_ignore_padding_and_keep_the_length(kernel, depth):
    torch.manual_seed(1)
    positions = PositionConvolutions(8, kernel=kernel, depth=depth, groups=2)
    x = torch.randn(3, 12, 8)
    frames = torch.tensor([12, 9, 1])
    padding = torch.arange(12) >= frames[:, None]
    padded = positions(x.masked_fill(padding[..., None], 1e3), padding)
    assert padded.shape == x.shape
    for row, count, made in zip(x, frames.tolist(), padded, strict=True):
        torch.testing.assert_close(made[:count], positions(row[None, :count])[0], rtol=1e-5, atol=1e-5)
    leaked = positions(x.masked_fill(padding[..., None], 1e3))[1, :9]  # what the padding mask prevents
    assert not torch.allclose(leaked, padded[1, :9], atol=1e-3)


@pytest.mark.parametrize("kernel", [4, 7])
def test_position_convolutions_look_both_ways(kernel):
    """An even kernel looks one frame further back than ahead, as in the authors' code."""
    torch.manual_seed(2)
    positions = PositionConvolutions(8, kernel=kernel, depth=1, groups=1)
    x = torch.randn(1, 20, 8).requires_grad_()
    positions(x)[0, 10].square().sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert seen == list(range(10 - kernel // 2, 10 - kernel // 2 + kernel))


def model_of(version: int) -> tuple[Speech, Data2Vec]:
    torch.manual_seed(version)
    speech, sees = TINY, StudentSees.ALL
    if version == 2:
        predictor = PredictorConfig(kind=PredictorKind.CONV1D, layers=2, width=8, groups=2, mask_noise=0.0)
        mask = MaskConfig(kind=MaskKind.EXACT_SPAN, ratio=0.5, length=3, masks=3)
        speech, sees = replace(TINY, alibi=True, blocks=1, mask=mask, predictor=predictor), StudentSees.VISIBLE
    experiment = Experiment(
        modalities={"speech": speech},
        student_sees=sees,
        transformer=TRANSFORMER,
        teacher=TeacherConfig(),
        targets=TargetsConfig(top_k=2),
    )
    return speech, Data2Vec.build(experiment)


@pytest.mark.parametrize("version", [1, 2])
@settings(max_examples=12)
@given(st.lists(st.integers(65, 300), min_size=2, max_size=4), st.sampled_from(GARBAGE), st.integers(0, 60))
def test_a_padded_batch_gives_every_clip_what_it_gets_alone(version, lengths, garbage, extra):
    """Features, targets, masks and loss, of 1.0 and 2.0, whatever lies behind the clips."""
    speech, model = model_of(version)
    masker = speech.build_masker()
    clips, inputs = pad(lengths, garbage, extra)
    ids = torch.arange(len(clips)) + 40

    def loss_of(batch: Batch) -> tuple[Tensor, int]:
        shape, frames = model.student.frontend("speech").extractor.grid(batch.inputs, batch.lengths)
        padding = None if frames is None else torch.arange(shape[0]) >= frames[:, None]
        hidden = masker(batch.ids, shape, seed=1, update=2, lengths=frames)
        output = model(Masked(batch, Mask.of(hidden, visible_only=version == 2, padding=padding)))
        return output.total, output.count

    unknown = torch.full((len(clips),), -1)
    together = Batch("speech", inputs, ids, unknown, torch.tensor(lengths))
    features, targets = model.features(together), model.make_targets(together)
    assert features.padding is not None
    total, count = 0.0, 0
    for index, clip in enumerate(clips):
        alone = Batch("speech", clip[None], ids[index : index + 1], unknown[:1])
        kept = ~features.padding[index]
        assert relative_error(features.x[index][kept], model.features(alone).x[0]) < 1e-5
        assert relative_error(targets[index][kept], model.make_targets(alone)[0]) < 1e-4
        part, hidden = loss_of(alone)
        total, count = total + float(part.detach()), count + hidden
    loss, hidden = loss_of(together)
    assert hidden == count
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("version", [1, 2])
def test_garbage_in_the_padding_leaves_gradients_finite(version):
    speech, model = model_of(version)
    _, inputs = pad([200, 90], float("nan"), 11)
    batch = Batch("speech", inputs, torch.arange(2), torch.full((2,), -1), torch.tensor([200, 90]))
    shape, frames = model.student.frontend("speech").extractor.grid(batch.inputs, batch.lengths)
    hidden = speech.build_masker()(batch.ids, shape, seed=0, update=0, lengths=frames)
    padding = torch.arange(shape[0]) >= frames[:, None]
    model(Masked(batch, Mask.of(hidden, visible_only=version == 2, padding=padding))).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) > 30
    assert not [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
