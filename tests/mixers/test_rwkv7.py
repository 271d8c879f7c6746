"""RWKV-7 against its equation, its relatives and its limits."""

import math

import pytest
import torch
from torch.nn import functional

from mixers import registry
from mixers.delta_rule import gated_delta_rule_recurrent
from mixers.errors import UserError
from mixers.rwkv7 import rwkv7_reference


def build(**options):
    torch.manual_seed(0)
    return registry.build("rwkv7", {"d_model": 16, "n_heads": 2, **options}).double()


def assert_same(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_layer_is_its_equation():
    """One sequence, token by token and head by head, with the paper's state (V,K) and row vectors."""
    layer = build(decay_rank=3, rate_rank=4, gate_rank=5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    m = dict(zip("rwkvag", layer.shift, strict=True))
    memory = [torch.zeros(8, 8, dtype=torch.float64) for _ in range(2)]
    last, ys = torch.zeros(16, dtype=torch.float64), []
    for t in range(7):
        now = x[0, t]
        r, w, k, v, a, g = (now + m[z] * (last - now) for z in "rwkvag")
        last = now
        r, key, v = layer.r.weight @ r, layer.k.weight @ k, layer.v.weight @ v
        w = layer.decay.out.weight @ (layer.decay.down.weight @ w).tanh() + layer.decay.out.bias
        w = (-math.exp(-0.5) * w.sigmoid()).exp()
        a = (layer.rate.out.weight @ (layer.rate.down.weight @ a) + layer.rate.out.bias).sigmoid()
        g = layer.gate.out.weight @ (layer.gate.down.weight @ g).sigmoid()
        k = key * (1 + layer.write_rate * (a - 1))
        y = torch.zeros(16, dtype=torch.float64)
        for h in range(2):
            at = slice(8 * h, 8 * h + 8)
            c = key[at] * layer.removal_scale[at]
            c = c / (c.square().sum() + 1e-6).sqrt()
            transition = torch.diag(w[at]) - torch.outer(c, a[at] * c)
            memory[h] = memory[h] @ transition + torch.outer(v[at], k[at])
            read = memory[h] @ r[at]
            read = (read - read.mean()) / (read.var(correction=0) + 8e-5).sqrt()
            read = read * layer.norm.weight[at] + layer.norm.bias[at]
            y[at] = read + (r[at] * layer.bonus[h] * k[at]).sum() * v[at]
        ys.append(layer.out.weight @ (y * g))
    out = layer(x, return_state=True)
    assert_same(out.y[0], torch.stack(ys))
    assert_same(out.state.memory[0], torch.stack(memory).transpose(-1, -2))


def test_equal_rates_and_no_decay_are_the_delta_rule():
    torch.manual_seed(0)
    q, k = (functional.normalize(torch.randn(2, 13, 2, 5).double(), dim=-1) for _ in range(2))
    v, beta = torch.randn(2, 13, 2, 3).double(), torch.rand(2, 13, 2).double()
    expected = gated_delta_rule_recurrent(q, k, v, beta, torch.zeros_like(beta))
    rate = beta.unsqueeze(-1).expand_as(k)
    found = rwkv7_reference(q, torch.zeros_like(k), rate * k, v, k, rate, chunk_size=4)
    assert_same(found.y, expected.y)
    assert_same(found.state, expected.state)


def test_decays_stay_in_the_documented_range():
    """Even for huge inputs a channel keeps at least exp(-exp(-1/2)) of what it held."""
    layer = build()
    log_decay = -math.exp(-0.5) * layer.decay(1e6 * torch.randn(4, 16).double()).sigmoid()
    assert (log_decay.exp() >= math.exp(-math.exp(-0.5)) - 1e-12).all()
    y = layer(1e4 * torch.randn(2, 40, 16, dtype=torch.float64)).y
    assert torch.isfinite(y).all()


def test_padding_behind_the_tokens_leaves_the_memory():
    layer = build()
    start = layer(torch.randn(2, 6, 16, dtype=torch.float64), return_state=True).state
    mask = torch.zeros(2, 9, dtype=torch.bool)
    later = layer(torch.randn(2, 9, 16, dtype=torch.float64), start, mask=mask, return_state=True).state
    assert torch.equal(later.memory, start.memory)


def test_start_values_are_the_papers_first_layer():
    layer = registry.build("rwkv7", {"d_model": 8, "n_heads": 2})
    channel = torch.arange(8) / 8
    torch.testing.assert_close(layer.shift[0], 1 - channel**0.2)
    torch.testing.assert_close(layer.shift[4], 1 - channel**0.9)
    assert layer.decay.out.bias[0].item() == pytest.approx(-8.0)  # -6 + 0.5 - 2.5
    assert layer.decay.out.bias[-1].item() == pytest.approx(3.0)  # 0 + 0.5 + 2.5
    assert layer.removal_scale[0].item() == pytest.approx(0.76)


def test_one_channel_is_a_layer_too():
    y = registry.build("rwkv7", {"d_model": 1})(torch.randn(2, 5, 1)).y
    assert torch.isfinite(y).all()


def test_named_options_belong_to_parameters():
    layer = build()
    options = layer.parameter_options()
    assert set(options) <= {name for name, _ in layer.named_parameters()}
    assert all(not option.weight_decay for option in options.values())


def test_autocast_stays_near_the_exact_result():
    layer = build().float()
    x = torch.randn(2, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x).y
    expected = layer(x).y
    assert (found.float() - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 15, "n_heads": 2}, "d_model=15 isn't divisible by n_heads=2"),
        ({"gate_rnak": 4}, "did you mean 'gate_rank'"),
        ({"decay_rank": 0}, "decay_rank: .* greater than 0, got 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        registry.build("rwkv7", options)


@pytest.mark.cuda
def test_fla_in_float32_is_an_error_with_the_way_out():
    pytest.importorskip("triton")
    layer = registry.build("rwkv7", {"impl": "fla"}).cuda()
    with pytest.raises(UserError, match=r"no kernel for float32 outside autocast.*'reference'"):
        layer(torch.zeros(1, 1, 64, device="cuda"))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert layer.impl == "fla"
