"""RMSNorm against its equation, and its precision."""

import pytest
import torch

from mixers.norms import RMSNorm, norms_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_equation(dtype):
    torch.manual_seed(0)
    norm = RMSNorm(6, eps=1e-3).to(dtype)
    x = torch.randn(2, 3, 6, dtype=dtype)
    scale = (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), x / scale)
    with torch.no_grad():
        norm.weight.normal_()
    torch.testing.assert_close(norm(x), x / scale * (1 + norm.weight))
    assert norm(x).dtype == dtype
    norm.reset_parameters()
    torch.testing.assert_close(norm(x), x / scale)


def test_half_precision_is_computed_in_float32():
    """In bfloat16 itself, 1 + weight would round 2^-10 away, and 300^2 overflows float16."""
    norm = RMSNorm(4)
    with torch.no_grad():
        norm.weight.fill_(2**-10)
    x = torch.full((1, 4), 300.0)
    assert norm.half()(x.half()).isfinite().all()
    exact = RMSNorm(4)
    with torch.no_grad():
        exact.weight.fill_(2**-10)
    x = torch.randn(64, 4)
    found = norm.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact(x.bfloat16().float()).bfloat16())


def test_no_tokens():
    assert RMSNorm(4)(torch.zeros(2, 0, 4)).shape == (2, 0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_several_norms_of_one_input_are_those_of_each(dtype):
    torch.manual_seed(0)
    norms = [RMSNorm(6).to(dtype) for _ in range(3)]
    x = torch.randn(5, 6, dtype=dtype, requires_grad=True)
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    parts = [*(norm.weight for norm in norms), x]
    found = []
    for out in (norms_of(x, norms), [norm(x) for norm in norms]):
        found.append([*out, *torch.autograd.grad(sum((y * y).sum() for y in out), parts)])
    # The three derivatives on x are rounded to bfloat16 before they are added up, or after.
    tolerance = {"rtol": 0.05, "atol": 0.2} if dtype == torch.bfloat16 else {}
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, **tolerance)
    for got, want in zip(*(outs[:3] for outs in found), strict=True):
        torch.testing.assert_close(got, want)
