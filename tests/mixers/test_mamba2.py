"""Mamba-2: the layer against its equation, its options and its kernels."""

import pytest
import torch
from torch.nn import functional

from mixers import registry
from mixers.errors import UserError


def build(**options):
    torch.manual_seed(0)
    return registry.build("mamba2", {"d_model": 16, "n_heads": 2, **options}).double()


def assert_same(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_layer_is_its_equation():
    """Written out for one sequence, head by head: heads 0 and 1 share the first group's key and query."""
    layer = build(n_heads=4, n_groups=2, key_dim=6, expand=1.5, conv_kernel=3, chunk_size=4)
    with torch.no_grad():
        layer.norm.weight.normal_()
        layer.D.normal_()
    x = torch.randn(9, 16, dtype=torch.float64)
    u = functional.pad(layer.vkq(x), (0, 0, 2, 0))
    mixed = functional.silu(sum(u[j : j + 9] * layer.conv.weight[:, j] for j in range(3)))
    values, keys, queries = mixed[:, :24].view(9, 4, 6), mixed[:, 24:36].view(9, 2, 6), mixed[:, 36:].view(9, 2, 6)
    heads = torch.zeros(9, 4, 6, dtype=torch.float64)
    for h in range(4):
        state = torch.zeros(6, 6, dtype=torch.float64)
        for t in range(9):
            step = torch.log1p((x[t] @ layer.step.weight[h] + layer.dt_bias[h]).exp())
            write = torch.outer(keys[t, h // 2], values[t, h])
            state = torch.exp(-step * layer.A_log[h].exp()) * state + step * write
            heads[t, h] = queries[t, h // 2] @ state + layer.D[h] * values[t, h]
    y = heads.flatten(1) * functional.silu(layer.gate(x))
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + layer.norm.weight)
    assert_same(layer(x[None]).y[0], layer.out(y))


def test_decays_start_in_the_documented_ranges():
    layer = build(n_heads=16)
    rate, step = layer.A_log.exp(), functional.softplus(layer.dt_bias)
    assert ((rate >= 1 - 1e-6) & (rate <= 16 + 1e-5)).all()
    assert ((step >= 1e-3 * 0.999) & (step <= 0.1001)).all()
    assert rate.std() > 0.5
    assert step.std() > 1e-3
    assert (layer.D == 1).all()


def test_scalars_of_heads_are_free_of_weight_decay():
    layer = build()
    options = layer.parameter_options()
    assert set(options) == {name for name, p in layer.named_parameters(recurse=False)}
    assert all(not option.weight_decay for option in options.values())


def test_very_strong_decay_stays_finite_with_gradients():
    layer = build(conv_kernel=0).float()
    with torch.no_grad():
        layer.A_log.fill_(12.0)
        layer.dt_bias.fill_(1.0)
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
        ({"n_heads": 4, "n_groups": 3}, "n_groups=3 must divide n_heads=4"),
        ({"d_model": 15, "n_heads": 4}, "expand=2.0 times d_model=15 isn't divisible by n_heads=4"),
        ({"expand": 0.0}, "expand: input should be greater than 0, got 0.0"),
        ({"n_group": 1}, "did you mean 'n_groups'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        registry.build("mamba2", options)
