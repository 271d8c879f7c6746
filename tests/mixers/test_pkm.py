"""Static product-key layers: the choice of slots and the memory, against scoring all N slots one by one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mixers import registry
from mixers.base import ParameterOptions
from mixers.errors import UserError
from mixers.product_keys import choose, dot_rows, select
from tests.mixers.test_fwpkm_state import Largest

D = 10
SMALL = {"d_model": D, "n_heads": 2, "top_k": 3, "n_subkeys": 6, "key_dim": 6}


def build(name="pkm", **options):
    torch.manual_seed(0)
    return registry.build(name, {**SMALL, **options}).double()


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def queries(layer, x):
    """q (B,T,H,K) by the definition of each normalisation, as in training."""
    c = layer.config
    q = x @ layer.q_proj.weight.T + layer.q_proj.bias
    if c.query_norm == "rms":
        q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.q_norm.weight
    elif c.query_norm == "batch":
        mean, var = q.mean((0, 1)), q.var((0, 1), unbiased=False)
        q = (q - mean) / (var + 1e-5).sqrt() * layer.q_norm.weight + layer.q_norm.bias
    return q.unflatten(-1, (c.n_heads, -1))


def scores_of_all_slots(layer, x):
    """(B,T,H,N): slot i * n + j has key (first half i, second half j)."""
    c = layer.config
    n, keys = c.n_subkeys, layer.keys.expand(c.n_heads, -1, -1, -1)
    halves = queries(layer, x).unflatten(-1, (2, -1))
    slots = []
    for i in range(n):
        for j in range(n):
            score = 0
            for half, index in ((0, i), (1, j)):
                q, key = halves[:, :, :, half], keys[:, half, index]
                if c.score == "dot":
                    score = score + (q * key).sum(-1)
                else:
                    score = score - torch.log(1e-3 + (q - key).square().sum(-1))
            slots.append(score)
    return torch.stack(slots, -1)


def weights_of_all_slots(scores, top_k, normalise):
    """``normalise`` of the k best scores of each head, zero at all other slots: (B,T,H,N)."""
    best = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(top_k).indices, True)
    if normalise == "sigmoid":
        return scores.sigmoid() * best
    return scores.masked_fill(~best, float("-inf")).softmax(-1)


def assert_same_with_gradients(layer, x, expected):
    """layer(x) is ``expected``, and so are the gradients of the inputs and of all parameters."""
    found, weights = layer(x).y, randn(*x.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    leaves = [x, *layer.parameters()]
    got, want = (torch.autograd.grad((y * weights).sum(), leaves) for y in (found, expected))
    for name, one, other in zip(("x", *dict(layer.named_parameters())), got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
        assert (other != 0).any(), name


@pytest.mark.parametrize("score", ["dot", "idw"])
@pytest.mark.parametrize("query_norm", ["rms", "batch", "none"])
@pytest.mark.parametrize("use_gate", [True, False])
def test_memory_is_its_equation_over_all_slots(score, query_norm, use_gate):
    layer = build(score=score, query_norm=query_norm, use_gate=use_gate, value_dim=5)
    x = randn(2, 9, D).requires_grad_()
    weights = weights_of_all_slots(scores_of_all_slots(layer, x), 3, "softmax")
    rows = weights.sum(2) @ layer.values
    if use_gate:
        gate = x @ layer.gate_proj.weight.T + layer.gate_proj.bias
        rows = rows * gate * gate.sigmoid()
    assert_same_with_gradients(layer, x, rows @ layer.out_proj.weight.T + layer.out_proj.bias)


def test_product_keys_find_the_best_slots():
    """Against scoring all n*n slots."""
    torch.manual_seed(1)
    q, keys = randn(2, 9, 3, 8), randn(2, 3, 2, 7, 4)
    for score in ("idw", "dot"):
        halves, rows = q.view(2, 9, 3, 2, 1, 4), keys.unsqueeze(1)
        if score == "idw":
            all_halves = -torch.log(1e-3 + (halves - rows).square().sum(-1))
        else:
            all_halves = (halves * rows).sum(-1)
        want = (all_halves[..., 0, :, None] + all_halves[..., 1, None, :]).flatten(-2).topk(5)
        got = select(q, keys, 5, score)
        torch.testing.assert_close(got.scores, want.values)
        assert torch.equal(got.slots, want.indices)


@pytest.mark.parametrize("score", ["dot", "idw"])
@pytest.mark.parametrize(("n", "top_k"), [(7, 5), (3, 3), (1, 1), (20, 2)])
def test_choose_is_select_with_its_gradients(score, n, top_k):
    torch.manual_seed(n)
    leaves = q, keys = randn(2, 9, 3, 8).requires_grad_(), randn(2, 3, 2, n, 4).requires_grad_()
    want, (slots, scores) = select(q, keys, top_k, score), choose(q, keys, top_k, score)
    assert torch.equal(slots, want.slots)
    torch.testing.assert_close(scores, want.scores, rtol=0, atol=1e-12)
    weights = randn(*scores.shape)
    got, wanted = (torch.autograd.grad((y * weights).sum(), leaves) for y in (scores, want.scores))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["pkm", "peer"])
def test_training_forms_neither_the_rows_nor_the_sub_keys_of_all_accesses(name):
    """Nothing as large as B T H k rows or sub-keys; the reference of peer shows that gathered rows would be seen."""
    torch.manual_seed(0)
    found = {}
    for impl in ("sparse", "reference"):
        layer = registry.build(name, {"d_model": 32, "n_heads": 2, "top_k": 8, "n_subkeys": 8, "impl": impl})
        x = torch.randn(2, 50, 32, requires_grad=True)
        with Largest(*layer.parameters()) as largest:
            layer(x).y.square().sum().backward()
        found[impl] = largest.n_elements
    accesses = 2 * 50 * 2 * 8
    assert found["sparse"] < accesses * 32 / 2
    if name == "peer":
        assert found["reference"] >= accesses * 32


def test_dot_rows_takes_each_memorys_own_rows():
    values, x = randn(2, 6, 4), randn(2, 5, 4)
    slots = torch.randint(0, 6, (2, 5, 3))
    found = dot_rows(values, slots, x)
    for m in range(2):
        for s in range(5):
            torch.testing.assert_close(found[m, s], values[m, slots[m, s]] @ x[m, s])


@pytest.mark.parametrize("name", ["pkm", "peer"])
def test_batch_norm_sees_the_batch_in_training_and_each_token_alone_in_evaluation(name):
    layer = build(name, query_norm="batch")
    x = randn(3, 8, D)
    others = x.clone()
    others[1:] = randn(2, 8, D)
    assert (layer(x).y[0] - layer(others).y[0]).abs().max() > 1e-3
    assert layer.q_norm.running_mean.abs().max() > 0
    layer.eval()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    together = layer(x).y
    alone = torch.cat([layer(x[b : b + 1, t : t + 1]).y for b in range(3) for t in range(8)]).view(3, 8, D)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("name", ["pkm", "peer"])
def test_batch_norms_statistics_ignore_padding_even_of_nan(name):
    x = randn(2, 7, D)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :5] = False
    padded, packed = build(name, query_norm="batch"), build(name, query_norm="batch")
    spoilt = torch.where(mask[..., None], x, float("nan"))
    y = padded(spoilt, mask=mask).y
    torch.testing.assert_close(y[mask], packed(x[mask][None]).y[0], rtol=0, atol=1e-12)
    assert (y[~mask] == 0).all()
    torch.testing.assert_close(padded.q_norm.running_var, packed.q_norm.running_var, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["pkm", "peer"])
def test_running_averages_reach_the_statistics_of_training(name):
    """After many calls on the same tokens, evaluation gives what training gives, up to n/(n-1) in the variance."""
    layer, x = build(name, query_norm="batch"), randn(8, 200, D)
    for _ in range(300):
        y = layer(x).y
    torch.testing.assert_close(layer.eval()(x).y, y, rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["pkm", "peer"])
def test_training_options_of_tables_and_keys(name):
    tables = {"pkm": ["values"], "peer": ["experts_in", "experts_out"]}[name]
    options = build(name, value_lr_scale=4.0).parameter_options()
    assert options == {
        "keys": ParameterOptions(weight_decay=False),
        **dict.fromkeys(tables, ParameterOptions(weight_decay=False, lr_scale=4.0)),
    }


@pytest.mark.parametrize("name", ["pkm", "peer"])
def test_keys_that_stay_as_drawn_are_a_saved_buffer_with_the_same_outputs(name):
    trained, drawn = build(name), build(name, train_keys=False)
    assert "keys" in dict(drawn.named_buffers())
    assert "keys" not in drawn.parameter_options()
    assert set(drawn.state_dict()) == set(trained.state_dict())
    x = randn(2, 5, D)
    assert torch.equal(drawn(x).y, trained(x).y)


def test_static_query_norms_agree_in_float32():
    x = torch.randn(2, 9, D)
    outputs = [build(query_norm=query_norm).float()(x).y for query_norm in ("rms", "rms_float32")]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["pkm", "peer"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 7}, "top_k must be at most n_subkeys=6, got 7"),
        ({"key_dim": 5}, "the key width must be even to be cut in halves, got 5"),
        ({"key_dim": None, "d_model": 9}, "must be even to be cut in halves, got 9"),
        ({"query_norm": "layer"}, "query_norm"),
        ({"value_lr_scale": 0.0}, "value_lr_scale"),
        ({"n_subkey": 4}, "did you mean 'n_subkeys'"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(UserError, match=message):
        build(name, **options)


def test_gate_of_silu():
    """The gate multiplies what was read, elementwise, before the output projection."""
    layer = build(value_dim=5)
    with torch.no_grad():
        layer.gate_proj.weight.zero_()
        layer.gate_proj.bias.fill_(2.0)
    plain = build(value_dim=5, use_gate=False)
    plain.load_state_dict({key: value for key, value in layer.state_dict().items() if "gate" not in key})
    x = randn(1, 4, D)
    scaled = (plain(x).y - plain.out_proj.bias) * functional.silu(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(layer(x).y - layer.out_proj.bias, scaled, rtol=0, atol=1e-12)
