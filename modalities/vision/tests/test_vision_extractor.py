"""Patches, fixed positions and the relative position bias, against definitions of their own and the authors' values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data2vec.core.config import TransformerConfig
from data2vec.vision import PatchExtractor, PatchInit, PositionKind, RelativePositionBias, SinePositions, Vision
from data2vec.vision.extractor import relative_position_index, sine_positions

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"
torch.manual_seed(0)


def mae_positions(height: int, width: int, channels: int) -> np.ndarray:
    """MAE's formula, written out in float64: column first, then row; sines, then cosines."""
    rates = 1.0 / 10000.0 ** (np.arange(channels // 4) / (channels / 4.0))
    row, column = np.divmod(np.arange(height * width), width)
    angles = [np.outer(place, rates) for place in (column, row)]
    return np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))], axis=1)


@pytest.mark.parametrize("shape", [(4, 4), (14, 14), (3, 7)])
def test_sine_positions_are_maes(shape):
    ours = sine_positions(shape, 48)
    assert ours.shape == (shape[0] * shape[1], 48)
    np.testing.assert_allclose(ours.numpy(), mae_positions(*shape, 48), atol=2e-6)


def test_sine_positions_fit_any_grid():
    positions = SinePositions(width=32, grid=(4, 4))
    assert torch.equal(positions((4, 4)), positions.positions)
    assert not positions.positions.requires_grad
    torch.testing.assert_close(positions((6, 3))[0], sine_positions((6, 3), 32))


def test_loaded_positions_that_are_no_sine_are_kept_and_resampled():
    other = torch.randn(1, 16, 32)
    positions = SinePositions(width=32, grid=(4, 4))
    positions.load_state_dict({"positions": other})
    assert torch.equal(positions((4, 4)), other)
    assert positions((8, 8)).shape == (1, 64, 32)
    assert not torch.allclose(positions((8, 8))[0], sine_positions((8, 8), 32), atol=0.1)


def test_positions_of_another_grid_are_made_to_fit():
    source, target = SinePositions(width=32, grid=(4, 4)), SinePositions(width=32, grid=(6, 6))
    fitted, line = target.resized("positions", source.positions)
    assert line == "positions of 4 x 4 resampled to 6 x 6"
    torch.testing.assert_close(fitted, target.positions)
    fitted, _ = target.resized("positions", torch.full((1, 16, 32), 0.5))  # a constant resamples to itself
    torch.testing.assert_close(fitted, torch.full((1, 36, 32), 0.5))
    for other in (torch.zeros(1, 15, 32), torch.zeros(1, 16, 28), torch.zeros(16, 32), torch.zeros(1, 0, 32)):
        assert target.resized("positions", other) is None


def test_the_relative_index_is_the_authors():
    with np.load(GOLDEN / "d2v1_vision.npz") as golden:
        theirs = golden["state/encoder.rel_pos_bias.relative_position_index"]
    assert (relative_position_index((4, 4), torch.device("cpu")).numpy() == theirs).all()


def test_the_bias_depends_on_the_distance_alone():
    bias = RelativePositionBias(heads=2, grid=(3, 5))
    assert bias.table.shape == (5 * 9 + 3, 2)
    assert not bias.table.any()
    torch.nn.init.normal_(bias.table)
    values = bias((3, 5), prefix=0)[0].view(2, 3, 5, 3, 5)
    assert torch.equal(values[:, 0, 0, 1, 2], values[:, 1, 2, 2, 4])
    assert not torch.equal(values[:, 0, 0, 1, 2], values[:, 1, 2, 0, 0])
    with_cls = bias((3, 5), prefix=1)
    assert with_cls.shape == (1, 2, 16, 16)
    assert torch.equal(with_cls[0, :, 1:, 1:].reshape(2, 3, 5, 3, 5), values)
    assert torch.equal(with_cls[0, :, 0, 1:], bias.table[-3, :, None].expand(2, 15))
    assert torch.equal(with_cls[0, :, 1:, 0], bias.table[-2, :, None].expand(2, 15))
    with pytest.raises(ValueError, match="2 prefix tokens"):
        bias((3, 5), prefix=2)


def test_the_bias_is_resampled_for_another_grid():
    bias = RelativePositionBias(heads=2, grid=(4, 4))
    with torch.no_grad():
        bias.table.fill_(0.25)
        bias.table[-3:] = torch.tensor([[1.0], [2.0], [3.0]])
    values = bias((6, 5), prefix=1)
    torch.testing.assert_close(values[0, :, 1:, 1:], torch.full((2, 30, 30), 0.25))
    assert (values[0, :, 0, 0] == 3.0).all()
    assert (values[0, :, 0, 1:] == 1.0).all()
    values.sum().backward()
    assert bias.table.grad is not None
    assert torch.isfinite(bias.table.grad).all()
    larger = RelativePositionBias(heads=2, grid=(7, 7))
    fitted, line = larger.resized("table", bias.table)
    assert (fitted.shape, line) == (larger.table.shape, "positions of 4 x 4 resampled to 7 x 7")
    torch.testing.assert_close(fitted[:-3], torch.full((169, 2), 0.25))
    assert torch.equal(fitted[-3:], bias.table[-3:])
    assert RelativePositionBias(heads=3, grid=(7, 7)).resized("table", bias.table) is None
    for other in (torch.zeros(2, 2), torch.zeros(51, 2), torch.zeros(39, 2)):
        assert larger.resized("table", other) is None


def test_a_patch_is_projected_to_its_place():
    extractor = PatchExtractor(patch_size=4, channels=3, width=8)
    images = torch.randn(2, 3, 8, 12)
    tokens = extractor(images)
    assert tokens.shape == (2, 3)
    assert tokens.padding is None
    weight, bias = extractor.embed.proj.weight.flatten(1), extractor.embed.proj.bias
    expected = images[1, :, 4:8, 8:12].flatten() @ weight.T + bias
    torch.testing.assert_close(tokens.x[1, 5], expected)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 8, 10), "8 x 10 pixels"), ((1, 1, 8, 8), "must be"), ((3, 8, 8), "must be"), ((1, 3, 0, 8), "0 x 8")],
)
def test_images_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        PatchExtractor(patch_size=4, channels=3, width=8)(torch.zeros(shape))


@pytest.mark.parametrize(("init", "spread"), [(PatchInit.TRUNCATED_NORMAL, 0.02), (PatchInit.XAVIER, None)])
def test_patch_init(init, spread):
    projection = PatchExtractor(patch_size=16, channels=3, width=256, init=init).embed.proj
    assert not projection.bias.any()
    limit = (6 / (3 * 256 + 256)) ** 0.5
    assert projection.weight.std().item() == pytest.approx(spread or limit / 3**0.5, rel=0.03)
    if init is PatchInit.XAVIER:
        assert projection.weight.abs().max() <= limit


@pytest.mark.parametrize("positions", list(PositionKind))
def test_the_frontend_that_the_settings_describe(positions):
    transformer = TransformerConfig(depth=2, width=24, heads=3)
    vision = Vision(image_size=32, patch_size=8, positions=positions, blocks=1, input_norm=True)
    frontend = vision.build_frontend(transformer)
    assert (frontend.bias is not None) is (positions is PositionKind.RELATIVE)
    assert (frontend.extractor.positions is not None) is (positions is PositionKind.SINE)
    assert len(frontend.blocks) == 1
    assert frontend.prefix_tokens == 1
    tokens = frontend.extractor(torch.randn(2, 3, 32, 32))
    embedded = frontend(tokens.x, None, None)
    assert embedded.shape == (2, 17, 24)
    torch.testing.assert_close(embedded.mean(-1), torch.zeros(2, 17), atol=1e-5, rtol=0)
