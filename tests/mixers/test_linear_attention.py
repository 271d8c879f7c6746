"""Linear attention: chunks against the sums token by token; feature maps against the kernels they stand for."""

import pytest
import torch
from torch.nn import functional

from mixers import implementations, registry
from mixers.chunking import chunk_plan, join_chunks, split_chunks
from mixers.errors import UserError
from mixers.feature_maps import apply_feature_map, n_features
from mixers.implementations import resolve_fla
from mixers.linear_attention import LinearAttentionState, linear_attention_chunked

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def recurrent(q, k, v, state):
    """The definition: write, then read, one token at a time."""
    memory, key_sum = state
    ys = []
    for t in range(q.shape[1]):
        memory = memory + k[:, t, :, :, None] * v[:, t, :, None, :]
        y = (q[:, t, :, :, None] * memory).sum(-2)
        if key_sum is not None:
            key_sum = key_sum + k[:, t]
            y = y / (q[:, t] * key_sum).sum(-1, keepdim=True)
        ys.append(y)
    return torch.stack(ys, 1), memory, key_sum


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 7, 8, 9, 23])
@pytest.mark.parametrize("chunk_size", [1, 4, 8, 64])
def test_chunks_equal_the_recurrence_with_gradients(normalize, n_tokens, chunk_size):
    torch.manual_seed(n_tokens)
    q, k = torch.rand(2, n_tokens, 2, 5).double() + 0.1, torch.rand(2, n_tokens, 2, 5).double()
    inputs = [q, k, randn(2, n_tokens, 2, 3), randn(2, 2, 5, 3)] + ([torch.rand(2, 2, 5).double()] if normalize else [])
    inputs = [x.requires_grad_() for x in inputs]
    start = LinearAttentionState(inputs[3], inputs[4] if normalize else None)
    y, state = linear_attention_chunked(*inputs[:3], start, chunk_size)
    found = [y, *state][: 3 if normalize else 2]
    expected = [part for part in recurrent(*inputs[:3], start) if part is not None]
    weights = [randn(*part.shape) for part in expected]
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    losses = [sum((p * w).sum() for p, w in zip(parts, weights, strict=True)) for parts in (found, expected)]
    for got, want in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("key_dim", [1, 2, 3, 8])
def test_taylor_features_are_the_second_order_exponential(key_dim):
    q, k = randn(50, key_dim), randn(50, key_dim)
    phi_q, phi_k = apply_feature_map("taylor", q), apply_feature_map("taylor", k)
    assert phi_q.shape[-1] == n_features("taylor", key_dim)
    logit = (q * k).sum(-1) / key_dim**0.5
    torch.testing.assert_close((phi_q * phi_k).sum(-1), 1 + logit + logit.square() / 2, rtol=0, atol=1e-12)


def test_simple_feature_maps():
    x = torch.tensor([-2.0, 0.0, 3.0])
    torch.testing.assert_close(apply_feature_map("elu", x), torch.tensor([torch.e**-2, 1.0, 4.0]))
    assert apply_feature_map("relu", x).tolist() == [0, 0, 3]
    assert torch.equal(apply_feature_map("identity", x), x)
    assert n_features("elu", 7) == n_features("relu", 7) == n_features("identity", 7) == 7


@pytest.mark.parametrize(("n_tokens", "chunk_size"), [(0, 4), (1, 64), (64, 64), (65, 64), (129, 64), (10, 3)])
def test_chunk_plans_pad_little_and_come_back(n_tokens, chunk_size):
    n_chunks, length = chunk_plan(n_tokens, chunk_size)
    assert length <= chunk_size
    assert 0 <= n_chunks * length - n_tokens < n_chunks
    x = torch.randn(2, n_tokens, 3, 5)
    chunks = split_chunks(x, n_chunks, length)
    assert chunks.shape == (2, 3, n_chunks, length, 5)
    assert torch.equal(join_chunks(chunks, n_tokens), x)


def build(**options):
    torch.manual_seed(0)
    return registry.build("linear_attention", {"d_model": 16, "n_heads": 2, **options}).double()


@pytest.mark.parametrize(
    "options",
    [{}, {"feature_map": "taylor", "key_dim": 3}, {"feature_map": "identity", "normalize": False, "value_dim": 5}],
)
def test_layer_is_its_equation(options):
    """As attention with weights phi(q).phi(k), all pairs written out."""
    layer = build(**options)
    x = randn(1, 9, 16)
    q, k, v = (linear(x)[0].unflatten(-1, (2, -1)).transpose(0, 1) for linear in (layer.q, layer.k, layer.v))
    phi_q, phi_k = (apply_feature_map(layer.config.feature_map, part) for part in (q, k))
    weights = (phi_q @ phi_k.transpose(-1, -2)) * torch.ones(9, 9).tril()
    if layer.config.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    expected = (weights @ v).transpose(0, 1).flatten(1) @ layer.out.weight.T
    torch.testing.assert_close(layer(x).y[0], expected, rtol=0, atol=1e-11)


def test_chunk_size_changes_no_output():
    x = randn(2, 21, 16)
    expected = build(chunk_size=64)(x).y
    for chunk_size in (1, 5, 21):
        torch.testing.assert_close(build(chunk_size=chunk_size)(x).y, expected, rtol=0, atol=1e-11)


def test_relu_queries_that_match_no_key_read_zero():
    layer = build(feature_map="relu", n_heads=1)
    with torch.no_grad():
        layer.q.weight.copy_(-torch.eye(16))
        layer.k.weight.copy_(torch.eye(16))
    x = torch.rand(1, 4, 16).double().requires_grad_()
    y = layer(x).y
    assert (y == 0).all()
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_padding_is_zero_and_finite_with_gradients():
    layer = build()
    x = torch.full((2, 6, 16), float("nan"), dtype=torch.float64)
    x[1, 3:] = randn(3, 16)
    x.requires_grad_()
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 3:] = True
    y = layer(x, mask=mask).y
    assert (y[~mask] == 0).all()
    torch.testing.assert_close(y[1, 3:], layer(x[1:, 3:]).y[0], rtol=0, atol=1e-12)
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_sums_stay_float32_for_half_inputs_and_under_autocast():
    layer = build()
    x = torch.randn(2, 40, 16)
    exact = layer(x.double()).y
    out = layer.float().bfloat16()(x.bfloat16(), return_state=True)
    assert out.y.dtype == torch.bfloat16
    assert all(part.dtype == torch.float32 for part in out.state)
    assert (out.y.double() - exact).norm() < 0.05 * exact.norm()
    layer = build().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, return_state=True)
    assert all(part.dtype == torch.float32 for part in out.state)
    # Sums of 40 positive features, each rounded to bfloat16 once; summed in bfloat16 they would be off by more.
    features = functional.elu(functional.linear(x.bfloat16(), layer.k.weight.bfloat16()).float()) + 1
    torch.testing.assert_close(out.state.key_sum.flatten(1), features.sum(1), rtol=1e-5, atol=1e-4)


def test_key_width_defaults():
    assert build().config.head_key_dim == 8
    assert build(feature_map="taylor").config.n_features == 1 + 16 + 136
    state = build(feature_map="taylor", key_dim=2, value_dim=5).initial_state(3, device="cpu", dtype=torch.bfloat16)
    assert state.memory.shape == (3, 2, 6, 5)
    assert state.key_sum.shape == (3, 2, 6)
    assert state.memory.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 15, "n_heads": 2}, "d_model=15 isn't divisible by n_heads=2"),
        ({"feature_map": "identity"}, "feature_map='identity' lets be zero or negative; set normalize=false"),
        ({"feature_map": "tylor"}, "feature_map"),
        ({"keydim": 4}, "did you mean 'key_dim'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        registry.build("linear_attention", options)


@pytest.mark.parametrize("installed", [False, True])
def test_which_implementation_runs(monkeypatch, installed):
    """Which packages there are is the one fact put in: neither machine is at hand."""
    monkeypatch.setattr(implementations, "FLA_MISSING", () if installed else ("triton",))
    assert resolve_fla("auto", CPU, "m") == "reference"
    assert resolve_fla("auto", CUDA, "m") == ("fla" if installed else "reference")
    assert resolve_fla("auto", CUDA, "m", "float64") == "reference"
    assert resolve_fla("reference", CUDA, "m") == "reference"
    if not installed:
        with pytest.raises(UserError, match=r"needs the package triton.*pip install.*'reference'"):
            resolve_fla("fla", CUDA, "m")
        return
    assert resolve_fla("fla", CUDA, "m") == "fla"
    with pytest.raises(UserError, match="runs on cuda only and the layer is on cpu"):
        resolve_fla("fla", CPU, "m")
    with pytest.raises(UserError, match="has no kernel for float64"):
        resolve_fla("fla", CUDA, "m", "float64")


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"feature_map": "taylor"}, {"feature_map": "identity", "normalize": False}])
@pytest.mark.parametrize("n_tokens", [1, 63, 130])
def test_fla_equals_the_reference(options, n_tokens):
    pytest.importorskip("triton")
    options = {"d_model": 64, "n_heads": 2, **options}
    reference = registry.build("linear_attention", {**options, "impl": "reference"}).cuda()
    fla = registry.build("linear_attention", {**options, "impl": "fla"}).cuda()
    fla.load_state_dict(reference.state_dict())
    x = torch.randn(2, n_tokens, 64, device="cuda")
    mask = torch.arange(n_tokens, device="cuda").expand(2, -1) >= min(3, n_tokens - 1)
    start = reference(torch.randn(2, 5, 64, device="cuda"), return_state=True).state
    start = type(start)(*(None if part is None else part.detach() for part in start))
    results = []
    for layer in (reference, fla):
        leaf = x.clone().requires_grad_()
        out = layer(leaf, start, mask=mask, return_state=True)
        out.y.square().sum().backward()
        results.append((out.y, out.state.memory, leaf.grad))
    for want, got in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-2 * want.norm()
