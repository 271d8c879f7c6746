"""Diagonal plus low rank by chunks against the rule token by token, and the rule against its equation."""

import pytest
import torch
from torch.nn import functional

from mixers.dplr import dplr_chunked, dplr_recurrent

B, H, K, V = 2, 2, 5, 3


def rule_inputs(n_tokens, dtype=torch.float64, decay=0.5):
    """q, a, b, v, log_decay, state: a and b as in the removal by a key of length one."""
    torch.manual_seed(n_tokens)
    q, key = (functional.normalize(torch.randn(B, n_tokens, H, K, dtype=dtype), dim=-1) for _ in range(2))
    rate = torch.rand(B, n_tokens, H, K, dtype=dtype)
    v = torch.randn(B, n_tokens, H, V, dtype=dtype)
    log_decay = -decay * torch.rand(B, n_tokens, H, K, dtype=dtype)
    state = torch.randn(B, H, K, V, dtype=dtype)
    return [x.detach().requires_grad_() for x in (q, -key, rate * key, v, log_decay, state)]


def write_key(n_tokens, dtype=torch.float64):
    torch.manual_seed(100 + n_tokens)
    return torch.randn(B, n_tokens, H, K, dtype=dtype).requires_grad_()


def assert_same(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("separate_key", [False, True])
def test_recurrent_is_its_equation(separate_key):
    q, a, b, v, log_decay, state = (x.detach() for x in rule_inputs(6))
    k = write_key(6).detach() if separate_key else None
    out = dplr_recurrent(q, a, b, v, log_decay, state, k=k)
    write = b if k is None else k
    for i in range(B):
        for h in range(H):
            s = state[i, h]
            for t in range(6):
                transition = torch.diag(log_decay[i, t, h].exp()) + torch.outer(b[i, t, h], a[i, t, h])
                s = transition @ s + torch.outer(write[i, t, h], v[i, t, h])
                assert_same(out.y[i, t, h], s.T @ q[i, t, h])
            assert_same(out.state[i, h], s)


@pytest.mark.parametrize("n_tokens", [1, 2, 7, 8, 9, 23])
@pytest.mark.parametrize("chunk_size", [1, 4, 7, 8, 64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("separate_key", [False, True])
def test_chunks_equal_the_recurrence_with_gradients(n_tokens, chunk_size, masked, separate_key):
    inputs = rule_inputs(n_tokens)
    mask = torch.rand(B, n_tokens) > 0.3 if masked else None
    k = write_key(n_tokens) if separate_key else None
    expected = dplr_recurrent(*inputs, mask, k=k)
    found = dplr_chunked(*inputs, mask, k=k, chunk_size=chunk_size)
    assert_same(found.y, expected.y)
    assert_same(found.state, expected.state)
    weight_y, weight_state = torch.randn_like(expected.y), torch.randn_like(expected.state)
    losses = [(out.y * weight_y).sum() + (out.state * weight_state).sum() for out in (found, expected)]
    leaves = [*inputs, k] if separate_key else inputs
    for got, want in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("rule", [dplr_recurrent, dplr_chunked])
def test_no_tokens_leave_the_state(rule):
    inputs = rule_inputs(0)
    out = rule(*inputs, k=write_key(0))
    assert out.y.shape == (B, 0, H, V)
    assert torch.equal(out.state, inputs[-1])


@pytest.mark.parametrize("rule", [dplr_recurrent, dplr_chunked])
@pytest.mark.parametrize("separate_key", [False, True])
def test_padding_writes_nothing_and_forgets_nothing(rule, separate_key):
    inputs = [x.detach() for x in rule_inputs(7)]
    mask = torch.zeros(B, 7, dtype=torch.bool)
    k = write_key(7).detach() if separate_key else None
    assert torch.equal(rule(*inputs, mask, k=k).state, inputs[-1])


@pytest.mark.parametrize("separate_key", [False, True])
def test_strong_decay_of_single_channels_stays_finite_with_gradients(separate_key):
    """Channels that forget all beside channels that forget nothing: a quotient of decays would be 0/0 here."""
    q, a, b, v, _, state = rule_inputs(40, torch.float32)
    k = write_key(40, torch.float32) if separate_key else None
    log_decay = torch.zeros(B, 40, H, K)
    log_decay[..., :2] = -1e4
    log_decay[:, ::3, :, 2] = -90.0
    log_decay.requires_grad_()
    out = dplr_chunked(q, a, b, v, log_decay, state, k=k, chunk_size=16)
    exact = dplr_recurrent(*(x.double() for x in (q, a, b, v, log_decay, state)), k=None if k is None else k.double())
    assert exact.y.abs().max() > 0.1
    assert_same(out.y.double(), exact.y, atol=2e-5)
    (out.y.square().sum() + out.state.sum()).backward()
    for x in (q, a, b, v, log_decay, state):
        assert torch.isfinite(x.grad).all()


def test_mild_decay_after_a_strong_one_keeps_its_precision():
    """Differences of float32 sums of the logs would be wrong by 1e-3 here."""
    inputs = [x.detach() for x in rule_inputs(32, torch.float32, decay=0.01)]
    inputs[4][:, 0] = -3e4
    exact = dplr_recurrent(*(x.double() for x in inputs))
    assert_same(dplr_chunked(*inputs, chunk_size=32).y.double(), exact.y, atol=5e-6)


def test_half_precision_inputs_are_computed_in_float32_even_under_autocast():
    inputs = [x.detach().bfloat16() for x in rule_inputs(9)]
    exact = dplr_recurrent(*(x.double() for x in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dplr_chunked(*inputs, chunk_size=4)
    assert found.state.dtype == torch.float32
    assert_same(found.y.double(), exact.y, atol=1e-5)
