"""The heads: which positions they predict, and that padding does not leak through their convolutions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data2vec.core.model.mask import Mask
from data2vec.core.pretraining.predictor import ConvolutionalPredictor, Predictor, build_predictor
from data2vec.core.settings.pretraining import PredictorConfig, PredictorKind

WIDTH = 8


def head(kind: PredictorKind, **settings: object) -> Predictor:
    torch.manual_seed(0)
    return build_predictor(WIDTH, PredictorConfig(kind=kind, **{"mask_noise": 0.0, **settings}))  # type: ignore[arg-type]


def decoder(kind: PredictorKind, **settings: object) -> ConvolutionalPredictor:
    predictor = head(kind, **{"layers": 3, "groups": 2, "projection_layers": 2, **settings})
    assert isinstance(predictor, ConvolutionalPredictor)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return predictor


def random_mask(samples: int, masks: int, length: int, count: int, *, visible_only: bool) -> Mask:
    torch.manual_seed(1)
    return Mask.of(torch.rand(samples, masks, length).argsort(-1) < count, visible_only=visible_only)


def in_order(everywhere: Tensor, mask: Mask) -> Tensor:
    """The rows' hidden positions, one after the other."""
    return torch.stack([row[t] for row, line in zip(everywhere, mask.hidden.flatten(0, 1), strict=True)
                        for t in range(len(line)) if line[t]])  # fmt: skip


@pytest.mark.parametrize("kind", [PredictorKind.IDENTITY, PredictorKind.LINEAR, PredictorKind.MLP])
def test_positionwise_heads_predict_hidden_positions_in_order(kind: PredictorKind) -> None:
    predictor, mask = head(kind, layers=2), random_mask(2, 3, 6, 2, visible_only=False)
    x = torch.randn(6, 6, WIDTH)
    prediction = predictor(x, mask, (6,))
    linear = [module for module in predictor.modules() if isinstance(module, torch.nn.Linear)]
    everywhere = x
    for index, layer in enumerate(linear):
        everywhere = F.gelu(everywhere) if index else everywhere
        everywhere = everywhere @ layer.weight.T + layer.bias
    assert len(linear) == {PredictorKind.IDENTITY: 0, PredictorKind.LINEAR: 1, PredictorKind.MLP: 2}[kind]
    torch.testing.assert_close(prediction, in_order(everywhere, mask))


def test_widths_of_the_mlp() -> None:
    shapes = [tuple(p.shape) for p in head(PredictorKind.MLP, layers=3).parameters() if p.ndim == 2]
    assert shapes == [(16, 8), (16, 16), (8, 16)]
    assert [tuple(p.shape) for p in head(PredictorKind.MLP, layers=2, width=5).parameters() if p.ndim == 2] == [
        (5, 8), (8, 5),
    ]  # fmt: skip


SHAPES = [(PredictorKind.CONV1D, (12,)), (PredictorKind.CONV2D, (3, 4))]


@pytest.mark.parametrize(("kind", "shape"), SHAPES)
@pytest.mark.parametrize("width", [None, 4])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("residual", [False, True])
def test_decoder_equals_its_description(
    kind: PredictorKind, shape: tuple[int, ...], width: int | None, kernel: int, residual: bool
) -> None:
    predictor = decoder(kind, width=width, kernel=kernel, residual=residual)
    mask = random_mask(2, 3, 12, 5, visible_only=True)
    x = torch.randn(6, 7, WIDTH)
    prediction = predictor(x, mask, shape)
    assert prediction.shape == (mask.count, WIDTH)
    grid = torch.zeros(6, 12, WIDTH)
    assert mask.visible is not None
    for row in range(6):
        grid[row, mask.visible[row]] = x[row]
    convolve = F.conv1d if kind is PredictorKind.CONV1D else F.conv2d
    left, right = kernel // 2, (kernel - 1) // 2  # an even kernel sees one position more before than after
    for layer in predictor.convolutions:
        channels_first = grid.transpose(1, 2).reshape(6, -1, *shape)
        padded = F.pad(channels_first, (left, right) * len(shape))
        out = convolve(padded, layer.weight, layer.bias, groups=2).flatten(2).transpose(1, 2)
        out = (out - out.mean(-1, keepdim=True)) / torch.sqrt(out.var(-1, correction=0, keepdim=True) + 1e-5)
        out = out * 0.5 * (1 + torch.erf(out / math.sqrt(2)))
        grid = grid + out if residual and out.shape == grid.shape else out
    expected = predictor.projection(grid)
    torch.testing.assert_close(prediction, in_order(expected, mask), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kernel", [2, 3, 5])
@pytest.mark.parametrize("visible_only", [False, True])
def test_decoder_treats_a_padded_sample_as_it_does_alone(kernel: int, visible_only: bool) -> None:
    predictor = decoder(PredictorKind.CONV1D, kernel=kernel)
    lengths, length = (6, 10, 4), 10
    hidden = torch.zeros(3, 1, length, dtype=torch.bool)
    hidden[:, 0, torch.tensor([1, 3])] = True
    padding = torch.arange(length) >= torch.tensor(lengths).unsqueeze(1)
    mask = Mask.of(hidden, visible_only=visible_only, padding=padding)
    x = torch.randn(3, length - 2 if visible_only else length, WIDTH)
    together = predictor(x, mask, (length,), padding).view(3, 2, WIDTH)
    for sample, valid in enumerate(lengths):
        alone = Mask.of(hidden[sample : sample + 1, :, :valid], visible_only=visible_only)
        seen = x[sample : sample + 1, : valid - 2 if visible_only else valid]
        torch.testing.assert_close(together[sample], predictor(seen, alone, (valid,)), rtol=1e-4, atol=1e-5)


def test_noise_stands_at_hidden_positions_only() -> None:
    predictor = decoder(PredictorKind.CONV1D, mask_noise=0.5)
    mask = random_mask(40, 2, 12, 5, visible_only=True)
    assert mask.visible is not None
    x = torch.randn(80, 7, WIDTH)
    torch.manual_seed(3)
    first, second = predictor.place(x, mask), predictor.place(x, mask)
    flat = mask.hidden.flatten(0, 1)
    assert torch.equal(first[~flat], x.flatten(0, 1))
    assert torch.equal(second[~flat], x.flatten(0, 1))
    assert float(first[flat].std()) == pytest.approx(0.5, rel=0.1)
    assert float(first[flat].mean()) == pytest.approx(0.0, abs=0.05)
    assert not torch.equal(first[flat], second[flat])
    silent = decoder(PredictorKind.CONV1D)
    assert bool((silent.place(x, mask)[flat] == 0).all())


def test_decoder_of_a_student_that_sees_everything_leaves_its_output_in_place() -> None:
    predictor, mask = decoder(PredictorKind.CONV1D, mask_noise=0.5), random_mask(2, 1, 6, 2, visible_only=False)
    x = torch.randn(2, 6, WIDTH)
    assert torch.equal(predictor.place(x, mask), x)


@pytest.mark.parametrize("kind", list(PredictorKind))
def test_every_parameter_is_initialised(kind: PredictorKind, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    values = dict(head(kind, layers=2, projection_layers=2).named_parameters())
    assert bool(values) == (kind is not PredictorKind.IDENTITY)
    for name, value in values.items():
        assert bool(value.isfinite().all()), name
        assert value.ndim == 1 or float(value.detach().std()) > 0, name
