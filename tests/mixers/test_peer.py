"""PEER against a version that runs all N experts on every token, and its own options."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mixers import registry
from mixers.errors import UserError
from tests.mixers.test_pkm import (
    D,
    assert_same_with_gradients,
    build,
    randn,
    scores_of_all_slots,
    weights_of_all_slots,
)


def all_experts(layer, x):
    """Every expert's output for every token, weighted: zero unless it is among a head's k best."""
    c = layer.config
    activation = {"gelu": functional.gelu, "relu": torch.relu, "silu": functional.silu}[c.activation]
    hidden = activation(x @ layer.experts_in.T)
    weights = weights_of_all_slots(scores_of_all_slots(layer, x), c.top_k, c.expert_weights)
    return sum((weights[:, :, h] * hidden) @ layer.experts_out for h in range(c.n_heads))


@pytest.mark.parametrize("expert_weights", ["softmax", "sigmoid"])
@pytest.mark.parametrize("query_norm", ["rms", "batch", "none"])
@pytest.mark.parametrize("shared_keys", [True, False])
@pytest.mark.parametrize(("activation", "score"), [("gelu", "dot"), ("relu", "dot"), ("silu", "idw")])
def test_layer_is_all_experts_weighted(expert_weights, query_norm, shared_keys, activation, score):
    layer = build(
        "peer",
        expert_weights=expert_weights,
        query_norm=query_norm,
        shared_keys=shared_keys,
        activation=activation,
        score=score,
    )
    x = randn(2, 9, D).requires_grad_()
    assert_same_with_gradients(layer, x, all_experts(layer, x))


def test_an_expert_that_two_heads_choose_counts_twice():
    """With one sub-key there is one expert: each of two heads gives it weight 1."""
    layer = build("peer", n_subkeys=1, top_k=1)
    x = randn(1, 3, D)
    once = functional.gelu(x @ layer.experts_in[0])[..., None] * layer.experts_out[0]
    torch.testing.assert_close(layer(x).y, 2 * once, rtol=0, atol=1e-12)


def test_shared_keys_are_one_set_and_heads_choose_by_their_own_queries():
    layer, own = build("peer"), build("peer", shared_keys=False)
    assert layer.keys.shape == (1, 2, 6, 3)
    assert own.keys.shape == (2, 2, 6, 3)
    slots, _ = layer._choose(randn(2, 9, D), None)
    assert (slots[:, 0].sort(-1).values != slots[:, 1].sort(-1).values).any()


def test_flops_grow_with_the_root_of_the_number_of_experts():
    flops = [build("peer", n_subkeys=n).flops_per_token(0) for n in (8, 16, 32)]
    sizes = [build("peer", n_subkeys=n).experts_in.numel() for n in (8, 16, 32)]
    assert sizes[2] == 16 * sizes[0]
    assert flops[2] - flops[1] == 2 * (flops[1] - flops[0]) > 0


def test_first_outputs_have_hidden_variance_one():
    layer = registry.build("peer", {"d_model": 256, "n_subkeys": 40, "key_dim": 16})
    hidden = torch.randn(64, 256) @ layer.experts_in.T
    assert hidden.std().item() == pytest.approx(1.0, rel=0.02)
    assert layer.experts_out.std().item() == pytest.approx(256**-0.5, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tanh"}, "activation"),
        ({"expert_weights": "top1"}, "expert_weights"),
        ({"value_dim": 4}, "value_dim"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        build("peer", **options)
