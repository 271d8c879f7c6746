"""Decaying linear attention by chunks against the rule token by token."""

import pytest
import torch

from mixers.decay_attention import decay_attention, decay_attention_chunked, decay_attention_recurrent
from mixers.errors import UserError
from mixers.implementations import gated_backward_fault

B, H, K, V = 2, 2, 5, 3
BOTH = (decay_attention_recurrent, decay_attention_chunked)
by_head_and_by_channel = pytest.mark.parametrize("decay_shape", [(H,), (H, K)], ids=["by_head", "by_channel"])


def rule_inputs(n_tokens, decay_shape, dtype=torch.float64, decay=0.3):
    torch.manual_seed(n_tokens)
    q, k = (torch.randn(B, n_tokens, H, K, dtype=dtype) for _ in range(2))
    v = torch.randn(B, n_tokens, H, V, dtype=dtype)
    log_decay = -decay * torch.rand(B, n_tokens, *decay_shape, dtype=dtype)
    state = torch.randn(B, H, K, V, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, log_decay, state)]


def assert_same(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@by_head_and_by_channel
def test_recurrent_is_the_equation(decay_shape):
    q, k, v, log_decay, state = (x.detach() for x in rule_inputs(6, decay_shape))
    out = decay_attention_recurrent(q, k, v, log_decay, state)
    for b in range(B):
        for h in range(H):
            s = state[b, h]
            for t in range(6):
                s = torch.diag(log_decay[b, t, h].exp().expand(K)) @ s + torch.outer(k[b, t, h], v[b, t, h])
                assert_same(out.y[b, t, h], s.T @ q[b, t, h])
            assert_same(out.state[b, h], s)


@by_head_and_by_channel
@pytest.mark.parametrize("n_tokens", [1, 4, 7, 8, 9, 23])
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("decay", [0.3, 50.0])
def test_chunks_equal_the_recurrence_with_gradients(decay_shape, n_tokens, chunk_size, masked, decay):
    inputs = rule_inputs(n_tokens, decay_shape, decay=decay)
    mask = torch.rand(B, n_tokens) > 0.3 if masked else None
    expected = decay_attention_recurrent(*inputs, mask)
    found = decay_attention_chunked(*inputs, mask, chunk_size=chunk_size)
    assert_same(found.y, expected.y)
    assert_same(found.state, expected.state)
    weight_y, weight_state = torch.randn_like(expected.y), torch.randn_like(expected.state)
    losses = [(out.y * weight_y).sum() + (out.state * weight_state).sum() for out in (found, expected)]
    for got, want in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
        assert_same(got, want)


@by_head_and_by_channel
def test_no_tokens_leave_the_state(decay_shape):
    inputs = rule_inputs(0, decay_shape)
    for rule in BOTH:
        out = rule(*inputs)
        assert out.y.shape == (B, 0, H, V)
        assert torch.equal(out.state, inputs[-1])


@by_head_and_by_channel
def test_padding_writes_nothing_and_forgets_nothing(decay_shape):
    q, _, _, log_decay, state = (x.detach() for x in rule_inputs(7, decay_shape))
    nan_k, nan_v = torch.full((B, 7, H, K), float("nan")).double(), torch.full((B, 7, H, V), float("nan")).double()
    mask = torch.zeros(B, 7, dtype=torch.bool)
    for rule in BOTH:
        out = rule(q, nan_k, nan_v, log_decay, state, mask)
        assert torch.equal(out.state, state)
        assert_same(out.y, torch.einsum("bthk,bhkv->bthv", q, state))


def test_a_mask_of_the_wrong_shape_is_named():
    with pytest.raises(UserError, match=r"mask: must be bool of shape \(B,T\) = \(2, 7\)"):
        decay_attention_chunked(*rule_inputs(7, (H,)), torch.ones(B, 6, dtype=torch.bool))


@by_head_and_by_channel
@pytest.mark.parametrize("strength", [1e2, 1e4, 1e30])
def test_strong_decay_stays_finite_with_gradients(decay_shape, strength):
    q, k, v, _, state = rule_inputs(40, decay_shape, torch.float32)
    log_decay = torch.full((B, 40, *decay_shape), -strength, requires_grad=True)
    out = decay_attention_chunked(q, k, v, log_decay, state, chunk_size=16)
    assert_same(out.y, decay_attention_recurrent(q, k, v, log_decay, state).y, atol=1e-5)
    (out.y.square().sum() + out.state.sum()).backward()
    for x in (q, k, v, log_decay, state):
        assert torch.isfinite(x.grad).all()
    assert (v.grad != 0).any()


@by_head_and_by_channel
def test_mild_decay_after_a_strong_one_keeps_its_precision(decay_shape):
    """Differences of float32 sums of the logs would be wrong by 1e-3 here."""
    inputs = [x.detach() for x in rule_inputs(32, decay_shape, torch.float32, decay=0.01)]
    inputs[3][:, 0] = -3e4
    exact = decay_attention_recurrent(*(x.double() for x in inputs))
    found = decay_attention_chunked(*inputs, chunk_size=32)
    assert_same(found.y.double(), exact.y, atol=5e-5)


def test_one_decay_for_all_channels_is_the_decay_of_the_head():
    q, k, v, log_decay, state = rule_inputs(13, (H,))
    by_head = decay_attention_chunked(q, k, v, log_decay, state, chunk_size=4)
    by_channel = decay_attention_chunked(q, k, v, log_decay.unsqueeze(-1).expand(-1, -1, -1, K), state, chunk_size=4)
    assert_same(by_channel.y, by_head.y)
    assert_same(by_channel.state, by_head.state)


@pytest.mark.parametrize("masked", [False, True])
def test_one_decay_for_all_tokens_is_that_decay_at_each(masked):
    q, k, v, log_decay, state = rule_inputs(13, (H,))
    log_decay = log_decay[0, 0]
    mask = torch.rand(B, 13) > 0.3 if masked else None
    for rule in BOTH:
        short, long = rule(q, k, v, log_decay, state, mask), rule(q, k, v, log_decay.expand(B, 13, H), state, mask)
        assert torch.equal(short.y, long.y)
        assert torch.equal(short.state, long.state)


@by_head_and_by_channel
def test_half_precision_inputs_are_computed_in_float32_even_under_autocast(decay_shape):
    inputs = [x.detach().bfloat16() for x in rule_inputs(9, decay_shape)]
    exact = decay_attention_recurrent(*(x.double() for x in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for n_tokens in (1, 9):
            q, k, v, log_decay, state = *(x[:, :n_tokens] for x in inputs[:4]), inputs[4]
            found = decay_attention(q, k, v, log_decay, state, impl="reference", chunk_size=4)
            assert found.state.dtype == torch.float32
            assert_same(found.y.double(), exact.y[:, :n_tokens], atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 63, 130])
@pytest.mark.parametrize("decay", [0.3, 50.0])
def test_fla_equals_the_reference(by_channel, n_tokens, decay):
    pytest.importorskip("triton")
    fault = "" if by_channel else gated_backward_fault(torch.device("cuda"), mended_by_tilelang=False)
    if fault:
        pytest.skip(fault)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, B, n_tokens, H, 32, device="cuda")
    log_decay = -decay * torch.rand(B, n_tokens, *((H, 32) if by_channel else (H,)), device="cuda")
    inputs = [q, k, v, log_decay, torch.randn(B, H, 32, 32, device="cuda")]
    mask = torch.arange(n_tokens, device="cuda").expand(B, -1) >= min(3, n_tokens - 1)
    results = []
    for impl in ("reference", "fla"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = decay_attention(*leaves, mask, impl=impl, chunk_size=32)
        (out.y.square().sum() + out.state.square().sum()).backward()
        with torch.no_grad():  # decoding takes another kernel
            decoded = decay_attention(*leaves, mask, impl=impl, chunk_size=32).y
        results.append((out.y, out.state, decoded, *(leaf.grad for leaf in leaves)))
    # fla sums the gradient of log decays backwards in time from terms q dq - k dk in tf32 and adds what flows into the
    # state, also where each is large and their sum nothing: an error is measured against the terms.
    dq, dk, d_decay = (results[0][i] for i in (3, 4, 6))
    terms = ((q * dq).sum(-1).abs() + (k * dk).sum(-1).abs()).sum(1).norm() + (results[0][1] ** 2).sum().sqrt()
    for i, (want, got) in enumerate(zip(*results, strict=True)):
        assert torch.isfinite(got).all()
        scale = terms if i == 6 else want.norm()
        assert (got - want).norm() <= 1e-2 * scale + 1e-5, (i, (got - want).norm(), scale)
    assert d_decay.isfinite().all()
