"""HGRN2: the layer against its equation, its options and its kernels."""

import pytest
import torch
from torch.nn import functional

from mixers import registry
from mixers.errors import UserError


def build(**options):
    torch.manual_seed(0)
    return registry.build("hgrn2", {"d_model": 16, "n_heads": 2, **options}).double()


def assert_same(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("lower_bound", [0.0, 0.7])
def test_layer_is_its_equation(lower_bound):
    layer = build(key_dim=6, value_dim=5, lower_bound=lower_bound, chunk_size=4)
    with torch.no_grad():
        layer.norm.weight.normal_()
    x = torch.randn(9, 16, dtype=torch.float64)
    state = torch.zeros(2, 6, 5, dtype=torch.float64)
    ys = []
    for row in x:
        forget = lower_bound + (1 - lower_bound) * torch.sigmoid(layer.forget(row)).view(2, 6, 1)
        q, v = functional.silu(layer.q(row)).view(2, 6), layer.v(row).view(2, 1, 5)
        state = forget * state + (1 - forget) * v
        y = torch.einsum("hk,hkv->hv", q, state).flatten()
        y = y / (y.square().mean() + 1e-5).sqrt() * (1 + layer.norm.weight)
        ys.append(layer.out(y))
    assert_same(layer(x[None]).y[0], torch.stack(ys))


def test_extreme_gates_stay_exact():
    """f near zero keeps its log, f near one keeps what it takes in; the bound holds."""
    layer = build(lower_bound=0.0).float()
    x = torch.full((1, 1, 16), 10.0) * layer.forget.weight[0].sign()
    for sign in (1.0, -1.0):
        key, log_forget = (part[0, 0, 0] for part in layer._gates(sign * x))
        logit = layer.forget(sign * x)[0, 0, 0].double()
        torch.testing.assert_close(key.double(), torch.sigmoid(-logit), rtol=1e-4, atol=0)
        torch.testing.assert_close(log_forget.double(), functional.logsigmoid(logit), rtol=1e-4, atol=0)
        assert key > 0
        assert log_forget < 0
    bounded = build(lower_bound=0.9)
    assert bounded._gates(100 * torch.randn(1, 50, 16, dtype=torch.float64))[1].exp().min() >= 0.9 - 1e-12


def test_very_strong_decay_stays_finite_with_gradients():
    layer = build().float()
    x = (1e5 * torch.randn(2, 21, 16)).requires_grad_()
    y = layer(x).y
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert (y != 0).any()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 15, "n_heads": 2}, "d_model=15 isn't divisible by n_heads=2"),
        ({"lower_bound": 1.0}, "lower_bound: input should be less than 1, got 1.0"),
        ({"lower_bonud": 0.5}, "did you mean 'lower_bound'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        registry.build("hgrn2", options)
