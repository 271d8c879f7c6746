"""The fast-weight MLP against its definition: one sequence, one head, one token at a time, gradients by autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mixers import registry
from mixers.base import state_tensors
from mixers.chunking import chunk_spans
from mixers.errors import UserError

D, T = 8, 11
OPTIONS = [
    {"chunk_size": 4, "lr": 2.0},
    {"chunk_size": 4, "lr": 2.0, "lookahead": 0, "n_heads": 2, "hidden_dim": 5},
    {"chunk_size": 3, "lr": 2.0, "lookahead": 2, "momentum": 0.7, "key_dim": 4, "value_dim": 3},
    {"chunk_size": 5, "lr": 2.0, "lookahead": 0, "momentum": 0.9, "normalise": True, "n_heads": 2},
]


def build(**options):
    torch.manual_seed(0)
    mixer = registry.build("fast_mlp", {"d_model": D, **options}).double()
    with torch.no_grad():
        for norm in (mixer.q_norm, mixer.k_norm, mixer.out_norm):  # away from their neutral start
            norm.weight.normal_(std=0.3)
    return mixer


def tokens(n_sequences=2, n_tokens=T):
    return torch.randn(n_sequences, n_tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def network(weights, u):
    gate, up, down = weights
    return (functional.silu(u @ gate) * (u @ up)) @ down


def by_definition(mixer, x, mask):
    """y (B,T,D) and the final weights [sequence][head]; the inner gradients are autograd's."""
    c = mixer.config
    x = x.masked_fill(~mask.unsqueeze(-1), 0)
    q, k = (linear(x).unflatten(-1, (c.n_heads, -1)) for linear in (mixer.q, mixer.k))
    q, k, v = mixer.q_norm(q), mixer.k_norm(k), mixer.v(x).unflatten(-1, (c.n_heads, -1))
    final = []
    reads = [[[None] * c.n_heads for _ in range(x.shape[1])] for _ in range(x.shape[0])]
    for b in range(x.shape[0]):
        for h in range(c.n_heads):
            start = [mixer.gate[h], mixer.up[h], mixer.down[h]]
            weights, momentum = start, [0, 0, 0]
            for t in range(x.shape[1]):
                reads[b][t][h] = network(weights, q[b, t, h])
                if (t + 1) % c.chunk_size:
                    continue
                first = t + 1 - c.chunk_size
                pairs = [(s, s + c.lookahead) for s in range(first, t + 1 - c.lookahead)]
                pairs = [(s, p) for s, p in pairs if mask[b, s] and mask[b, p]]
                errors = [functional.mse_loss(network(weights, k[b, s, h]), v[b, p, h]) for s, p in pairs]
                loss = sum(errors) / (2 * len(errors))
                gradients = torch.autograd.grad(loss, weights, create_graph=True)
                momentum = [c.momentum * m + g for m, g in zip(momentum, gradients, strict=True)]
                weights = [w - c.lr * m for w, m in zip(weights, momentum, strict=True)]
                if c.normalise:
                    weights = [
                        torch.stack(
                            [w[:, i] / w[:, i].square().sum().sqrt() * s[:, i].square().sum().sqrt()
                             for i in range(w.shape[1])], 1
                        )
                        for w, s in zip(weights, start, strict=True)
                    ]  # fmt: skip
            final.append(weights)
    rows = torch.stack([torch.stack([torch.stack(heads) for heads in sequence]) for sequence in reads])
    y = mixer.out(mixer.out_norm(rows).flatten(2))
    return y.masked_fill(~mask.unsqueeze(-1), 0), final


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_outputs_state_and_gradients_are_those_of_the_definition(options, padded):
    mixer, x = build(**options), tokens().requires_grad_()
    mask = torch.ones(2, T, dtype=torch.bool)
    if padded:
        mask[0, 1] = mask[1, 7] = False
    out = mixer(x, mask=mask if padded else None, return_state=True)
    want, final = by_definition(mixer, x, mask)
    torch.testing.assert_close(out.y, want, rtol=0, atol=1e-10)
    for part, found in enumerate(out.state.weights):
        wanted = torch.stack([weights[part] for weights in final]).view_as(found)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)

    project = torch.randn(out.y.shape, dtype=x.dtype)
    sources = [x, *mixer.parameters()]
    found = torch.autograd.grad((out.y * project).sum(), sources)
    wanted = torch.autograd.grad((want * project).sum(), sources)
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_the_first_chunk_reads_the_initial_network_and_the_second_does_not():
    mixer, x = build(chunk_size=4, lr=2.0), tokens()
    q = mixer.q_norm(mixer.q(x).unflatten(-1, (1, -1)))
    fresh = network((mixer.gate[0], mixer.up[0], mixer.down[0]), q)
    y = mixer.out(mixer.out_norm(fresh).flatten(2))
    difference = (mixer(x).y - y).abs().amax(dim=(0, 2))
    assert difference[:4].max() < 1e-12
    assert difference[4:].min() > 1e-3


def test_writing_lowers_the_loss_of_what_was_written():
    torch.manual_seed(0)
    mixer = build(chunk_size=4, lookahead=0, lr=1.0)
    chunk = tokens(1, 4)
    k = mixer.k_norm(mixer.k(chunk).unflatten(-1, (1, -1)))[0, :, 0]
    v = mixer.v(chunk)[0]
    losses = []
    for n_writes in (0, 1, 10, 100):
        state = mixer(chunk.repeat(1, n_writes, 1), return_state=True).state
        weights = [part[0, 0] for part in state.weights]
        losses.append((network(weights, k) - v).square().mean().item())
    assert losses[0] > losses[1] > losses[2] > losses[3]
    assert losses[3] < 0.05 * losses[0]


def test_normalised_columns_keep_their_length():
    mixer = build(chunk_size=4, normalise=True, lr=5.0)
    state = mixer(tokens(), return_state=True).state
    for found, start in zip(state.weights, (mixer.gate, mixer.up, mixer.down), strict=True):
        assert (found - start).abs().max() > 1e-2
        torch.testing.assert_close(found.norm(dim=-2), start.norm(dim=-2).expand(2, -1, -1))


def test_a_state_shares_no_storage_with_the_tokens_and_stays_small():
    mixer = build(chunk_size=4)
    state = mixer(tokens(), return_state=True).state
    assert state.k.shape[1] == 3
    assert all(part.shape[0] == 2 for part in state_tensors(state))
    with torch.no_grad():
        after = mixer(tokens(2, 8), return_state=True).state
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in state_tensors(after))


def test_half_precision_keeps_the_weights_in_float32():
    mixer, x = build(chunk_size=4).float(), tokens().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixer(x, return_state=True)
    assert all(part.dtype == torch.float32 for part in state_tensors(out.state))
    exact = mixer(x).y
    assert (out.y.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lookahead": 4, "chunk_size": 4}, "lookahead must be below chunk_size=4"),
        ({"n_heads": 3}, "d_model=8 isn't divisible by n_heads=3"),
        ({"momentum": 1.0}, "momentum"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        registry.build("fast_mlp", {"d_model": D, **options})


@pytest.mark.parametrize(
    ("waiting", "new", "spans"),
    [
        (0, 0, []),
        (2, 7, [(0, 2), (2, 6), (6, 7)]),
        (0, 8, [(0, 4), (4, 8)]),
        (3, 1, [(0, 1)]),
        (1, 2, [(0, 2)]),
    ],
)
def test_spans_end_where_chunks_end(waiting, new, spans):
    assert chunk_spans(waiting, new, 4) == spans
