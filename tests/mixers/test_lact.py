"""LaCT against its definition: one sequence, head and token at a time, gradients by autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from mixers import registry
from mixers.base import state_tensors
from mixers.errors import UserError
from mixers.orthogonal import COEFFICIENTS, orthogonalised

D, T = 8, 11
OPTIONS = [
    {"chunk_size": 4, "base_lr": 0.5},
    {"chunk_size": 3, "base_lr": 0.5, "n_heads": 2, "n_window_heads": 4, "window": 5, "hidden_dim": 3},
    {"chunk_size": 4, "base_lr": 0.5, "window": 0, "memory_rope": False, "momentum": False, "hidden_dim": 6},
    {"chunk_size": 5, "base_lr": 0.5, "muon": False, "normalise": False, "silu": False, "rope": False},
    {"chunk_size": 4, "base_lr": 0.5, "muon": False, "read_scale": True, "n_heads": 2, "memory_rope": False},
]
PARTS = ("gate", "up", "down")


def build(**options):
    torch.manual_seed(0)
    mixer = registry.build("lact", {"d_model": D, **options}).double()
    biases = [part.bias for part in (mixer.lr, mixer.keep, mixer.read_scale) if part is not None]
    with torch.no_grad():  # away from their neutral start
        for parameter in (mixer.q_norm.weight, mixer.k_norm.weight, mixer.read_norm.weight, mixer.qk_shift, *biases):
            parameter.normal_(std=0.3)
        mixer.qk_scale.normal_(mean=1, std=0.3)
    return mixer


def tokens(n_sequences=2, n_tokens=T):
    return torch.randn(n_sequences, n_tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def network(weights, u):
    gate, up, down = weights
    return (functional.silu(u @ gate) * (u @ up)) @ down


def rotated(u, place, n_heads, base):
    """Pair (i, i + K/2) of each of ``n_heads`` heads of u (D,) as a complex number, turned by place * base^(-2i/K)."""
    u = u.view(n_heads, -1)
    half = u.shape[1] // 2
    angle = place * base ** (-2 * torch.arange(half, dtype=u.dtype) / u.shape[1])
    turned = torch.complex(u[:, :half], u[:, half:]) * torch.complex(angle.cos(), angle.sin())
    return torch.cat([turned.real, turned.imag], dim=1).flatten()


def newton_schulz_by_svd(matrix):
    """The same odd polynomials on the singular values themselves."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / (s.square().sum().sqrt() + 1e-7)
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


def window_read(c, q, k, v, mask, t):
    """Softmax over the window of token t, (D,), from rotated q, k (T,D)."""
    n_heads, heads = c.n_window_heads or c.n_heads, []
    window = c.chunk_size if c.window is None else c.window
    seen = [s for s in range(max(0, t - window + 1), t + 1) if mask[s] or s == t]
    for h in range(n_heads):
        part = slice(h * D // n_heads, (h + 1) * D // n_heads)
        scores = torch.stack([q[t, part] @ k[s, part] for s in seen]) / math.sqrt(D // n_heads)
        heads.append(sum(weight * v[s, part] for weight, s in zip(scores.softmax(0), seen, strict=True)))
    return torch.cat(heads)


def learned(mixer, h, weights, momentum, chunk):
    """Weights and momentum after ``chunk``: a list of (k, v, step sizes (3,), kept part or None)."""
    c = mixer.config
    start = [getattr(mixer, name)[h] for name in PARTS]
    if not chunk:
        return weights, momentum
    gradients = [torch.zeros_like(part) for part in weights]
    for key, value, steps, _ in chunk:
        new = torch.autograd.grad(network(weights, key) @ value, weights, create_graph=True)
        gradients = [total + step * part for total, step, part in zip(gradients, steps, new, strict=True)]
    if c.momentum:
        kept = sum(entry[3] for entry in chunk) / len(chunk)
        gradients = momentum = [part + kept * old for part, old in zip(gradients, momentum, strict=True)]
    steps = [newton_schulz_by_svd(part) for part in gradients] if c.muon else gradients
    weights = [part + step for part, step in zip(weights, steps, strict=True)]
    if c.normalise:
        weights = [part / part.norm(dim=0) * first.norm(dim=0) for part, first in zip(weights, start, strict=True)]
    return weights, momentum


def by_definition(mixer, x, mask):
    """y (B,T,D), and the final weights and momenta [sequence][head]."""
    c = mixer.config
    n_window_heads = c.n_window_heads or c.n_heads
    base_lr = c.base_lr
    x = x.masked_fill(~mask.unsqueeze(-1), 0)
    width = D // c.n_heads
    rows, final = [], []
    for b in range(x.shape[0]):
        q, k, v = mixer.q_norm(mixer.q(x[b])), mixer.k_norm(mixer.k(x[b])), mixer.v(x[b])

        def turned(part, wanted):
            if not wanted:
                return part
            return torch.stack([rotated(row, t, n_window_heads, c.rope_base) for t, row in enumerate(part)])

        near_q, near_k = turned(q, c.rope), turned(k, c.rope)
        act = functional.silu if c.silu else (lambda part: part)
        far = [
            act(part * mixer.qk_scale[i] + mixer.qk_shift[i]).view(-1, c.n_heads, width)
            for i, part in enumerate((q, k))
        ]
        far = [(part / (part.norm(dim=-1, keepdim=True) + 1e-5)).flatten(1) for part in far]
        far_q, far_k = (turned(part, c.memory_rope).view(-1, c.n_heads, width) for part in far)
        far_v = act(v).view(-1, c.n_heads, width)
        steps = functional.softplus(mixer.lr(x[b]) + math.log(math.exp(base_lr) - 1)).view(-1, c.n_heads, 3)
        kept = mixer.keep(x[b]).sigmoid() if c.momentum else None
        models = [[getattr(mixer, name)[h] for name in PARTS] for h in range(c.n_heads)]
        momenta = [[torch.zeros_like(part) for part in model] for model in models]
        outputs = []
        for t in range(x.shape[1]):
            reads = []
            for h in range(c.n_heads):
                read = mixer.read_norm(network(models[h], far_q[t, h]))
                if c.read_scale:
                    read = read * functional.silu(mixer.read_scale(x[b, t])[h])
                reads.append(read)
            y = torch.cat(reads)
            if c.window != 0:
                y = y + window_read(c, near_q, near_k, v, mask[b], t)
            outputs.append(mixer.out(y))
            if (t + 1) % c.chunk_size == 0:
                places = [s for s in range(t + 1 - c.chunk_size, t + 1) if mask[b, s]]
                for h in range(c.n_heads):
                    chunk = [
                        (far_k[s, h], far_v[s, h], steps[s, h], None if kept is None else kept[s, h]) for s in places
                    ]
                    models[h], momenta[h] = learned(mixer, h, models[h], momenta[h], chunk)
        rows.append(torch.stack(outputs))
        final.append((models, momenta))
    return torch.stack(rows).masked_fill(~mask.unsqueeze(-1), 0), final


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_outputs_state_and_gradients_are_those_of_the_definition(options, padded):
    mixer, x = build(**options), tokens().requires_grad_()
    mask = torch.ones(2, T, dtype=torch.bool)
    if padded:
        mask[0, 1] = False
        mask[1, : options["chunk_size"]] = False  # a whole chunk of padding
    out = mixer(x, mask=mask if padded else None, return_state=True)
    want, final = by_definition(mixer, x, mask)
    torch.testing.assert_close(out.y, want, rtol=0, atol=1e-8)
    found = [out.state.weights] + ([out.state.momentum] if mixer.config.momentum else [])
    for kind, parts in enumerate(found):
        for i, part in enumerate(parts):
            wanted = torch.stack([torch.stack([head[i] for head in row[kind]]) for row in final])
            torch.testing.assert_close(part, wanted, rtol=0, atol=1e-8)

    project = torch.randn(out.y.shape, dtype=x.dtype)
    sources = [x, *mixer.parameters()]
    found = torch.autograd.grad((out.y * project).sum(), sources)
    wanted = torch.autograd.grad((want * project).sum(), sources)
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_any_split_continues_the_same_sequence():
    mixer, x = build(chunk_size=4, n_heads=2), tokens()
    whole = mixer(x, return_state=True)
    state, parts = None, []
    for start, stop in [(0, 3), (3, 4), (4, 9), (9, T)]:
        out = mixer(x[:, start:stop], state, return_state=True)
        state = out.state
        parts.append(out.y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.y, rtol=0, atol=1e-10)
    for got, wanted in zip(state_tensors(state), state_tensors(whole.state), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_without_a_window_a_chunk_reads_earlier_chunks_only():
    mixer, x = build(chunk_size=4, window=0, base_lr=0.5), tokens(1, 8)
    other = x.clone()
    other[:, 0] += 1
    difference = (mixer(other).y - mixer(x).y).abs().amax(dim=(0, 2))
    assert difference[1:4].max() == 0
    assert difference[4:].min() > 1e-4


def test_learning_a_chunk_raises_the_product_of_read_and_value():
    for muon in (False, True):
        mixer = build(chunk_size=4, window=0, memory_rope=False, momentum=False, muon=muon, base_lr=0.5)
        chunk = tokens(1, 4)
        products = []
        for n_chunks in (0, 1, 8):
            state = mixer(chunk.repeat(1, n_chunks, 1), return_state=True).state
            queue = mixer(chunk[:, :3], return_state=True).state
            products.append(
                (network([part[0, 0] for part in state.weights], queue.k[0, :, 0]) * queue.v[0, :, 0]).sum()
            )
        assert products[0] < products[1] < products[2]


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_orthogonalised_matrices_have_nearly_equal_singular_values(shape):
    torch.manual_seed(0)
    matrix = torch.randn(2, 3, *shape, dtype=torch.float64) * 1e-4
    found = orthogonalised(matrix)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.97
    assert values.max() < 1.15
    torch.testing.assert_close(found[1, 2], newton_schulz_by_svd(matrix[1, 2]), rtol=0, atol=1e-2)
    assert (orthogonalised(torch.zeros(shape)) == 0).all()


def test_half_precision_keeps_the_weights_in_float32():
    mixer, x = build(chunk_size=4).float(), tokens().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = mixer(x, return_state=True).state
    assert all(part.dtype == torch.float32 for part in state_tensors(state._replace(window=None)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 3}, "d_model=8 isn't divisible by n_heads=3"),
        ({"n_window_heads": 3}, "isn't divisible by n_window_heads=3"),
        ({"window": 0, "n_window_heads": 2}, "belongs to the softmax"),
        ({"n_window_heads": 8}, "must be even, got 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        registry.build("lact", {"d_model": D, **options})
