"""Based against its equation, its two halves and its limits."""

import pytest
import torch

from mixers import registry
from mixers.errors import UserError


def build(**options):
    torch.manual_seed(0)
    return registry.build("based", {"d_model": 16, "n_heads": 4, "key_dim": 3, "window": 4, **options}).double()


def assert_same(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def heads_written_out(layer, x):
    """(n_linear, T, V) and (n_window, T, V): every weight from its formula, token by token. No rope."""
    far, near, v_dim = layer.linear, layer.window, layer.config.head_dim
    q, k = (linear(x).unflatten(-1, (-1, 3)) for linear in (far.q, far.k))
    v = far.v(x).unflatten(-1, (-1, v_dim))
    score = torch.einsum("thk,shk->hts", q, k) / 3**0.5
    weight = (1 + score + score.square() / 2).tril()
    linear_heads = (weight / weight.sum(-1, keepdim=True)) @ v.transpose(0, 1)
    q, k, v = (linear(x).unflatten(-1, (-1, v_dim)) for linear in (near.q, near.k, near.v))
    window_heads = torch.zeros(q.shape[1], len(x), v_dim, dtype=x.dtype)
    for h in range(q.shape[1]):
        for t in range(len(x)):
            first = max(0, t - layer.config.window + 1)
            weight = (k[first : t + 1, h] @ q[t, h] / v_dim**0.5).softmax(0)
            window_heads[h, t] = weight @ v[first : t + 1, h]
    return linear_heads, window_heads


@pytest.mark.parametrize(
    "options", [{"combine": "sum"}, {"combine": "split"}, {"combine": "split", "n_window_heads": 1}], ids=str
)
def test_layer_is_its_equation(options):
    layer, x = build(rope=False, chunk_size=5, **options), torch.randn(1, 11, 16, dtype=torch.float64)
    linear_heads, window_heads = heads_written_out(layer, x[0])
    heads = torch.cat([linear_heads, window_heads]).transpose(0, 1).flatten(1)
    expected = heads @ torch.cat([layer.linear.out.weight, layer.window.out.weight], dim=1).T
    assert_same(layer(x).y[0], expected)


@pytest.mark.parametrize(
    ("options", "n_heads"),
    [
        ({"combine": "sum"}, (4, 4)),
        ({"combine": "split"}, (2, 2)),
        ({"combine": "split", "n_window_heads": 1}, (3, 1)),
        ({"combine": "split", "n_heads": 1, "n_window_heads": None}, None),
    ],
    ids=str,
)
def test_heads_are_shared_out_as_asked(options, n_heads):
    if n_heads is None:
        with pytest.raises(UserError, match="needs heads of both kinds: of n_heads=1, 0 have the window"):
            build(**options)
        return
    layer = build(**options)
    assert (layer.linear.config.n_heads, layer.window.config.n_heads) == n_heads
    assert layer.linear.config.head_value_dim == layer.window.config.key_dim == 4


def test_reaches_beyond_the_window():
    layer, x = build(window=2), torch.randn(1, 9, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, 0] += 1
    assert (layer(changed).y - layer(x).y)[0, 8].abs().max() > 1e-6
    assert_same(layer.window(changed).y[0, 8], layer.window(x).y[0, 8])


def test_output_starts_with_the_variance_of_one_layer():
    torch.manual_seed(0)
    layer = registry.build("based", {"d_model": 256, "n_heads": 4})
    for part in (layer.linear, layer.window):
        assert part.out.weight.std().item() == pytest.approx((2 * 256) ** -0.5, rel=0.02)


def test_fused_window_equals_the_reference():
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    fused, reference = build(impl="auto"), build(impl="reference")
    assert (fused.window.impl, reference.window.impl) == ("sdpa", "reference")
    assert_same(fused(x).y, reference(x).y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 15, "n_heads": 2}, "d_model=15 isn't divisible by n_heads=2"),
        ({"n_window_heads": 1}, "n_window_heads=1 divides the heads, which combine='sum' doesn't"),
        ({"n_heads": 4, "combine": "split", "n_window_heads": 4}, "needs heads of both kinds"),
        ({"d_model": 6, "n_heads": 2}, "the head width must be even, got 3"),
        ({"window": 1}, "window: .* greater than 1, got 1"),
        ({"windw": 4}, "did you mean 'window'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        registry.build("based", options)
