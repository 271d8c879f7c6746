"""Retention: the layer against the paper's parallel form, its options and its kernels."""

import pytest
import torch
from torch.nn import functional

from mixers import registry
from mixers.errors import UserError


def build(**options):
    torch.manual_seed(0)
    return registry.build("retention", {"d_model": 16, "n_heads": 2, **options}).double()


def assert_same(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("rope", [True, False])
def test_layer_is_the_papers_parallel_form(rope):
    """(Q K^T * D) V with D_ts = gamma^(t-s); rope as a complex factor e^{i n theta}."""
    layer = build(key_dim=6, value_dim=5, rope=rope)
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    q, k = (linear(x)[0].unflatten(-1, (2, 2, 3)) for linear in (layer.q, layer.k))
    theta = 10_000.0 ** (-torch.arange(3, dtype=torch.float64) / 3) if rope else torch.zeros(3, dtype=torch.float64)
    turn = torch.exp(1j * torch.arange(9)[:, None, None] * theta)
    q, k = (torch.complex(part[:, :, 0], part[:, :, 1]) * turn for part in (q, k))
    v = layer.v(x)[0].unflatten(-1, (2, 5))
    heads = []
    for h, gamma in enumerate((1 - 1 / 32, 1 - 1 / 64)):
        steps = torch.arange(9)[:, None] - torch.arange(9)
        decay = (gamma ** steps.double()).tril()
        y = ((q[:, h] @ k[:, h].conj().T).real / 6**0.5 * decay) @ v[:, h]
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        heads.append(y)
    gate = functional.silu(layer.gate(x))
    assert_same(layer(x).y, layer.out(torch.cat(heads, -1)[None] * gate))


def test_heads_forget_at_the_papers_rates_however_many_there_are():
    log_decay = registry.build("retention", {"n_heads": 64, "d_model": 128})._log_decay(torch.device("cpu"))
    exact = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(8)], dtype=torch.float64).log()
    torch.testing.assert_close(log_decay[:8], exact, rtol=1e-12, atol=0)
    assert (log_decay < 0).all()


def test_far_positions_keep_their_precision():
    layer = build().float()
    x = torch.randn(1, 12, 16)
    start = layer.initial_state(1, device="cpu", dtype=torch.float32)
    far = layer(x, start._replace(position=start.position + 1_000_000)).y
    assert_same(far, layer(x).y, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 15, "n_heads": 2}, "d_model=15 isn't divisible by n_heads=2"),
        ({"key_dim": 5}, "the key width must be even, got 5; change it, or set rope=false"),
        ({"value_dim": 1}, "set value_dim to at least 2"),
        ({"n_haeds": 4}, "did you mean 'n_heads'"),
        ({"rope_base": 1.0}, "rope_base: input should be greater than 1, got 1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        registry.build("retention", options)
