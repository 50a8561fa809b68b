"""Agreement with ``Data2VecTextModel`` of Hugging Face's transformers, randomly initialised, at every layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import Data2VecTextConfig, Data2VecTextForMaskedLM, Data2VecTextModel

from data2vec.core import Batch, Data2Vec, Experiment
from data2vec.core.errors import CheckpointError
from data2vec.core.model.encoder import Collect
from data2vec.core.settings.fields import LayerOutput, NormOrder, TransformerConfig
from data2vec.core.settings.pretraining import TargetsConfig, TeacherConfig, TeacherShares
from data2vec.core.testing import relative_error
from data2vec.text import Text
from data2vec.text.published import load_transformers

TOLERANCE = 1e-5
Shape = tuple[int, int, int, int, int, int, int, float]
SHAPES: list[
    Shape
] = [  # blocks, width, heads, feed-forward, vocabulary, longest text, token types, epsilon of the norms
    (2, 24, 3, 48, 41, 30, 1, 1e-5),
    (3, 32, 2, 128, 300, 64, 2, 1e-12),
    (1, 16, 4, 20, 20, 12, 1, 1e-6),
]


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter random, so that none can be forgotten: transformers starts norms at one and biases at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            parameter.copy_(0.3 * noise + (1.0 if name.endswith("LayerNorm.weight") else 0.0))
    return model.eval()


def theirs(shape: Shape) -> Data2VecTextConfig:
    depth, width, heads, hidden, vocabulary, block, types, eps = shape
    return Data2VecTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=hidden,
        max_position_embeddings=block + 2,
        type_vocab_size=types,
        layer_norm_eps=eps,
    )


def ours(shape: Shape, shares: TeacherShares = TeacherShares.FRONTEND) -> Data2Vec:
    depth, width, heads, hidden, vocabulary, block, _, eps = shape
    return Data2Vec.build(
        Experiment(
            modalities={"text": Text(vocabulary=vocabulary, block=block)},
            transformer=TransformerConfig(
                depth=depth,
                width=width,
                heads=heads,
                mlp_ratio=hidden / width,
                norm_order=NormOrder.POST,
                norm_eps=eps,
            ),
            teacher=TeacherConfig(shares=shares),
            targets=TargetsConfig(top_k=1),
        )
    ).eval()


def batch(vocabulary: int, lengths: list[int]) -> tuple[Batch, Tensor]:
    """Texts of these lengths, padded, and (B, T) bool what is valid."""
    valid = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    tokens = torch.randint(4, vocabulary, valid.shape, generator=torch.Generator().manual_seed(2)).masked_fill(
        ~valid, 1
    )
    padded = None if bool(valid.all()) else torch.tensor(lengths)
    return Batch("text", tokens, torch.arange(len(lengths)), torch.full((len(lengths),), -1), padded), valid


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [[12, 12], [12, 1, 7], [3]])
@pytest.mark.parametrize("shares", [TeacherShares.FRONTEND, TeacherShares.NOTHING])
def test_hidden_states_of_every_layer(shape, lengths, shares) -> None:
    torch.manual_seed(0)
    reference, model = randomised(Data2VecTextModel(theirs(shape))), ours(shape, shares)
    load_transformers(model, reference.state_dict())
    texts, valid = batch(shape[4], lengths)
    states = reference(texts.inputs, attention_mask=valid.long(), output_hidden_states=True).hidden_states
    for encoder in (model.student, model.teacher.encoder):
        tokens = encoder.frontend("text").extractor(texts.inputs, texts.lengths)
        encoded = encoder.encode("text", tokens, collect=Collect(LayerOutput.BLOCK))
        assert len(states) == 1 + len(encoded.layers) == 1 + shape[0]
        for theirs_x, ours_x in zip(states, [tokens.x, *encoded.layers], strict=True):
            assert relative_error(ours_x[valid], theirs_x[valid]) < TOLERANCE
            assert (ours_x[valid] - theirs_x[valid]).abs().max() < TOLERANCE
    for number in range(1, shape[0] + 1):
        features = model.features(texts, layers=number)
        assert relative_error(features.x[valid], states[number][valid]) < TOLERANCE


def test_a_model_with_a_head_gives_its_encoder() -> None:
    torch.manual_seed(0)
    with_head = randomised(Data2VecTextForMaskedLM(theirs(SHAPES[0])))
    one, other = ours(SHAPES[0]), ours(SHAPES[0])
    predictor = {name: value.clone() for name, value in one.own_state().items() if name.startswith("predictors.")}
    load_transformers(one, with_head.state_dict())
    load_transformers(other, with_head.data2vec_text.state_dict())
    for name, value in one.own_state().items():
        expected = predictor[name] if name in predictor else other.own_state()[name]
        assert torch.equal(value, expected), name
    assert predictor


def test_states_that_do_not_fit_are_one_clear_error_and_change_nothing() -> None:
    state = Data2VecTextModel(theirs(SHAPES[0])).state_dict()
    model = ours(SHAPES[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="no place"):
        load_transformers(model, {**state, "encoder.layer.0.attention.self.surprise.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"it has no student\.frontends\.text\.extractor\.embed\.weight"):
        load_transformers(model, {n: v for n, v in state.items() if n != "embeddings.word_embeddings.weight"})
    with pytest.raises(CheckpointError, match="queries, keys and values do not match"):
        load_transformers(model, {n: v for n, v in state.items() if n != "encoder.layer.1.attention.self.key.weight"})
    with pytest.raises(CheckpointError, match=r"positions\.weight is \(31, 24\) there and \(65, 24\) here"):
        load_transformers(ours((*SHAPES[0][:5], 64, 1, 1e-5)), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
