"""Kimi Delta Attention against its equation, its relatives and its limits."""

import pytest
import torch
from torch.nn import functional

from mixers import registry
from mixers.delta_rule import gated_delta_rule_recurrent
from mixers.errors import UserError
from mixers.kda import kda_reference


def build(**options):
    torch.manual_seed(0)
    return registry.build("kda", {"d_model": 16, "n_heads": 2, **options}).double()


def assert_same(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("negative_eigenvalues", [False, True])
def test_layer_is_its_equation(negative_eigenvalues):
    """The whole layer written out: a loop for the convolutions, and the paper's transition as a matrix."""
    layer = build(value_dim=6, gate_rank=5, conv_kernel=3, negative_eigenvalues=negative_eigenvalues)
    with torch.no_grad():
        layer.norm.weight.normal_()
        layer.gate_out.bias.normal_()
    heads, x = layer.heads, torch.randn(1, 7, 16, dtype=torch.float64)

    def convolved(linear, conv):
        u = functional.pad(linear(x), (0, 0, 2, 0))
        y = sum(u[:, j : j + 7] * conv.weight[:, j] for j in range(3))
        return functional.silu(y).unflatten(-1, (2, -1))

    pairs = ((heads.q, heads.conv_q), (heads.k, heads.conv_k), (heads.v, heads.conv_v))
    q, k, v = (convolved(*pair) for pair in pairs)
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    beta = (2 if negative_eigenvalues else 1) * layer.beta(x).sigmoid()
    step = functional.softplus(x @ layer.decay_in.weight.T @ layer.decay_out.weight.T + layer.dt_bias)
    y = torch.zeros_like(v)
    for h in range(2):
        s = torch.zeros(8, 6, dtype=torch.float64)
        for t in range(7):
            key, value, b = k[0, t, h], v[0, t, h], beta[0, t, h]
            decay = (-layer.A_log[h].exp() * step[0, t, 8 * h : 8 * h + 8]).exp()
            s = (torch.eye(8).double() - b * torch.outer(key, key)) @ torch.diag(decay) @ s
            s = s + b * torch.outer(key, value)
            y[0, t, h] = s.T @ q[0, t, h]
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + layer.norm.weight)
    gate = (x @ layer.gate_in.weight.T @ layer.gate_out.weight.T + layer.gate_out.bias).sigmoid()
    assert_same(layer(x).y, layer.out(y.flatten(2) * gate))


@pytest.mark.parametrize("n_tokens", [1, 13])
def test_equal_decays_are_the_gated_delta_rule(n_tokens):
    torch.manual_seed(0)
    q, k = (functional.normalize(torch.randn(2, n_tokens, 2, 5).double(), dim=-1) for _ in range(2))
    v, beta = torch.randn(2, n_tokens, 2, 3).double(), torch.rand(2, n_tokens, 2).double()
    log_decay = -torch.rand(2, n_tokens, 2).double()
    expected = gated_delta_rule_recurrent(q, k, v, beta, log_decay)
    found = kda_reference(q, k, v, beta, log_decay.unsqueeze(-1).expand_as(k), chunk_size=4)
    assert_same(found.y, expected.y)
    assert_same(found.state, expected.state)


def test_repeated_keys_are_solved_exactly_enough():
    """All keys alike and b = 1: the system is as ill-conditioned as it gets; each read returns the last value."""
    k = functional.normalize(torch.ones(1, 64, 1, 5), dim=-1)
    v = torch.randn(1, 64, 1, 3)
    out = kda_reference(k, k, v, torch.ones(1, 64, 1), torch.zeros_like(k), chunk_size=64)
    assert_same(out.y, v, atol=1e-5)


def test_padding_behind_the_tokens_leaves_the_memory():
    layer = build()
    start = layer(torch.randn(2, 6, 16, dtype=torch.float64), return_state=True).state
    mask = torch.zeros(2, 9, dtype=torch.bool)
    later = layer(torch.randn(2, 9, 16, dtype=torch.float64), start, mask=mask, return_state=True).state
    assert torch.equal(later.memory, start.memory)


def test_decays_start_in_the_documented_ranges():
    layer = build(n_heads=16)
    rate, step = layer.A_log.exp(), functional.softplus(layer.dt_bias)
    assert ((rate >= 1 - 1e-6) & (rate <= 16 + 1e-5)).all()
    assert ((step >= 1e-3 * 0.999) & (step <= 0.1001)).all()
    assert rate.std() > 0.5
    assert step.std() > 1e-3


def test_decay_parameters_are_free_of_weight_decay():
    layer = build()
    options = layer.parameter_options()
    assert set(options) == {"A_log", "dt_bias"} <= {name for name, _ in layer.named_parameters()}
    assert all(not option.weight_decay for option in options.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 15, "n_heads": 2}, "d_model=15 isn't divisible by n_heads=2"),
        ({"gate_rank": 0}, "gate_rank: .* greater than 0, got 0"),
        ({"conv_kernal": 4}, "did you mean 'conv_kernel'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        registry.build("kda", options)
