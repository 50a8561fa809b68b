"""Hugging Face's Data2VecAudioModel, randomly initialised and loaded into ours: every layer agrees.

One clip at a time: its position convolutions let padding reach the clip, as the authors' do (``test_golden_audio``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioForAudioFrameClassification,
    Data2VecAudioForCTC,
    Data2VecAudioForSequenceClassification,
    Data2VecAudioForXVector,
    Data2VecAudioModel,
)

from data2vec.core import Batch, Data2Vec, Experiment
from data2vec.core.errors import CheckpointError
from data2vec.core.settings.fields import NormOrder, TransformerConfig
from data2vec.core.settings.pretraining import TargetsConfig
from data2vec.core.testing import relative_error
from data2vec.speech import PositionsConfig, Speech
from data2vec.speech.published import load_transformers

TOLERANCE = 1e-5
SHAPES: list[dict[str, Any]] = [
    {},
    {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 1, "intermediate_size": 96},
    {"conv_dim": (8,), "conv_kernel": (40,), "conv_stride": (16,), "num_conv_pos_embeddings": 1},
    {"conv_pos_kernel_size": 6, "num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 2},  # an even kernel
    {"mask_time_prob": 0.0},  # then there is no mask vector
]


def theirs(**changes: Any) -> Data2VecAudioModel:
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "conv_dim": (16, 16, 24),
        "conv_kernel": (10, 3, 2),
        "conv_stride": (5, 2, 2),
        "conv_pos_kernel_size": 5,
        "num_conv_pos_embeddings": 3,
        "num_conv_pos_embedding_groups": 4,
    }
    torch.manual_seed(0)
    model = Data2VecAudioModel(Data2VecAudioConfig(**settings | changes)).eval()
    with torch.no_grad():  # away from the ones and zeros that a confusion of two norms or biases would not change
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ours(config: Data2VecAudioConfig) -> Data2Vec:
    depth = config.num_conv_pos_embeddings
    speech = Speech(
        channels=tuple(config.conv_dim),
        kernels=tuple(config.conv_kernel),
        strides=tuple(config.conv_stride),
        positions=PositionsConfig(config.conv_pos_kernel_size * depth, depth, config.num_conv_pos_embedding_groups),
    )
    transformer = TransformerConfig(
        depth=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        norm_order=NormOrder.POST,
        norm_eps=config.layer_norm_eps,
    )
    assert speech.problems(transformer) == []
    return Data2Vec.build(
        Experiment(modalities={"speech": speech}, transformer=transformer, targets=TargetsConfig(top_k=1))
    )


@pytest.mark.parametrize("changes", SHAPES)
def test_every_layer_agrees(changes: dict[str, Any]) -> None:
    reference = theirs(**changes)
    model = ours(reference.config)
    load_transformers(model, reference.state_dict())
    frontend = model.student.frontend("speech")
    for length in (400, 1003):
        waveform = torch.randn(1, length)
        with torch.no_grad():
            expected = reference(waveform, output_hidden_states=True)
        batch = Batch("speech", waveform, torch.arange(1), torch.tensor([-1]))
        assert expected.extract_features.shape[1] == frontend.extractor.grid(waveform)[0][0]
        model.eval()
        embedded = frontend(frontend.extractor(waveform).x, None, None)
        assert relative_error(embedded, expected.hidden_states[0]) < TOLERANCE
        for of in ("student", "teacher"):
            assert relative_error(model.features(batch, layers="last", of=of).x, expected.last_hidden_state) < TOLERANCE
            for number in range(1, reference.config.num_hidden_layers + 1):
                features = model.features(batch, layers=number, of=of).x
                assert relative_error(features, expected.hidden_states[number]) < TOLERANCE
    if "masked_spec_embed" in reference.state_dict():
        assert torch.equal(model.mask_tokens["speech"], reference.masked_spec_embed)


@pytest.mark.parametrize(
    "kind",
    [
        Data2VecAudioForCTC,
        Data2VecAudioForSequenceClassification,
        Data2VecAudioForAudioFrameClassification,
        Data2VecAudioForXVector,
    ],
)
def test_the_model_inside_one_with_a_head_is_loaded(kind: type, caplog: pytest.LogCaptureFixture) -> None:
    config = theirs().config
    config.vocab_size, config.use_weighted_layer_sum = 12, True
    torch.manual_seed(1)
    reference = kind(config).eval()
    model = ours(config)
    with caplog.at_level("INFO", "data2vec"):
        load_transformers(model, reference.state_dict())
    assert [record.message.split(" (")[0] for record in caplog.records] == ["left out: the head"]
    assert ("lm_head.weight" if kind is Data2VecAudioForCTC else "classifier.weight") in caplog.text
    model.eval()
    waveform = torch.randn(1, 1003)
    with torch.no_grad():
        expected = reference.data2vec_audio(waveform).last_hidden_state
    batch = Batch("speech", waveform, torch.arange(1), torch.tensor([-1]))
    for of in ("student", "teacher"):
        assert relative_error(model.features(batch, layers="last", of=of).x, expected) < TOLERANCE
    with pytest.raises(CheckpointError, match="no place"):
        load_transformers(model, {**reference.state_dict(), "other.weight": torch.zeros(1)})


def test_the_predictor_stays_and_wrong_weights_change_nothing() -> None:
    reference = theirs()
    model = ours(reference.config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = reference.state_dict()
    with pytest.raises(CheckpointError, match="no place"):
        load_transformers(model, {**state, "lm_head.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"projection\.weight is"):
        load_transformers(model, {**state, "feature_projection.projection.weight": torch.zeros(2, 2)})
    missing = {name: value for name, value in state.items() if not name.startswith("encoder.layers.2")}
    with pytest.raises(CheckpointError, match=r"no student\.transformer\.blocks\.2"):
        load_transformers(model, missing)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    load_transformers(model, state)
    after = model.state_dict()
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        "predictors.speech.layers.0.weight",
        "predictors.speech.layers.0.bias",
    }
