"""Agreement with ``Data2VecVisionModel`` of Hugging Face's transformers, randomly initialised, at every layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Data2VecVisionConfig, Data2VecVisionForImageClassification, Data2VecVisionModel

from data2vec.core import Batch, Data2Vec, Experiment
from data2vec.core.errors import CheckpointError
from data2vec.core.model.encoder import Collect
from data2vec.core.settings.fields import LayerOutput, TransformerConfig
from data2vec.core.settings.pretraining import TargetsConfig, TeacherConfig, TeacherShares
from data2vec.core.testing import relative_error
from data2vec.vision import MaskConfig, PositionKind, Vision
from data2vec.vision.published import load_transformers

TOLERANCE = 1e-5
SHARED = {"use_shared_relative_position_bias": True, "use_mean_pooling": False}
SHAPES: list[dict[str, Any]] = [
    SHARED,
    {**SHARED, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 40, "layer_scale_init_value": 0.0},
    {**SHARED, "image_size": 40, "num_channels": 1, "use_mask_token": True, "layer_norm_eps": 1e-6},
    {"use_mean_pooling": False, "num_hidden_layers": 3},  # no positions
    {**SHARED, "use_mean_pooling": True},
]


def configuration(**changes: Any) -> Data2VecVisionConfig:
    small = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
    }
    return Data2VecVisionConfig(**{**small, **changes})


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter random, so that none can be forgotten: transformers starts many at zero or one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            is_scale = name.rpartition(".")[2].startswith("lambda") or ("layernorm" in name and name.endswith("weight"))
            parameter.copy_(0.3 * noise + (1.0 if is_scale else 0.0))
    return model.eval()


def ours(config: Data2VecVisionConfig, shares: TeacherShares = TeacherShares.EXTRACTOR) -> Data2Vec:
    biased = config.use_shared_relative_position_bias or config.use_relative_position_bias
    vision = Vision(
        image_size=config.image_size,
        patch_size=config.patch_size,
        channels=config.num_channels,
        positions=PositionKind.RELATIVE if biased else PositionKind.NONE,
        mask=MaskConfig(min_block=1),
    )
    transformer = TransformerConfig(
        depth=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        norm_eps=config.layer_norm_eps,
        layer_scale=config.layer_scale_init_value or None,
    )
    experiment = Experiment(
        modalities={"vision": vision},
        transformer=transformer,
        teacher=TeacherConfig(shares=shares),
        targets=TargetsConfig(top_k=1),
    )
    return Data2Vec.build(experiment).eval()


def pictures(config: Data2VecVisionConfig) -> Tensor:
    shape = (3, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def compare(reference: nn.Module, model: Data2Vec, config: Data2VecVisionConfig) -> None:
    """Every hidden state of student and teacher, the CLS token's included."""
    inputs = pictures(config)
    found = reference(inputs, output_hidden_states=True)
    states = found.hidden_states
    for encoder in (model.student, model.teacher.encoder):
        frontend = encoder.frontend("vision")
        tokens = frontend.extractor(inputs)
        embedded = frontend(tokens.x, None, None)
        encoded = encoder.encode("vision", tokens, collect=Collect(LayerOutput.BLOCK))
        assert len(states) == 1 + len(encoded.layers) == 1 + config.num_hidden_layers
        for theirs_x, ours_x in zip(states, [embedded, *encoded.layers], strict=True):
            assert relative_error(ours_x, theirs_x) < TOLERANCE
            assert (ours_x - theirs_x).abs().max() < 1e-5 * max(1.0, float(theirs_x.abs().max()))
        if not config.use_mean_pooling:
            assert relative_error(encoded.x, found.last_hidden_state) < TOLERANCE


@pytest.mark.parametrize("shares", [TeacherShares.EXTRACTOR, TeacherShares.NOTHING])
@pytest.mark.parametrize("changes", SHAPES)
def test_hidden_states_of_every_layer(changes: dict[str, Any], shares: TeacherShares) -> None:
    config = configuration(**changes)
    reference, model = randomised(Data2VecVisionModel(config)), ours(config, shares)
    load_transformers(model, reference.state_dict())
    compare(reference, model, config)
    if config.use_mask_token:
        assert torch.equal(model.mask_tokens["vision"], reference.embeddings.mask_token.flatten())
    images = pictures(config)
    batch = Batch("vision", images, torch.arange(len(images)), torch.full((len(images),), -1))
    states = reference(images, output_hidden_states=True).hidden_states
    assert relative_error(model.features(batch, layers=1).x, states[1][:, 1:]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("size", [24, 48, 64])
def test_another_image_size_differs_by_how_the_relative_positions_are_resampled(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bilinear there and bicubic here: docs/agreement.md gives the figure."""
    torch.manual_seed(0)
    config = configuration(**SHARED)
    reference, model = Data2VecVisionModel(config).eval(), ours(config)
    reference.encoder.relative_position_bias.relative_position_bias_table.normal_()
    load_transformers(model, reference.state_dict())
    images = torch.randn(3, 3, size, size)
    theirs = reference(images).last_hidden_state

    def error() -> float:
        return relative_error(model.student("vision", images)[0].x, theirs)

    assert 1e-4 < error() < 1e-3

    def bilinear(table: Tensor, _: object, shape: tuple[int, ...]) -> Tensor:
        return nn.functional.interpolate(table.unsqueeze(0), size=shape[1:], mode="bilinear").squeeze(0)

    monkeypatch.setattr("data2vec.vision.extractor.resize_rel_pos_bias_table_simple", bilinear)
    assert error() < TOLERANCE


def test_equal_biases_of_all_blocks_are_one_and_different_ones_an_error() -> None:
    config = configuration(use_relative_position_bias=True, use_mean_pooling=False)
    reference, model = randomised(Data2VecVisionModel(config)), ours(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="relative position bias of its own"):
        load_transformers(model, reference.state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    tables = [layer.attention.attention.relative_position_bias for layer in reference.encoder.layer]
    tables[1].load_state_dict(tables[0].state_dict())
    load_transformers(model, reference.state_dict())
    compare(reference, model, config)


def test_a_classifier_gives_its_encoder() -> None:
    config = configuration(**SHARED)
    classifier = randomised(Data2VecVisionForImageClassification(config))
    one, other = ours(config), ours(config)
    load_transformers(one, classifier.state_dict())
    load_transformers(other, classifier.data2vec_vision.state_dict())
    for name, value in one.own_state().items():
        if name.startswith(("student.", "teacher.")):
            assert torch.equal(value, other.own_state()[name]), name


def test_states_that_do_not_fit_are_one_clear_error_and_change_nothing() -> None:
    config = configuration(**SHARED)
    state, model = Data2VecVisionModel(config).state_dict(), ours(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"no place.*position_embeddings"):
        load_transformers(model, {**state, "embeddings.position_embeddings": torch.zeros(1, 17, 24)})
    with pytest.raises(CheckpointError, match=r"it has no student\.frontends\.vision\.prefix"):
        load_transformers(model, {name: value for name, value in state.items() if name != "embeddings.cls_token"})
    value_bias = "encoder.layer.1.attention.attention.value.bias"
    with pytest.raises(CheckpointError, match="block 1: queries, keys and values do not match in bias"):
        load_transformers(model, {name: value for name, value in state.items() if name != value_bias})
    with pytest.raises(CheckpointError, match="there and"):
        load_transformers(ours(configuration(**{**SHARED, "intermediate_size": 24})), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
