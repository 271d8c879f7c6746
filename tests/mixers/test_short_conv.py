"""ShortConv against a sum written out, over cuts, padding and degenerate lengths."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mixers.errors import UserError
from mixers.short_conv import ShortConv


def build(dim=3, kernel=4, activation=True):
    torch.manual_seed(0)
    return ShortConv(dim, kernel, activation=activation).double()


def oracle(conv, x):
    """y[t] = act(sum_j w[k-1-j] x[t-j]), one token and tap at a time."""
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for j in range(min(conv.kernel, t + 1)):
            y[:, t] += conv.weight[:, conv.kernel - 1 - j] * x[:, t - j]
    return y * torch.sigmoid(y) if conv.activation else y


@pytest.mark.parametrize("kernel", [1, 3, 4])
@pytest.mark.parametrize("activation", [True, False])
def test_equals_the_sum(kernel, activation):
    conv = build(kernel=kernel, activation=activation)
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    torch.testing.assert_close(conv(x)[0], oracle(conv, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_any_cut_equals_one_call(kernel):
    conv = build(kernel=kernel)
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    whole, last = conv(x)
    for lengths in ([9, 0], [0, 9], [5, 4], [1] * 9):
        state, parts = conv.initial_state(2, device="cpu", dtype=x.dtype), []
        for part in x.split(lengths, dim=1):
            y, state = conv(part, state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
        assert torch.equal(state, last)


def test_left_padding_changes_nothing_on_the_real_tokens():
    conv = build()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    padded = torch.cat([torch.full((2, 3, 3), float("nan"), dtype=torch.float64), x], dim=1)
    mask = torch.arange(8).expand(2, 8) >= 3
    y, state = conv(padded, mask=mask)
    torch.testing.assert_close(y[:, 3:], conv(x)[0], rtol=0, atol=1e-12)
    assert torch.equal(state, conv(x)[1])


def test_gradients_by_finite_differences():
    conv = build()
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)

    def call(x, state, weight):
        return torch.func.functional_call(conv, {"weight": weight}, (x, state))

    assert torch.autograd.gradcheck(call, (x, state, conv.weight))


def test_state_owns_its_memory_only():
    conv = build()
    _, state = conv(torch.randn(1, 100, 3, dtype=torch.float64))
    assert state.untyped_storage().nbytes() == state.numel() * 8


def test_flops_are_what_torch_counts():
    conv = build()
    with FlopCounterMode(display=False) as counter:
        conv(torch.randn(1, 1, 3, dtype=torch.float64))
    assert counter.get_total_flops() == conv.flops_per_token()


def test_mistakes_are_named():
    with pytest.raises(UserError, match="kernel must be at least 1, got 0"):
        ShortConv(3, 0)
    with pytest.raises(UserError, match=r"mask: must be bool of shape \(B,T\) = \(2, 5\)"):
        build()(torch.zeros(2, 5, 3, dtype=torch.float64), mask=torch.ones(2, 4, dtype=torch.bool))
