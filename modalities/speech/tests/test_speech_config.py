"""The settings of speech: what they build, and what is said about wrong ones."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
import torch

from data2vec.core import Experiment
from data2vec.core.batch import Batch, Sample
from data2vec.core.errors import SampleError
from data2vec.core.modality import Modality
from data2vec.core.model.attention import Alibi
from data2vec.core.settings.fields import TransformerConfig
from data2vec.core.settings.overrides import apply_overrides, to_yaml
from data2vec.core.settings.pretraining import PredictorConfig, PredictorKind
from data2vec.speech import (
    AudioConfig,
    AudioDecoder,
    MaskConfig,
    MaskKind,
    PositionConvolutions,
    PositionsConfig,
    SpanMasker,
    Speech,
    SpeechExtractor,
)
from data2vec.speech.samples import POSITION_CLASSES

BASE = TransformerConfig()
TINY = TransformerConfig(depth=2, width=24, heads=3)
SMALL = {"channels": (8, 8), "kernels": (10, 4), "strides": (5, 4), "positions": PositionsConfig(9, 3, 4)}


def wav(length: int, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).normal(0, 0.1, length), rate, format="WAV")
    return file.getvalue()


def sample(length: int, number: int = 7) -> Sample:
    return Sample(f"clip{number}", "train-0000.tar", number, {"wav": wav(length)})


def test_the_defaults_are_sound():
    speech = Speech()
    assert speech.problems(BASE) == []
    assert (speech.geometry.receptive_field, speech.geometry.hop, speech.shortest) == (400, 320, 720)
    assert speech.length_range == (32_000, 320_000)
    assert speech.uses_mask_token
    assert not speech.has_cls_token
    assert speech.length_unit == "samples at 16 kHz"
    assert Modality.by_name("speech") is Speech


@pytest.mark.parametrize(
    ("speech", "problem"),
    [
        (Speech(channels=()), "speech.channels=[]: give one number of 1 or more for each convolution"),
        (Speech(strides=(5, 2, 2, 2, 2, 2, 0)), "speech.strides=[5, 2, 2, 2, 2, 2, 0]: give one number of 1 or more"),
        (Speech(kernels=(10, 3)), "speech.channels=[512, 512, 512, 512, 512, 512, 512]: 7 channels, 2 kernels, 7 str"),
        (
            Speech(mel=True),
            "speech.mel=true: speech.channels begins with 512 and speech.kernels with 10; choose a multiple of 4 filt",
        ),
        (
            Speech(mel=True, channels=(30,) * 7, kernels=(64, 3, 3, 3, 3, 2, 2)),
            "speech.mel=true: speech.channels begins with 30 and",
        ),
        (Speech(audio=AudioConfig(min_length=719)), "speech.audio.min_length=719: shorter than 2 frames; choose 720"),
        (
            Speech(audio=AudioConfig(max_length=31_999)),
            "speech.audio.max_length=31999: below the shortest clip of 32000 samples; choose 32000 or more, or null",
        ),
        (Speech(mask=MaskConfig(masks=0)), "speech.mask.masks=0: must be 1 or more"),
        (Speech(mask=MaskConfig(length=0)), "speech.mask.length=0: must be 1 or more"),
        (Speech(mask=MaskConfig(min_spans=0)), "speech.mask.min_spans=0: must be 1 or more"),
        (Speech(mask=MaskConfig(ratio=0.0)), "speech.mask.ratio=0.0: must be above 0 and below speech.mask.length=10"),
        (Speech(mask=MaskConfig(ratio=10.0)), "speech.mask.ratio=10.0: must be above 0 and below speech.mask.length"),
        (Speech(mask=MaskConfig(MaskKind.EXACT_SPAN, 1.0)), "speech.mask.ratio=1.0: must be above 0 and below 1"),
        (Speech(mask=MaskConfig(MaskKind.EXACT_SPAN, 0.5, adjust=-0.1)), "speech.mask.adjust=-0.1: must be 0 or more"),
        (Speech(positions=PositionsConfig(depth=-1)), "speech.positions.depth=-1: must be 0 or more"),
        (Speech(positions=PositionsConfig(width=0)), "speech.positions.width=0: must be 1 or more"),
        (
            Speech(positions=PositionsConfig(groups=10)),
            "speech.positions.groups=10: does not divide transformer.width=768; choose a divisor",
        ),
        (Speech(blocks=-1), "speech.blocks=-1: must be 0 or more"),
        (Speech(dropout=1.0), "speech.dropout=1.0: must be from 0 to below 1"),
        (Speech(predictor=PredictorConfig(PredictorKind.CONV2D)), "speech.predictor.kind=conv2d: speech has one dim"),
        (
            Speech(predictor=PredictorConfig(PredictorKind.CONV1D, groups=5)),
            "speech.predictor.groups=5: does not divide transformer.width=768",
        ),
        (
            Speech(predictor=PredictorConfig(PredictorKind.CONV1D, groups=16, width=100)),
            "speech.predictor.groups=16: does not divide speech.predictor.width=100",
        ),
        (Speech(predictor=PredictorConfig(input_dropout=1.0)), "speech.predictor.input_dropout=1.0: must be from 0"),
        (Speech(predictor=PredictorConfig(projection_ratio=0)), "speech.predictor.projection_ratio=0: must be above"),
    ],
)
def test_a_wrong_setting_is_named(speech, problem):
    found = speech.problems(BASE)
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_all_problems_are_listed():
    wrong = Speech(dropout=2.0, audio=AudioConfig(10, 5), mask=MaskConfig(masks=0), positions=PositionsConfig(0, 5, 5))
    assert len(wrong.problems(BASE)) == 6


def test_settings_survive_overrides_and_yaml():
    experiment = Experiment(modalities={"speech": Speech()})
    changed = apply_overrides(
        experiment, ["speech.channels=[8,8]", "speech.mask.kind=exact_span", "speech.audio.max_length=null"]
    )
    speech = changed.modalities["speech"]
    assert speech.channels == (8, 8)
    assert speech.mask.kind is MaskKind.EXACT_SPAN
    assert speech.length_range == (32_000, None)
    assert "exact_span" in to_yaml(changed)


def test_the_frontend_follows_the_settings():
    frontend = Speech(**SMALL, alibi=True, blocks=2).build_frontend(TINY)
    assert isinstance(frontend.extractor, SpeechExtractor)
    assert (frontend.extractor.hop, frontend.extractor.receptive_field) == (20, 25)
    assert isinstance(frontend.positions, PositionConvolutions)
    assert [tuple(c.weight.shape) for c in frontend.positions.convolutions] == [(24, 6, 3)] * 3
    assert isinstance(frontend.bias, Alibi)
    assert frontend.bias.scale is not None
    assert len(frontend.blocks) == 2
    assert frontend.dropout.p == 0.1
    plain = Speech(**SMALL | {"positions": PositionsConfig(depth=0)}, input_norm=False).build_frontend(TINY)
    assert plain.positions is None
    assert plain.bias is None
    assert isinstance(plain.input_norm, torch.nn.Identity)
    fixed = Speech(**SMALL, alibi=True, alibi_learned_scale=False).build_frontend(TINY)
    assert isinstance(fixed.bias, Alibi)
    assert fixed.bias.scale is None


def test_every_parameter_is_initialised():
    """Memory is not zero by accident: what PyTorch allocates is filled with NaN meanwhile."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        frontend = Speech(**SMALL, alibi=True, blocks=1).build_frontend(TINY)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not [name for name, value in frontend.named_parameters() if not torch.isfinite(value).all()]


def test_the_maskers_follow_the_settings():
    assert Speech().build_masker() == SpanMasker(0.65, 10, 1)
    exact = Speech(mask=MaskConfig(MaskKind.EXACT_SPAN, 0.5, 5, masks=8)).build_masker()
    assert exact == SpanMasker(0.5, 5, 8, exact=True, adjust=0.05)


def test_decoded_clips_become_a_padded_batch_that_the_extractor_reads():
    speech = Speech(audio=AudioConfig(min_length=1_600))
    decoder = speech.build_decoder(train=True)
    assert decoder == AudioDecoder(speech.audio, True, 720, 320, 400)
    samples = [sample(2_000, 1), sample(5_000, 2)]
    batch = speech.collate(samples, [decoder(clip, 0) for clip in samples])
    assert batch.inputs.shape == (2, 5_000)
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [2_000, 5_000]
    assert speech.length_of(samples[1].members) == 5_000
    assert speech.exhibit.raw_features(batch).shape[0] == 2
    assert speech.exhibit.raw_positions(batch).shape[:2] == (2, speech.geometry.frames(5_000))
    with pytest.raises(SampleError, match="719 samples"):
        speech.build_decoder(train=False)(sample(719), 0)
    assert len(speech.build_decoder(train=False)(sample(720), 0).inputs) == 720


def test_classes_of_frames_have_names():
    classes = POSITION_CLASSES
    assert len(set(classes)) == len(classes) > 1


def test_raw_features_ignore_the_padding():
    torch.manual_seed(0)
    clip = torch.randn(4_000)
    padded = torch.cat([clip, torch.zeros(2_000)])
    ids, unknown = torch.arange(1), torch.tensor([-1])
    alone = Batch("speech", clip[None], ids, unknown)
    together = Batch("speech", padded[None], ids, unknown, torch.tensor([4_000]))
    torch.testing.assert_close(Speech().exhibit.raw_features(together), Speech().exhibit.raw_features(alone))
