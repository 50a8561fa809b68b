"""Transformer and attention against a plain reference; their random parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data2vec.core.model.attention import Alibi, Attention, alibi_slopes, attention_mask, present_padding
from data2vec.core.model.mask import gather_positions
from data2vec.core.model.transformer import Block, DropPath, Transformer, dropped_layers
from data2vec.core.settings.fields import LayerOutput, NormOrder, TransformerConfig

TINY = TransformerConfig(depth=3, width=12, heads=3, mlp_ratio=2.0)
CONFIGS = [replace(TINY, norm_order=order, layer_scale=scale) for order in NormOrder for scale in (None, 0.3)]


def build(config: TransformerConfig, seed: int = 0) -> Transformer:
    """With parameters far from their initial values, so that each of them matters."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias


def reference_attention(x: Tensor, attention: Attention, bias: Tensor, padding: Tensor) -> Tensor:
    """Softmax written out, head by head."""
    width = x.shape[-1]
    size = width // attention.heads
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).split(width, -1)
    heads = []
    for head in range(attention.heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size) + bias[:, head]
        scores = scores.masked_fill(padding[:, None, :], -torch.inf)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(weights @ v[..., part])
    return torch.cat(heads, -1) @ attention.proj.weight.T + attention.proj.bias


def reference(
    model: Transformer, x: Tensor, bias: Tensor, padding: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    outputs, feed_forwards = [], []
    for block in model.blocks:
        assert isinstance(block, Block)
        scale1 = 1.0 if block.scale1 is None else block.scale1
        scale2 = 1.0 if block.scale2 is None else block.scale2
        fc1, fc2 = block.feed_forward.fc1, block.feed_forward.fc2

        def feed_forward(x: Tensor, fc1: nn.Linear = fc1, fc2: nn.Linear = fc2) -> Tensor:
            hidden = x @ fc1.weight.T + fc1.bias
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            return hidden @ fc2.weight.T + fc2.bias

        if model.config.norm_order is NormOrder.PRE:
            x = x + scale1 * reference_attention(layer_norm(x, block.norm1), block.attention, bias, padding)
            forward = scale2 * feed_forward(layer_norm(x, block.norm2))
            x = x + forward
        else:
            x = layer_norm(x + scale1 * reference_attention(x, block.attention, bias, padding), block.norm1)
            forward = scale2 * feed_forward(x)
            x = layer_norm(x + forward, block.norm2)
        outputs.append(x)
        feed_forwards.append(forward)
    if isinstance(model.norm, nn.LayerNorm):
        x = layer_norm(x, model.norm)
    return x, outputs, feed_forwards


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.norm_order}-{config.layer_scale}")
def test_equals_a_plain_reference(config: TransformerConfig) -> None:
    model = build(config).double()
    x, bias = torch.randn(4, 6, 12).double(), torch.randn(1, 3, 6, 6).double()
    padding = torch.arange(6) >= torch.tensor([[6], [4], [1], [5]])
    expected, outputs, feed_forwards = reference(model, x, bias, padding)
    mask = attention_mask(bias, padding, None, prefix=0, dtype=x.dtype)
    for collect, theirs in ((LayerOutput.BLOCK, outputs), (LayerOutput.FEED_FORWARD, feed_forwards)):
        out, layers = model(x, mask, collect=collect)
        assert out.shape == x.shape
        torch.testing.assert_close(out, expected)
        for ours, reference_layer in zip(layers, theirs, strict=True):
            torch.testing.assert_close(ours, reference_layer)
    assert isinstance(model.norm, nn.LayerNorm) == (config.norm_order is NormOrder.PRE)


@pytest.mark.parametrize("collect", list(LayerOutput))
def test_collects_the_last_layers_lowest_first(collect: LayerOutput) -> None:
    model, x = build(TINY), torch.randn(2, 5, 12)
    _, every = model(x, collect=collect)
    assert len(every) == 3
    for top_k in (1, 2, 3):
        out, layers = model(x, collect=collect, top_k=top_k)
        assert all(torch.equal(a, b) for a, b in zip(layers, every[-top_k:], strict=True))
    assert model(x)[1] == []
    torch.testing.assert_close(out, model(x)[0])


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 3), st.integers(2, 7), st.integers(0, 2), st.booleans())
def test_bias_of_visible_positions_is_that_of_a_dense_computation(
    seed: int, samples: int, masks: int, length: int, prefix: int, padded: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, keep = samples * masks, max(1, length // 2)
    visible = torch.rand(rows, length, generator=generator).argsort(-1)[:, :keep].sort(-1).values
    bias = torch.randn(1, 2, prefix + length, prefix + length, generator=generator)
    padding = torch.rand(rows, length, generator=generator) < 0.4 if padded else None
    present = present_padding(padding, visible, prefix)
    mask = attention_mask(bias, present, visible, prefix=prefix, dtype=torch.float32)
    assert mask is not None
    for row in range(rows):
        places = [*range(prefix), *(int(t) + prefix for t in visible[row])]
        for a, query in enumerate(places):
            for b, key in enumerate(places):
                is_padding = padding is not None and key >= prefix and bool(padding[row, key - prefix])
                expected = torch.full((2,), -torch.inf) if is_padding else bias[0, :, query, key]
                assert torch.equal(mask[row % len(mask), :, a, b], expected)


@pytest.mark.parametrize("with_bias", [False, True])
def test_padded_keys_get_no_weight(with_bias: bool) -> None:
    attention, x = Attention(12, 3), torch.randn(2, 6, 12)
    padding = torch.arange(6) >= torch.tensor([[4], [6]])
    bias = torch.randn(1, 3, 6, 6) if with_bias else None
    mask = attention_mask(bias, padding, None, prefix=0, dtype=x.dtype)
    other = x.masked_fill(padding.unsqueeze(-1), 99.0)
    assert torch.equal(attention(x, mask)[~padding], attention(other, mask)[~padding])
    alone = attention(x[:1, :4], None if bias is None else bias[..., :4, :4])
    torch.testing.assert_close(attention(x, mask)[0, :4], alone[0], rtol=1e-4, atol=1e-6)
    assert attention_mask(None, None, None, prefix=0, dtype=x.dtype) is None


def test_attention_over_visible_positions_equals_attention_with_the_others_masked() -> None:
    attention, x, bias = Attention(12, 3), torch.randn(2, 7, 12), torch.randn(1, 3, 7, 7)
    visible = torch.tensor([[0, 2, 5], [1, 5, 6]])
    mask = attention_mask(bias, None, visible, prefix=0, dtype=x.dtype)
    hidden = torch.ones(2, 7, dtype=torch.bool).scatter(1, visible, False)
    dense = attention(x, attention_mask(bias, hidden, None, prefix=0, dtype=x.dtype))
    taken = attention(gather_positions(x, visible), mask)
    torch.testing.assert_close(taken, gather_positions(dense, visible), rtol=1e-4, atol=1e-6)


def test_every_parameter_is_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that no initialiser writes would show as NaN, and a constant where chance is meant as equality."""
    config, empty = replace(TINY, layer_scale=0.1), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(dict(Transformer(config).named_parameters()))
    for name, value in models[0].items():
        assert bool(value.isfinite().all()), name
        assert torch.equal(value, models[1][name]) == (value.ndim == 1), name
        if value.ndim > 1:
            assert 0.01 < float(value.detach().std()) < 0.03, name
        else:
            expected = 0.1 if "scale" in name else 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert bool((value == expected).all()), name


def test_drop_path_keeps_the_expectation_and_drops_whole_rows() -> None:
    torch.manual_seed(0)
    layer, x = DropPath(0.25), torch.randn(8000, 3, 2) + 1
    out = layer(x)
    kept = (out != 0).flatten(1).any(1)
    assert float((~kept).float().mean()) == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(out[kept], x[kept] / 0.75)
    torch.testing.assert_close(out.mean(0), x.mean(0), rtol=0.0, atol=0.1)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(DropPath(0.0)(x), x)


def test_drop_path_rises_from_nothing_to_the_last_block() -> None:
    model = Transformer(replace(TINY, drop_path=0.4))
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0.0, 0.2, 0.4])


@settings(max_examples=40)
@given(st.floats(0.0, 0.95), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_layer_drop_is_the_same_for_the_same_update(rate: float, seed: int, update: int) -> None:
    dropped = dropped_layers(rate, 12, seed=seed, update=update)
    assert len(dropped) == 12
    assert dropped == dropped_layers(rate, 12, seed=seed, update=update)
    assert not any(dropped_layers(0.0, 12, seed=seed, update=update))
    more = dropped_layers(min(rate + 0.3, 0.99), 12, seed=seed, update=update)
    assert all(high or not low for low, high in zip(dropped, more, strict=True))


def test_layer_drop_skips_about_its_rate_of_every_block() -> None:
    draws = torch.tensor([dropped_layers(0.2, 6, seed=3, update=update) for update in range(2000)]).float()
    assert bool(((draws.mean(0) - 0.2).abs() < 0.04).all())
    assert len({tuple(row) for row in draws.tolist()}) > 20


@pytest.mark.parametrize("dropped", [(True, False, False), (False, True, True), (True, True, True)])
def test_a_dropped_block_is_left_out(dropped: Sequence[bool]) -> None:
    model, x = build(TINY), torch.randn(2, 4, 12)
    expected = x
    for block, skip in zip(model.blocks, dropped, strict=True):
        expected = expected if skip else block(expected)[0]
    torch.testing.assert_close(model(x, dropped=dropped)[0], model.norm(expected))


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    """Dropout and drop path too: the second forward pass replays the first one's random numbers."""
    config = replace(TINY, drop_path=0.5, dropout=0.2, attention_dropout=0.2, activation_dropout=0.2)
    x = torch.randn(4, 5, 12)
    gradients = []
    for switch in (False, True):
        model = build(config)
        model.activation_checkpointing = switch
        torch.manual_seed(5)
        out, layers = model(x, collect=LayerOutput.BLOCK, top_k=2)
        (F.mse_loss(out, x) + layers[0].square().mean()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        assert torch.equal(plain, recomputed)


def test_alibi_slopes_are_those_of_the_paper() -> None:
    assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]
    # Press et al.: for 12 heads those of 8, then every other one of 16.
    assert alibi_slopes(12) == [2.0**-h for h in range(1, 9)] + [2.0 ** (-0.5 * h) for h in (1, 3, 5, 7)]
    assert len(alibi_slopes(3)) == 3


def test_alibi_is_symmetric_and_its_scale_never_turns_it_round() -> None:
    bias = Alibi(4, learned_scale=True)
    assert bias.scale is not None
    plain = Alibi(4)((6,), prefix=2)
    assert torch.equal(bias((6,), prefix=2), plain)
    assert plain.shape == (1, 4, 8, 8)
    assert torch.equal(plain, plain.transpose(2, 3))
    assert bool((plain[:, :, :2] == 0).all())
    assert plain[0, 1, 2, 5].item() == pytest.approx(-3 * alibi_slopes(4)[1])
    with torch.no_grad():
        bias.scale.copy_(torch.tensor([2.0, -1.0, 0.0, 1.0]))
    scaled = bias((6,), prefix=2)
    assert torch.equal(scaled[0, 0], 2 * plain[0, 0])
    assert bool((scaled[0, 1:3] == 0).all())
