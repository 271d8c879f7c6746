"""The gated short convolution against its equation and its limits."""

import pytest
import torch

from mixers import registry
from mixers.errors import UserError


def build(**options):
    torch.manual_seed(0)
    return registry.build("short_conv", {"d_model": 16, **options}).double()


def assert_same(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("n_tokens", [1, 2, 9])
@pytest.mark.parametrize("options", [{}, {"kernel": 5, "inner_dim": 6}], ids=str)
def test_layer_is_its_equation(n_tokens, options):
    layer, x = build(**options), torch.randn(2, n_tokens, 16, dtype=torch.float64)
    kernel = layer.config.kernel
    gated = layer.b(x) * layer.u(x)
    rows = []
    for t in range(n_tokens):
        # weight[:, -1] is the newest tap
        mixed = sum(layer.conv.weight[:, kernel - 1 - j] * gated[:, t - j] for j in range(min(kernel, t + 1)))
        rows.append(layer.out(layer.c(x)[:, t] * mixed))
    assert_same(layer(x).y, torch.stack(rows, dim=1))


def test_an_output_sees_exactly_its_taps():
    layer = build(kernel=3)
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4] += 1
    seen = (layer(changed).y - layer(x).y).abs().amax(dim=(0, 2)) > 1e-9
    assert seen.tolist() == [4 <= t <= 6 for t in range(9)]


def test_padding_between_tokens_keeps_its_place():
    layer = build(kernel=3)
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, False, True, True]])
    y = layer(x, mask=mask).y
    assert_same(y[:, 4:], layer(x[:, 4:]).y)
    assert (y[:, 2:4] == 0).all()
    x[:, 2:4] = float("nan")
    assert_same(layer(x, mask=mask).y, y)


def test_state_keeps_the_dtype_of_the_inputs():
    out = build().bfloat16()(torch.randn(2, 5, 16, dtype=torch.bfloat16), return_state=True)
    assert out.y.dtype == out.state.dtype == torch.bfloat16
    assert out.state.shape == (2, 2, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 1}, "kernel: .* greater than 1, got 1"),
        ({"inner_dim": 0}, "inner_dim: .* greater than 0, got 0"),
        ({"kernal": 3}, "did you mean 'kernel'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        registry.build("short_conv", options)
