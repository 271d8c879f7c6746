"""The delta rule by chunks against the rule token by token; the layer around it."""

import pytest
import torch
from torch.nn import functional

from mixers import registry
from mixers.delta_rule import gated_delta_rule_chunked, gated_delta_rule_recurrent
from mixers.errors import UserError
from tests.mixers.fla_equality import skip_where_refused

B, H, K, V = 2, 2, 5, 3


def rule_inputs(n_tokens, dtype=torch.float64, decay=0.3):
    torch.manual_seed(n_tokens)
    q, k = (functional.normalize(torch.randn(B, n_tokens, H, K, dtype=dtype), dim=-1) for _ in range(2))
    v = torch.randn(B, n_tokens, H, V, dtype=dtype)
    beta = torch.rand(B, n_tokens, H, dtype=dtype)
    log_decay = -decay * torch.rand(B, n_tokens, H, dtype=dtype)
    state = torch.randn(B, H, K, V, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, beta, log_decay, state)]


def assert_same(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_recurrent_is_the_papers_equation():
    q, k, v, beta, log_decay, state = (x.detach() for x in rule_inputs(6))
    out = gated_delta_rule_recurrent(q, k, v, beta, log_decay, state)
    for b in range(B):
        for h in range(H):
            s = state[b, h].T  # the paper's (V,K)
            for t in range(6):
                key, value = k[b, t, h], v[b, t, h]
                forget = torch.eye(K).double() - beta[b, t, h] * torch.outer(key, key)
                s = log_decay[b, t, h].exp() * s @ forget + beta[b, t, h] * torch.outer(value, key)
                assert_same(out.y[b, t, h], s @ q[b, t, h])
            assert_same(out.state[b, h], s.T)


@pytest.mark.parametrize("n_tokens", [1, 4, 7, 8, 9, 23])
@pytest.mark.parametrize("chunk_size", [1, 4, 8, 64])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_equal_the_recurrence_with_gradients(n_tokens, chunk_size, masked):
    inputs = rule_inputs(n_tokens)
    mask = torch.rand(B, n_tokens) > 0.3 if masked else None
    expected = gated_delta_rule_recurrent(*inputs, mask)
    found = gated_delta_rule_chunked(*inputs, mask, chunk_size=chunk_size)
    assert_same(found.y, expected.y)
    assert_same(found.state, expected.state)
    weight_y, weight_state = torch.randn_like(expected.y), torch.randn_like(expected.state)
    losses = [(out.y * weight_y).sum() + (out.state * weight_state).sum() for out in (found, expected)]
    for got, want in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
        assert_same(got, want)


def test_no_tokens_leave_the_state():
    inputs = rule_inputs(0)
    for rule in (gated_delta_rule_recurrent, gated_delta_rule_chunked):
        out = rule(*inputs)
        assert out.y.shape == (B, 0, H, V)
        assert torch.equal(out.state, inputs[-1])


def test_padding_writes_nothing_and_forgets_nothing():
    inputs = [x.detach() for x in rule_inputs(7)]
    mask = torch.zeros(B, 7, dtype=torch.bool)
    for rule in (gated_delta_rule_recurrent, gated_delta_rule_chunked):
        assert torch.equal(rule(*inputs, mask).state, inputs[-1])


def test_strong_decay_stays_finite_with_gradients():
    q, k, v, beta, _, state = rule_inputs(40, torch.float32)
    log_decay = torch.full((B, 40, H), -1e4, requires_grad=True)
    out = gated_delta_rule_chunked(q, k, v, beta, log_decay, state, chunk_size=16)
    assert_same(out.y, gated_delta_rule_recurrent(q, k, v, beta, log_decay, state).y, atol=1e-5)
    (out.y.square().sum() + out.state.sum()).backward()
    for x in (q, k, v, beta, log_decay, state):
        assert torch.isfinite(x.grad).all()


def test_mild_decay_after_a_strong_one_keeps_its_precision():
    """Float32 sums of the logs would be wrong by 1e-3 here."""
    inputs = [x.detach() for x in rule_inputs(32, torch.float32, decay=0.01)]
    inputs[4][:, 0] = -3e4
    exact = gated_delta_rule_recurrent(*(x.double() for x in inputs))
    found = gated_delta_rule_chunked(*inputs, chunk_size=32)
    assert_same(found.y.double(), exact.y, atol=5e-6)


def test_repeated_keys_are_solved_exactly_enough():
    """All keys alike and b = 1: the system is as ill-conditioned as it gets; each read returns the last value."""
    k = functional.normalize(torch.ones(1, 64, 1, K), dim=-1)
    v = torch.randn(1, 64, 1, V)
    out = gated_delta_rule_chunked(k, k, v, torch.ones(1, 64, 1), torch.zeros(1, 64, 1))
    assert_same(out.y, v, atol=1e-5)


def test_half_precision_inputs_are_computed_in_float32_even_under_autocast():
    inputs = [x.detach().bfloat16() for x in rule_inputs(9)]
    exact = gated_delta_rule_recurrent(*(x.double() for x in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gated_delta_rule_chunked(*inputs, chunk_size=4)
    assert found.state.dtype == torch.float32
    assert_same(found.y.double(), exact.y, atol=1e-5)


def build(**options):
    torch.manual_seed(0)
    return registry.build("gated_deltanet", {"d_model": 16, "n_heads": 2, **options}).double()


def test_layer_is_its_equation():
    """The whole layer written out for one sequence, with a loop for the convolutions and the rule's own oracle."""
    layer = build(value_dim=6, conv_kernel=3)
    with torch.no_grad():
        layer.norm.weight.normal_()
    x = torch.randn(1, 7, 16, dtype=torch.float64)

    def convolved(linear, conv):
        u = functional.pad(linear(x), (0, 0, 2, 0))
        y = sum(u[:, j : j + 7] * conv.weight[:, j] for j in range(3))
        return functional.silu(y).unflatten(-1, (2, -1))

    q, k, v = (convolved(*pair) for pair in ((layer.q, layer.conv_q), (layer.k, layer.conv_k), (layer.v, layer.conv_v)))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    log_decay = -layer.A_log.exp() * functional.softplus(layer.decay(x) + layer.dt_bias)
    y = gated_delta_rule_recurrent(q, k, v, layer.beta(x).sigmoid(), log_decay).y
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + layer.norm.weight)
    expected = layer.out((y * functional.silu(layer.gate(x)).unflatten(-1, (2, 6))).flatten(2))
    assert_same(layer(x).y, expected)


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
    assert set(options) <= {name for name, _ in layer.named_parameters()}
    assert all(not option.weight_decay for option in options.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 15, "n_heads": 2}, "d_model=15 isn't divisible by n_heads=2"),
        ({"expand_v": 0.3}, "expand_v=0.3 times the key width 64"),
        ({"expand_v": 2.0, "value_dim": 8}, "value_dim=8 and expand_v=2.0 both set V"),
        ({"conv_kernal": 4}, "did you mean 'conv_kernel'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        registry.build("gated_deltanet", options)


def test_expand_v_sets_the_value_width():
    assert build(expand_v=2.0).initial_state(1, device="cpu", dtype=torch.float32).memory.shape == (1, 2, 8, 16)


@pytest.mark.cuda
@pytest.mark.parametrize("n_tokens", [1, 63, 130])
def test_fla_equals_the_reference(n_tokens):
    pytest.importorskip("triton")
    options = {"d_model": 64, "n_heads": 2}
    skip_where_refused("gated_deltanet", {**options, "impl": "fla"})
    reference = registry.build("gated_deltanet", {**options, "impl": "reference"}).cuda()
    fla = registry.build("gated_deltanet", {**options, "impl": "fla"}).cuda()
    fla.load_state_dict(reference.state_dict())
    x = torch.randn(2, n_tokens, 64, device="cuda")
    mask = torch.arange(n_tokens, device="cuda").expand(2, -1) >= min(3, n_tokens - 1)
    start = reference(torch.randn(2, 5, 64, device="cuda"), return_state=True).state
    start = type(start)(*(part.detach() for part in start))
    results = []
    for layer in (reference, fla):
        leaf = x.clone().requires_grad_()
        out = layer(leaf, start, mask=mask, return_state=True)
        out.y.square().sum().backward()
        results.append((out.y, out.state.memory, leaf.grad))
    for want, got in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-2 * want.norm()
