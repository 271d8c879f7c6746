"""TTT-Linear and TTT-MLP against their definition: one sequence, head and token at a time, gradients by autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mixers import registry
from mixers.base import state_tensors
from mixers.errors import UserError
from mixers.ttt import layer_norm_gradient

D, T = 8, 11
OPTIONS = [
    {"chunk_size": 4},
    {"chunk_size": 1, "n_heads": 2, "rope": False},
    {"chunk_size": 3, "n_heads": 2, "base_lr": 3.0, "init_std": 0.5, "use_output_gate": True},
    {"inner": "mlp", "chunk_size": 4, "n_heads": 2, "base_lr": 2.0, "init_std": 0.4},
    {"inner": "mlp", "chunk_size": 5, "hidden_dim": 5, "rope": False},
]


def build(**options):
    torch.manual_seed(0)
    mixer = registry.build("ttt", {"d_model": D, **options}).double()
    with torch.no_grad():  # away from their neutral start
        for parameter in (*mixer.biases, mixer.inner_shift, mixer.out_norm.weight, mixer.lr.bias):
            parameter.normal_(std=0.3)
        mixer.inner_scale.normal_(mean=1, std=0.3)
        mixer.place_scale.mul_(1 + 0.2 * torch.rand_like(mixer.place_scale))
    return mixer


def tokens(n_sequences=2, n_tokens=T):
    return torch.randn(n_sequences, n_tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def inner_model(mixer, h, u, model):
    """f(u) = u + LN(g(u)), g of the weights and biases in ``model``: (S, b) or (S1, b1, S2, b2)."""
    z = u @ model[0] + model[1]
    if len(model) == 4:
        z = functional.gelu(z, approximate="tanh") @ model[2] + model[3]
    scale, shift = mixer.inner_scale[h, 0], mixer.inner_shift[h, 0]
    return u + functional.layer_norm(z, z.shape[-1:], scale, shift, mixer.config.inner_norm_eps)


def rotated(u, place, base):
    """Pair (i, i + K/2) as a complex number, turned by place * base^(-2i/K)."""
    half = u.shape[-1] // 2
    angle = place * base ** (-2 * torch.arange(half, dtype=u.dtype) / u.shape[-1])
    turned = torch.complex(u[:half], u[half:]) * torch.complex(angle.cos(), angle.sin())
    return torch.cat([turned.real, turned.imag])


def by_definition(mixer, x, mask):
    """y (B,T,D), and the weights and biases [sequence][head] at the start of the last mini-batch."""
    c = mixer.config
    x = x.masked_fill(~mask.unsqueeze(-1), 0)
    q, k, v = (linear(x).unflatten(-1, (c.n_heads, -1)) for linear in (mixer.q, mixer.k, mixer.v))
    step = c.base_lr / c.head_dim * mixer.lr(x).sigmoid()
    rows, final = [], []
    for b in range(x.shape[0]):
        heads = []
        for h in range(c.n_heads):
            start = []
            for weight, bias in zip(mixer.weights, mixer.biases, strict=True):
                start += [weight[h], bias[h, 0]]
            outputs = []
            for t in range(x.shape[1]):
                place = t % c.chunk_size
                query, key = q[b, t, h], k[b, t, h]
                if c.rope:
                    query, key = rotated(query, place, c.rope_base), rotated(key, place, c.rope_base)
                if place == 0:
                    sums = [torch.zeros_like(part) for part in start]
                if mask[b, t]:
                    error = inner_model(mixer, h, key, start) - v[b, t, h]
                    gradients = torch.autograd.grad(error.square().sum() / 2, start, create_graph=True)
                    sums = [total + step[b, t, h] * new for total, new in zip(sums, gradients, strict=True)]
                scale = mixer.place_scale[place]
                model = [part - scale * total for part, total in zip(start, sums, strict=True)]
                outputs.append(inner_model(mixer, h, query, model))
                if place == c.chunk_size - 1:
                    start = model
            heads.append(torch.stack(outputs))
            final.append(start)
        rows.append(torch.stack(heads, dim=1))
    heads = mixer.out_norm(torch.stack(rows).flatten(2))
    if c.use_output_gate:
        heads = heads * functional.gelu(mixer.gate(x), approximate="tanh")
    return mixer.out(heads).masked_fill(~mask.unsqueeze(-1), 0), final


def model_parts(state):
    """[S, b] or [S1, b1, S2, b2] of a state, each with leading (B,H)."""
    return [part for layer in state.layers for part in (layer.weight, layer.bias)]


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
    for part, found in enumerate(model_parts(out.state)):
        wanted = torch.stack([model[part] for model in final]).view_as(found)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)

    project = torch.randn(out.y.shape, dtype=x.dtype)
    sources = [x, *mixer.parameters()]
    found = torch.autograd.grad((out.y * project).sum(), sources)
    wanted = torch.autograd.grad((want * project).sum(), sources)
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_the_gradient_in_closed_form_is_that_of_autograd():
    torch.manual_seed(0)
    z = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    target, scale, shift = torch.randn(3, 5, 6).double(), torch.randn(6).double(), torch.randn(6).double()
    loss = (functional.layer_norm(z, (6,), scale, shift, 0.1) - target).square().sum() / 2
    (want,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(layer_norm_gradient(z, target, scale, shift, 0.1), want, rtol=0, atol=1e-12)


def test_a_token_trains_the_model_before_it_is_read():
    """Within a mini-batch too, unlike a layer that reads a chunk before its write."""
    mixer, x = build(chunk_size=8), tokens(1, 3)
    other = x.clone()
    other[:, 0] += 1
    difference = (mixer(other).y - mixer(x).y).abs().amax(dim=(0, 2))
    assert difference.min() > 1e-4


@pytest.mark.parametrize("inner", ["linear", "mlp"])
def test_training_on_a_chunk_lowers_its_loss(inner):
    mixer, chunk = build(inner=inner, chunk_size=4, base_lr=1.0, init_std=0.35, rope=False), tokens(1, 4)
    k, v = mixer.k(chunk)[0], mixer.v(chunk)[0]
    losses = []
    for n_steps in (0, 1, 10, 100):
        state = mixer(chunk.repeat(1, n_steps, 1), return_state=True).state
        model = inner_model(mixer, 0, k, [part[0, 0] for part in model_parts(state)])
        losses.append((model - v).square().mean().item())
    assert losses[0] > losses[1] > losses[2] > losses[3]


def test_larger_initial_weights_learn_slower_by_their_square():
    """What the docstring says of init_std: LN sees the direction of the weights only, and its slope is 1 / size."""
    changes = []
    for init_std in (1.0, 10.0):
        mixer, chunk = build(chunk_size=4, init_std=init_std, base_lr=1e-3, rope=False), tokens(1, 4)
        with torch.no_grad():
            mixer.biases[0].zero_()
        weight = mixer(chunk, return_state=True).state.layers[0].weight[0]
        changes.append((weight - mixer.weights[0]).norm() / mixer.weights[0].norm())
    torch.testing.assert_close(changes[0] / changes[1], torch.tensor(100.0).double(), rtol=0.01, atol=0)


def test_a_negative_place_scale_counts_as_zero():
    mixer, x = build(chunk_size=4), tokens()
    with torch.no_grad():
        mixer.place_scale.fill_(-1.0)
    state = mixer(x, return_state=True).state
    assert torch.equal(state.layers[0].weight, mixer.weights[0].expand(2, -1, -1, -1))


def test_positions_start_anew_with_each_mini_batch():
    """Without steps every read is q rotated by its place: a period of C tokens of equal inputs repeats."""
    mixer = build(chunk_size=3)
    with torch.no_grad():
        mixer.place_scale.zero_()
        y = mixer(tokens(1, 1).expand(1, 7, D)).y
    torch.testing.assert_close(y[:, 3:6], y[:, :3], rtol=0, atol=1e-12)
    assert (y[:, 1] - y[:, 0]).abs().max() > 1e-3


def test_a_state_keeps_no_other_tensor_alive():
    with torch.no_grad():
        state = build(chunk_size=4)(tokens(2, 8), return_state=True).state
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in state_tensors(state))


def test_half_precision_keeps_the_model_in_float32():
    mixer, x = build(chunk_size=4).float(), tokens().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixer(x, return_state=True)
    assert all(part.dtype == torch.float32 for part in state_tensors(out.state))
    exact = mixer(x).y
    assert (out.y.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 3}, "d_model=8 isn't divisible by n_heads=3"),
        ({"n_heads": 8}, "head width .* at least 2, got 1"),
        ({"hidden_dim": 4}, "hidden_dim=4 is the width inside inner='mlp'"),
        ({"d_model": 6, "n_heads": 2}, "the head width must be even, got 3"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        registry.build("ttt", {"d_model": D, **options})
