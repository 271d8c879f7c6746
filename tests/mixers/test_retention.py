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


def test_chunk_size_changes_no_output():
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    expected = build(chunk_size=64)(x).y
    for chunk_size in (1, 5, 21):
        assert_same(build(chunk_size=chunk_size)(x).y, expected)


def test_far_positions_keep_their_precision():
    layer = build().float()
    x = torch.randn(1, 12, 16)
    start = layer.initial_state(1, device="cpu", dtype=torch.float32)
    far = layer(x, start._replace(position=start.position + 1_000_000)).y
    assert_same(far, layer(x).y, atol=1e-4)


@pytest.mark.parametrize("use_output_gate", [True, False])
def test_padded_outputs_are_zero_and_gradients_finite(use_output_gate):
    layer = build(use_output_gate=use_output_gate)
    x = torch.full((2, 6, 16), float("nan"), dtype=torch.float64)
    x[0, 2:4] = 1.0
    x.requires_grad_()
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 2:4] = True
    y = layer(x, mask=mask).y
    assert torch.isfinite(y).all()
    assert (y[~mask] == 0).all()
    assert (y[mask] != 0).any()
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_state_is_float32_for_half_inputs():
    out = build().bfloat16()(torch.randn(2, 5, 16, dtype=torch.bfloat16), return_state=True)
    assert out.y.dtype == torch.bfloat16
    assert out.state.memory.dtype == torch.float32


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_fla_without_a_gpu_is_an_error_with_the_way_out():
    with pytest.raises(UserError, match=r"impl='fla'.*'reference'"):
        registry.build("retention", {"impl": "fla"})(torch.zeros(1, 1, 64))
    assert registry.build("retention").impl == "reference"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels run on CUDA only")
@pytest.mark.parametrize("n_tokens", [1, 63, 130])
def test_fla_equals_the_reference(n_tokens):
    pytest.importorskip("triton")
    options = {"d_model": 64, "n_heads": 2}
    reference = registry.build("retention", {**options, "impl": "reference"}).cuda()
    fla = registry.build("retention", {**options, "impl": "fla"}).cuda()
    fla.load_state_dict(reference.state_dict())
    x = torch.randn(2, n_tokens, 64, device="cuda")
    mask = torch.arange(n_tokens, device="cuda").expand(2, -1) >= min(3, n_tokens - 1)
    with torch.no_grad():
        start = reference(torch.randn(2, 5, 64, device="cuda"), return_state=True).state
    results = []
    for layer in (reference, fla):
        leaf = x.clone().requires_grad_()
        out = layer(leaf, start, mask=mask, return_state=True)
        out.y.square().sum().backward()
        results.append((out.y, out.state.memory, leaf.grad))
    for want, got in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-2 * want.norm()
