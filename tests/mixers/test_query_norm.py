"""Query normalisations: batch statistics against torch's layer, padding, and what training and evaluation do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixers.errors import UserError
from mixers.query_norm import TokenBatchNorm, query_norm

W = 5


def pair() -> tuple[TokenBatchNorm, nn.BatchNorm1d]:
    """Ours and torch's with the same random scale and shift, float64."""
    torch.manual_seed(0)
    ours, theirs = TokenBatchNorm(W).double(), nn.BatchNorm1d(W).double()
    with torch.no_grad():
        for mine, other in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
            mine.copy_(torch.randn(W))
            other.copy_(mine)
    return ours, theirs


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def statistics(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return norm.running_mean.clone(), norm.running_var.clone()


def test_batch_norm_is_torchs_over_all_tokens_with_gradients_and_running_averages() -> None:
    ours, theirs = pair()
    for n_tokens in (7, 3, 11):
        x = (3 * randn(2, n_tokens, W) + 1).requires_grad_()
        weights = randn(2, n_tokens, W)
        found, expected = ours(x), theirs(x.flatten(0, 1)).view(x.shape)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        gradients = [
            torch.autograd.grad((y * weights).sum(), [x, norm.weight, norm.bias])
            for y, norm in ((found, ours), (expected, theirs))
        ]
        for got, want in zip(*gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
        for got, want in zip(statistics(ours), statistics(theirs), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    x = randn(1, 1, W)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x.flatten(0, 1)).view(x.shape), rtol=0, atol=1e-12)


def test_padding_is_left_out_of_the_statistics() -> None:
    x = randn(2, 6, W)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :4] = False
    padded, packed = pair()[0], pair()[0]
    torch.testing.assert_close(padded(x, mask)[mask], packed(x[mask][None])[0], rtol=0, atol=1e-12)
    for got, want in zip(statistics(padded), statistics(packed), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_real", [0, 1])
def test_too_few_real_tokens_move_no_average_and_stay_finite(n_real: int) -> None:
    norm = pair()[0]
    before = statistics(norm)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0, :n_real] = True
    x = randn(2, 4, W).requires_grad_()
    y = norm(x, mask)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    torch.testing.assert_close(y[mask], norm.bias.expand_as(y[mask]))
    assert all(torch.equal(a, b) for a, b in zip(statistics(norm), before, strict=True))
    assert norm(x[:, :0]).shape == (2, 0, W)


def test_training_on_one_token_is_an_error_with_the_way_out() -> None:
    norm = pair()[0]
    with pytest.raises(UserError, match=r"query_norm='batch'.*more than one token.*query_norm='rms'"):
        norm(randn(1, 1, W))
    assert torch.isfinite(norm.eval()(randn(1, 1, W))).all()


def test_evaluation_changes_nothing() -> None:
    norm = pair()[0]
    norm(randn(2, 9, W))
    before = statistics(norm.eval())
    norm(randn(2, 9, W))
    assert all(torch.equal(a, b) for a, b in zip(statistics(norm), before, strict=True))


def test_half_precision_is_normalised_in_float32() -> None:
    norm = pair()[0]
    x = 100 + randn(4, 200, W)
    exact = norm(x.bfloat16().double())
    found = pair()[0].float()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("kind", ["rms", "rms_float32"])
def test_rms_norms_are_their_equation(kind: str) -> None:
    norm = query_norm(kind, W).double()
    with torch.no_grad():
        norm.weight.normal_()
    x = randn(2, 3, W)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    found = norm(x)
    assert found.dtype == torch.float64
    error = float((found - expected).detach().abs().max())
    assert error < (1e-12 if kind == "rms" else 1e-5)
    assert (error > 1e-12) == (kind == "rms_float32")


def test_none_changes_nothing() -> None:
    x = randn(2, 3, W)
    assert torch.equal(query_norm("none", W)(x), x)
