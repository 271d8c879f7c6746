"""Gated linear attention: the layer against its equation, its options and its kernels."""

import pytest
import torch
from torch.nn import functional

from mixers import registry
from mixers.errors import UserError


def build(**options):
    torch.manual_seed(0)
    return registry.build("gla", {"d_model": 16, "n_heads": 2, **options}).double()


def assert_same(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_layer_is_its_equation():
    layer = build(key_dim=6, value_dim=5, decay_rank=3, decay_temperature=4.0, chunk_size=4)
    with torch.no_grad():
        layer.norm.weight.normal_()
        layer.decay_up.bias.normal_()
    x = torch.randn(9, 16, dtype=torch.float64)
    state = torch.zeros(2, 6, 5, dtype=torch.float64)
    ys = []
    for row in x:
        decay = torch.sigmoid(layer.decay_up.weight @ layer.decay_down.weight @ row + layer.decay_up.bias) ** (1 / 4)
        q, k, v = (linear(row).view(2, -1) for linear in (layer.q, layer.k, layer.v))
        state = decay.view(2, 6, 1) * state + k[:, :, None] * v[:, None, :]
        y = torch.einsum("hk,hkv->hv", q / 6**0.5, state)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + layer.norm.weight)
        ys.append(layer.out(y.flatten() * functional.silu(layer.gate(row))))
    assert_same(layer(x[None]).y[0], torch.stack(ys))


def test_very_strong_decay_stays_finite_with_gradients():
    layer = build().float()
    with torch.no_grad():
        layer.decay_up.bias.fill_(-1e5)
    x = torch.randn(2, 21, 16, requires_grad=True)
    y = layer(x).y
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    assert_same(y, torch.cat([layer(x[:, t : t + 1]).y for t in range(21)], dim=1), atol=1e-5)  # nothing is kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 15, "n_heads": 2}, "d_model=15 isn't divisible by n_heads=2"),
        ({"decay_temperature": 0.0}, "decay_temperature: input should be greater than 0, got 0.0"),
        ({"decay_rnak": 4}, "did you mean 'decay_rank'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        registry.build("gla", options)
