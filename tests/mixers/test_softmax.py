"""Softmax attention: each path against a loop over queries, positions, windows, caches and padding."""

import importlib.util
import math

import pytest
import torch

from mixers import registry
from mixers.attention import attend_flash, attend_reference, attend_sdpa
from mixers.base import ParameterOptions, state_bytes
from mixers.contract.subject import run_in_parts
from mixers.errors import UserError
from mixers.rope import rope_frequencies, rope_tables, rotate
from mixers.sink_tokens import NOT_TAKEN

D = 16


def build(seed=0, **options):
    torch.manual_seed(seed)
    return registry.build("softmax", {"d_model": D, **options}).double()


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def oracle(q, k, v, window, valid, sink_tokens=0, sink_logits=None):
    """One query at a time, over the list of keys that it may see; zero where the query is padding.

    With sink tokens k and v must hold the whole sequence.
    """
    n_cached = k.shape[2] - q.shape[2]
    y = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            for i in range(q.shape[2]):
                own = n_cached + i
                first = 0 if window is None else max(0, own - window + 1)
                real = [s for s in range(own + 1) if valid is None or valid[b, s]]
                seen = [s for s in real if s >= first or s in real[:sink_tokens]]
                if valid is not None and not valid[b, own]:
                    continue
                logits = torch.stack([q[b, h, i] @ k[b, g, s] for s in seen]) / math.sqrt(q.shape[3])
                weights = logits.exp() / (logits.exp().sum() + (0 if sink_logits is None else sink_logits[h].exp()))
                y[b, h, i] = weights @ v[b, g, seen]
    return y


def layer_oracle(layer, x, mask=None):
    """The whole layer by the loop, on its own projections; at padding, zero."""
    c, start = layer.config, torch.zeros((), dtype=torch.int64)
    q, k, v = layer._project(x if mask is None else x.masked_fill(~mask[..., None], 0), start)
    heads = oracle(q, k, v, c.window, mask, c.sink_tokens, layer.sink_logits)
    return layer.out(heads.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("path", [attend_reference, attend_sdpa])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("n_key_heads", [1, 2, 4])
@pytest.mark.parametrize(("n_queries", "n_cached"), [(7, 0), (1, 6), (4, 3)])
@pytest.mark.parametrize("padded", [False, True])
def test_paths_equal_the_loop(path, window, n_key_heads, n_queries, n_cached, padded):
    torch.manual_seed(1)
    n_keys = n_queries + n_cached
    q, k, v = randn(2, 4, n_queries, 6), randn(2, n_key_heads, n_keys, 6), randn(2, n_key_heads, n_keys, 6)
    valid = None
    if padded:
        valid = torch.rand(2, n_keys) > 0.4
        valid[0] = torch.arange(n_keys) >= 2
        assert not valid.all()
    y = path(q, k, v, window, valid)
    assert torch.isfinite(y).all()
    expected = oracle(q, k, v, window, valid)
    if valid is not None:
        y = y * valid[:, None, n_cached:, None]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


def draw_sinks(layer):
    if layer.sink_logits is not None:
        with torch.no_grad():
            layer.sink_logits.copy_(2 * torch.randn(layer.config.n_heads))
    return layer


def with_gradients(layer, y, x, weights):
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])]


SINKS = [
    {"sink_logits": True},
    {"sink_logits": True, "window": 4},
    {"sink_tokens": 2, "window": 4},
    {"sink_tokens": 2, "window": 4, "sink_logits": True},
    {"sink_tokens": 5, "window": 1, "sink_logits": True},
    {"sink_tokens": 1, "window": 40},
]


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("options", SINKS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_sinks_equal_the_loop_with_gradients_in_one_call_and_in_many(impl, options, padded):
    """Left padding in the first row, holes in the second: sinks are each row's first real tokens."""
    layer = draw_sinks(build(impl=impl, n_heads=4, n_kv_heads=2, qk_norm=True, **options))
    x = randn(2, 13, D).requires_grad_()
    mask = None
    if padded:
        mask = torch.ones(2, 13, dtype=torch.bool)
        mask[0, :5] = False
        mask[1, [1, 2, 6]] = False
    weights = randn(2, 13, D)
    expected = with_gradients(layer, layer_oracle(layer, x, mask), x, weights)
    for lengths in ([13], [1] * 13, [3, 0, 4, 6]):
        y, state = run_in_parts(layer, x, lengths, mask)
        for got, want in zip(with_gradients(layer, y, x, weights), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
        if layer.config.sink_tokens:
            first = [
                torch.arange(13)[row][: layer.config.sink_tokens] for row in (mask if padded else [slice(None)] * 2)
            ]
            assert torch.equal(state.sinks.position, torch.stack(first))


@pytest.mark.parametrize("n_cached", [0, 90])
@pytest.mark.parametrize("sink_logits", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_of_a_window_with_sinks_equal_the_reference(n_cached, sink_logits, padded):
    """Four blocks, two of them in one call; without a cache the sinks lie in the first."""
    options = {"n_heads": 2, "window": 3, "sink_tokens": 2, "sink_logits": sink_logits}
    layers = [draw_sinks(build(impl=impl, **options)) for impl in ("sdpa", "reference")]
    layers[1].load_state_dict(layers[0].state_dict())
    x = randn(2, 230 + n_cached, D)
    mask = None
    if padded:
        mask = torch.rand(2, 230 + n_cached) > 0.3
        mask[1, : n_cached + 150] = False  # its sinks are in the third block
    results = []
    for layer in layers:
        leaf = x.clone().requires_grad_()
        y, _ = run_in_parts(layer, leaf, [n_cached, 230], mask)
        results.append(with_gradients(layer, y, leaf, torch.ones_like(x)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_a_sink_logit_of_zero_is_one_more_in_the_denominator_and_of_minus_infinity_none():
    layer, plain = build(n_heads=2, sink_logits=True), build(n_heads=2)
    x = randn(1, 1, D)
    assert (layer.sink_logits == 0).all()
    q, k, _ = layer._project(x, torch.zeros((), dtype=torch.int64))
    share = torch.sigmoid((q * k).sum(-1) / math.sqrt(8))  # e^l / (1 + e^l): of a single token
    heads = layer.v(x).unflatten(-1, (2, 8)) * share.transpose(1, 2)[..., None].view(1, 1, 2, 1)
    torch.testing.assert_close(layer(x).y, layer.out(heads.flatten(2)), rtol=0, atol=1e-12)
    with torch.no_grad():
        layer.sink_logits.fill_(-1e4)
    x = randn(2, 9, D)
    torch.testing.assert_close(layer(x).y, plain(x).y, rtol=0, atol=1e-12)


def test_sink_tokens_reach_where_the_window_ends():
    """Behind a window of 3, the second token is heard if it is a sink, the third is not."""
    for sink_tokens, heard in ((0, []), (1, [0]), (2, [0, 1])):
        layer, x = build(window=3, sink_tokens=sink_tokens), randn(1, 12, D)
        y = layer(x).y
        found = []
        for t in range(6):
            changed = x.clone()
            changed[:, t] += 1
            if (layer(changed).y[:, -1] - y[:, -1]).abs().max() > 1e-6:
                found.append(t)
        assert found == heard


def test_left_padding_changes_no_sink():
    layer, x = build(window=3, sink_tokens=2, n_heads=2), randn(1, 12, D)
    mask = torch.ones(1, 17, dtype=torch.bool)
    mask[:, :5] = False
    padded = torch.cat([torch.full((1, 5, D), float("nan"), dtype=torch.float64), x], 1)
    torch.testing.assert_close(layer(padded, mask=mask).y[:, 5:], layer(x).y, rtol=0, atol=1e-12)


def test_state_of_sinks_is_slots_from_the_start_and_a_full_window():
    layer = build(n_heads=4, n_kv_heads=2, window=5, sink_tokens=3)
    for n_tokens in (0, 1, 4, 5, 60):
        state = layer(randn(2, n_tokens, D), return_state=True).state
        n_cached = min(n_tokens, 4)
        # keys and values of 2 heads of width 4 in 8 bytes; a position per slot; one of the layer
        assert state_bytes(state) == 2 * (n_cached + 3) * 2 * 2 * 4 * 8 + 2 * 3 * 8 + 8
        assert (state.sinks.position < NOT_TAKEN).sum(1).tolist() == [min(n_tokens, 3)] * 2


def test_sinks_keep_their_true_positions():
    """The product with a sink turns with its whole distance: no position is counted within the cache."""
    layer = build(window=2, sink_tokens=1)
    x = randn(1, 1, D).expand(1, 40, D)
    y = layer(x).y
    assert (y[:, 20] - y[:, 30]).abs().max() < 1e-12  # all values alike: weights sum to one at any distance
    layer.sink_logits = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    y = layer(x).y
    assert (y[:, 20] - y[:, 30]).abs().max() > 1e-6


def test_sink_logits_have_no_weight_decay():
    assert build(sink_logits=True).parameter_options() == {"sink_logits": ParameterOptions(weight_decay=False)}
    assert build().parameter_options() == {}


@pytest.mark.parametrize("n_cached", [0, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_of_a_window_equal_the_reference_with_gradients(n_cached, padded):
    """A first block of 64 queries, two in one call, and 18 more."""
    torch.manual_seed(2)
    n_keys = 210 + n_cached
    inputs = [x.requires_grad_() for x in (randn(2, 2, 210, 4), randn(2, 1, n_keys, 4), randn(2, 1, n_keys, 4))]
    valid = torch.rand(2, n_keys) > 0.3 if padded else None
    found, expected = (path(*inputs, 3, valid) for path in (attend_sdpa, attend_reference))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = randn(*found.shape)
    for got, want in zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (found, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_reference_and_sdpa_layers_agree_with_every_option():
    options = {
        "n_heads": 4,
        "n_kv_heads": 2,
        "window": 5,
        "qk_norm": True,
        "yarn_factor": 4.0,
        "yarn_original_length": 8,
    }
    reference, sdpa = build(impl="reference", **options), build(impl="sdpa", **options)
    x = randn(2, 11, D)
    torch.testing.assert_close(reference(x).y, sdpa(x).y, rtol=0, atol=1e-12)
    assert (reference.impl, sdpa.impl, build().impl) == ("reference", "sdpa", "sdpa")


def test_layer_is_its_equation():
    """Projections, grouped heads, qk norm and rotations, each written out for one sequence."""
    layer = build(n_heads=4, n_kv_heads=2, qk_norm=True)
    with torch.no_grad():
        layer.q_norm.weight.normal_()
        layer.k_norm.weight.normal_()
    x = randn(1, 6, D)

    def head(linear, index, norm=None):
        y = x[0] @ linear.weight[4 * index : 4 * index + 4].T
        if norm is None:
            return y
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + norm.weight)
        turned = torch.empty_like(y)
        for t in range(6):
            for i in range(2):
                angle = t * 10_000.0 ** (-2 * i / 4)
                turned[t, i] = y[t, i] * math.cos(angle) - y[t, i + 2] * math.sin(angle)
                turned[t, i + 2] = y[t, i + 2] * math.cos(angle) + y[t, i] * math.sin(angle)
        return turned

    q = torch.stack([head(layer.q, h, layer.q_norm) for h in range(4)])[None]
    k = torch.stack([head(layer.k, g, layer.k_norm) for g in range(2)])[None]
    v = torch.stack([head(layer.v, g) for g in range(2)])[None]
    heads = oracle(q, k, v, None, None)[0]
    expected = torch.cat(list(heads), dim=-1) @ layer.out.weight.T
    torch.testing.assert_close(layer(x).y[0], expected, rtol=0, atol=1e-12)


def test_rotated_products_depend_on_distance_only():
    q, k = randn(1, 1, 1, 8), randn(1, 1, 1, 8)

    def product(i, j):
        turned = [rotate(x, rope_tables(torch.tensor([t]), 8, base=100.0)) for x, t in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(5, 2), product(10_000_005, 10_000_002), rtol=0, atol=1e-7)
    assert (product(5, 2) - product(5, 3)).abs() > 1e-6


def test_rope_angles_are_exact_far_out():
    cos, _ = rope_tables(torch.tensor([1_000_003]), 4, base=10_000.0)
    assert cos[0, 0].item() == pytest.approx(math.cos(1_000_003), abs=1e-12)


def test_yarn_by_parts():
    """L = 1000: pairs of more than 32 turns stay, of less than one turn are divided, one in between is mixed."""
    plain = rope_frequencies(64, 10_000.0, None, None, torch.device("cpu"))
    yarn = rope_frequencies(64, 10_000.0, 8.0, 1000, torch.device("cpu"))
    turns = 1000 * plain / (2 * math.pi)
    assert torch.equal(yarn[turns > 32], plain[turns > 32])
    torch.testing.assert_close(yarn[turns < 1], plain[turns < 1] / 8)
    between = int(((turns > 1) & (turns < 32)).nonzero()[0])
    ramp = (turns[between].item() - 1) / 31
    assert yarn[between].item() == pytest.approx(plain[between].item() * (ramp + (1 - ramp) / 8), rel=1e-12)
    assert (turns > 32).any()
    assert (turns < 1).any()


def test_yarn_temperature_scales_the_tables():
    cos, sin = rope_tables(torch.tensor([3]), 4, base=100.0, yarn_factor=16.0, yarn_original_length=64)
    factor = 0.1 * math.log(16.0) + 1
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, factor**2))


def test_yarn_factor_one_is_plain_rope():
    x = randn(1, 9, D)
    torch.testing.assert_close(build(yarn_factor=1.0, yarn_original_length=4)(x).y, build()(x).y, rtol=0, atol=1e-12)


def test_without_rope_order_of_the_past_is_lost():
    layer, x = build(rope=False), randn(1, 5, D)
    shuffled = x[:, [2, 0, 3, 1, 4]]
    torch.testing.assert_close(layer(x).y[:, -1], layer(shuffled).y[:, -1], rtol=0, atol=1e-12)
    with_rope = build()
    assert (with_rope(x).y[:, -1] - with_rope(shuffled).y[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("window", [1, 4])
def test_window_keeps_what_the_next_query_needs_and_owns_no_more(window):
    layer = build(n_heads=2, window=window)
    state = layer(randn(1, 50, D), return_state=True).state
    assert state.keys.shape == (1, 2, window - 1, 8)
    assert state.position.item() == 50
    for part in (state.keys, state.values):
        assert part.untyped_storage().nbytes() == part.numel() * 8


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("window", [None, 2])
def test_padded_rows_are_zero_and_finite_with_gradients(impl, window):
    """The first row is padding altogether, the second on the left; what it holds is NaN."""
    layer = build(impl=impl, window=window)
    x = torch.full((2, 6, D), float("nan"), dtype=torch.float64)
    x[1, 3:] = randn(3, D)
    x.requires_grad_()
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 3:] = True
    y = layer(x, mask=mask).y
    assert (y[~mask] == 0).all()
    torch.testing.assert_close(y[1, 3:], layer(x[1:, 3:]).y[0], rtol=0, atol=1e-12)
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_a_mask_may_come_and_go_between_calls():
    layer, x = build(window=6), randn(2, 9, D)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 3:5] = False
    whole = layer(x, mask=mask).y
    state, parts = None, []
    for first, last in ((0, 3), (3, 5), (5, 9)):
        part_mask = mask[:, first:last] if first == 3 else None
        y, state, _ = layer(x[:, first:last], state, return_state=True, mask=part_mask)
        assert (state.valid is None) == (first == 0)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"window": 4, "sink_tokens": 2, "sink_logits": True}], ids=str)
def test_bfloat16_is_near_float32(impl, options):
    layer = draw_sinks(build(impl=impl, n_heads=2, **options))
    x = torch.randn(2, 20, D)
    exact = layer(x.double()).y
    found = layer.bfloat16()(x.bfloat16()).y
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() < 0.02 * exact.norm()


def test_weights_start_at_variance_one_over_fan_in():
    layer = registry.build("softmax", {"d_model": 256})
    for linear in (layer.q, layer.k, layer.v, layer.out):
        assert linear.bias is None
        assert linear.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 16, "n_heads": 3}, "d_model=16 isn't divisible by n_heads=3"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads=3 must divide n_heads=4"),
        ({"head_dim": 5}, "must be even, got 5"),
        ({"yarn_factor": 2.0}, "yarn_factor and yarn_original_length go together"),
        ({"yarn_factor": 2.0, "yarn_original_length": 8, "rope": False}, "needs rope=true"),
        ({"window": 0}, "window"),
        ({"sink_tokens": 2}, "sink_tokens=2 keeps tokens that a window would drop: set window"),
        ({"sink_tokens": -1, "window": 4}, "sink_tokens"),
        ({"impl": "flash_attn", "sink_logits": True}, "neither sink_tokens nor sink_logits; use impl='sdpa'"),
        ({"impl": "flash_attn", "sink_tokens": 1, "window": 4}, "neither sink_tokens nor sink_logits"),
        ({"n_head": 2}, "did you mean 'n_heads'"),
        ({"impl": "flash"}, "impl"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        registry.build("softmax", options)


def test_bad_masks_are_named():
    layer, x = build(), randn(2, 5, D)
    for mask in (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 5)):
        with pytest.raises(UserError, match="mask: must be bool of shape"):
            layer(x, mask=mask)


def test_flash_attn_runs_on_cuda_only():
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(UserError, match="runs on cuda only and the layer is on cpu"):
        attend_flash(q, q, q, None, None, "mixer 'softmax'")


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="says what happens without the package")
def test_flash_attn_without_the_package_is_an_error_with_the_way_out():
    with pytest.raises(UserError, match=r"needs the package flash_attn.*pip install 'mixlab\[gpu\]'"):
        registry.build("softmax", {"impl": "flash_attn"})


@pytest.mark.cuda
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs the package flash-attn")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("n_cached", [0, 7])
def test_flash_attn_equals_the_reference(window, n_cached):
    q = torch.randn(2, 4, 20, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, 2, 20 + n_cached, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    want = attend_reference(q.float(), k.float(), v.float(), window, None)
    got = attend_flash(q, k, v, window, None, "mixer 'softmax'").float()
    assert (got - want).norm() <= 2e-2 * want.norm()
