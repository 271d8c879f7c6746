"""DeltaNet against its equation, its relatives and its limits."""

import pytest
import torch
from torch.nn import functional

from mixers import registry
from mixers.errors import UserError


def build(**options):
    torch.manual_seed(0)
    return registry.build("delta_net", {"d_model": 16, "n_heads": 2, **options}).double()


def assert_same(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("negative_eigenvalues", [False, True])
def test_layer_is_its_equation(negative_eigenvalues):
    """The whole layer written out: a loop for the convolutions, the rule with the paper's state (V,K)."""
    layer = build(value_dim=6, conv_kernel=3, negative_eigenvalues=negative_eigenvalues)
    with torch.no_grad():
        layer.norm.weight.normal_()
    heads, x = layer.heads, torch.randn(1, 7, 16, dtype=torch.float64)

    def convolved(linear, conv):
        u = functional.pad(linear(x), (0, 0, 2, 0))
        y = sum(u[:, j : j + 7] * conv.weight[:, j] for j in range(3))
        return functional.silu(y).unflatten(-1, (2, -1))

    pairs = ((heads.q, heads.conv_q), (heads.k, heads.conv_k), (heads.v, heads.conv_v))
    q, k, v = (convolved(*pair) for pair in pairs)
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    beta = (2 if negative_eigenvalues else 1) * layer.beta(x).sigmoid()
    y = torch.zeros_like(v)
    for h in range(2):
        s = torch.zeros(6, 8, dtype=torch.float64)
        for t in range(7):
            key, value, b = k[0, t, h], v[0, t, h], beta[0, t, h]
            s = s @ (torch.eye(8).double() - b * torch.outer(key, key)) + b * torch.outer(value, key)
            y[0, t, h] = s @ q[0, t, h]
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + layer.norm.weight)
    assert_same(layer(x).y, layer.out(y.flatten(2)))


def test_nothing_is_forgotten_without_a_write():
    """Padding after a prefix leaves the memory bit for bit; the gated rule's decay would shrink it."""
    layer = build()
    start = layer(torch.randn(2, 6, 16, dtype=torch.float64), return_state=True).state
    mask = torch.zeros(2, 9, dtype=torch.bool)
    later = layer(torch.randn(2, 9, 16, dtype=torch.float64), start, mask=mask, return_state=True).state
    assert torch.equal(later.memory, start.memory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 15, "n_heads": 2}, "d_model=15 isn't divisible by n_heads=2"),
        ({"expand_v": 2.0, "value_dim": 8}, "value_dim=8 and expand_v=2.0 both set V"),
        ({"use_output_gate": True}, "use_output_gate: unknown key"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        registry.build("delta_net", options)
