"""Fast-weight product-key memory: the definitions, written as plainly as possible, against the implementation."""

from __future__ import annotations

import itertools

import pytest
import torch

from mixers.base import state_tensors
from mixers.errors import UserError
from mixers.fwpkm import FastWeightPKM, fast_weight_pkm

SIZES = {"B": 3, "T": 23, "H": 2, "K": 6, "V": 5, "n": 6, "k": 3, "C": 7}


def draw(seed: int = 0, **sizes: int) -> dict[str, torch.Tensor]:
    s = SIZES | sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return {
        "q": normal(s["B"], s["T"], s["H"], s["K"]),
        "v": normal(s["B"], s["T"], s["V"]),
        "gate": torch.rand(s["B"], s["T"], generator=generator, dtype=torch.float64).requires_grad_(),
        "keys": normal(s["H"], 2, s["n"], s["K"] // 2),
        "values": normal(s["n"] ** 2, s["V"]),
    }


def token_by_token(q, v, gate, keys, values, *, chunk_size, top_k, mask=None, **options):
    """The definitions for one shared memory, with loops over tokens and torch.autograd.grad for the key losses."""
    o = {
        "lookahead": 1, "lr": 1.0, "weight_decay": 0.0, "score": "idw", "temperature": 1.0, "address_weight": 1.0,
        "value_loss_to_keys": False, "clip": False, "update_scale": "paper",
    } | options  # fmt: skip
    n_sequences, n_tokens, n_heads, key_dim = q.shape
    n = keys.shape[2]
    half = key_dim // 2
    reads: list[list[torch.Tensor]] = [[] for _ in range(n_sequences)]
    for start in range(0, n_tokens, chunk_size):
        stop = min(start + chunk_size, n_tokens)
        # The gradients of the writes are taken at a copy of the tables that is a leaf of its own graph.
        here_keys = keys + 0.0
        mean_p = [torch.zeros(n, dtype=q.dtype) for _ in range(2)]
        accesses: dict[tuple[int, int], tuple[torch.Tensor, list[int], torch.Tensor]] = {}
        counts = torch.zeros(n * n, dtype=q.dtype)
        for b, t in itertools.product(range(n_sequences), range(start, stop)):
            pair_scores, slots = [], []
            for h in range(n_heads):
                best = []
                for a in range(2):
                    query = q[b, t, h, a * half : (a + 1) * half]
                    if o["score"] == "idw":
                        scores = -torch.log(1e-3 + (query - here_keys[h, a]).square().sum(-1))
                    else:
                        scores = here_keys[h, a] @ query
                    top = scores.topk(top_k)
                    best.append((top.values, top.indices.tolist()))
                    p = torch.softmax(top.values, dim=0)
                    for weight, index in zip(p, top.indices.tolist(), strict=True):
                        one = torch.zeros(n, dtype=q.dtype)
                        one[index] = 1.0
                        mean_p[a] = mean_p[a] + weight * one / (n_sequences * (stop - start) * n_heads)
                candidates = [
                    (s1 + s2, i1 * n + i2)
                    for s1, i1 in zip(*best[0], strict=True)
                    for s2, i2 in zip(*best[1], strict=True)
                ]
                candidates.sort(key=lambda item: -item[0].item())
                pair_scores += [score for score, _ in candidates[:top_k]]
                slots += [slot for _, slot in candidates[:top_k]]
            weights = torch.softmax(torch.stack(pair_scores) / o["temperature"], dim=0)
            read = sum(weight * values[slot] for weight, slot in zip(weights, slots, strict=True))
            accesses[b, t] = (weights, slots, read)
            for slot in slots:
                counts[slot] += 1
            reads[b].append(read)
        last = stop - o["lookahead"]
        pairs = list(itertools.product(range(n_sequences), range(start, last)))
        summed = torch.zeros_like(values)
        value_loss = torch.zeros((), dtype=q.dtype)
        n_effective = 0.0
        for b, t in pairs:
            weights, slots, read = accesses[b, t]
            g = (gate[b, t] if gate is not None else 1.0) * (1.0 if mask is None else float(mask[b, t]))
            n_effective += 1.0 if mask is None else float(mask[b, t])
            error = g * (read - v[b, t + o["lookahead"]])
            value_loss = value_loss + g * (read - v[b, t + o["lookahead"]]).square().mean() * 0.5 / len(pairs)
            for weight, slot in zip(weights, slots, strict=True):
                one = torch.zeros(n * n, 1, dtype=q.dtype)
                one[slot] = 1.0
                summed = summed + one * (weight * error)
        scale = 1.0
        if o["update_scale"] == "released" and pairs:
            n_all = n_sequences * (stop - start) if mask is None else n_effective
            scale = n_heads * top_k * n_all / len(pairs)
        value_step = scale * summed / counts.clamp(min=1).unsqueeze(-1)
        objective = o["address_weight"] * sum((p * torch.log(p + 1e-8)).sum() for p in mean_p)
        if o["value_loss_to_keys"] and pairs:
            objective = objective + value_loss
        (key_step,) = torch.autograd.grad(objective, here_keys, create_graph=True)
        if o["clip"]:
            value_step, key_step = value_step.clamp(-1, 1), key_step.clamp(-1, 1)
        keys = here_keys - o["lr"] * (key_step + o["weight_decay"] * here_keys)
        values = values - o["lr"] * (value_step + o["weight_decay"] * values)
    return torch.stack([torch.stack(row) for row in reads]), keys, values


OPTIONS = [
    {},
    {"update_scale": "released"},
    {"lookahead": 0},
    {"lookahead": 2, "update_scale": "released"},
    {"score": "dot"},
    {"temperature": 0.5, "address_weight": 0.0},
    {"value_loss_to_keys": True},
    {"value_loss_to_keys": True, "score": "dot", "address_weight": 0.3, "temperature": 2.0},
    {"weight_decay": 0.01, "lr": 0.7},
    {"clip": True, "lr": 0.5, "update_scale": "released"},
]


@pytest.mark.parametrize("with_mask", [False, True], ids=["no_mask", "mask"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "default")
def test_equals_the_definitions(options: dict, with_mask: bool) -> None:
    sizes = {"B": 2, "T": 11, "C": 4}
    mask = None
    if with_mask:
        mask = torch.ones(2, 11, dtype=torch.bool)
        mask[0, :3] = False
        mask[1, 5] = False
    plain = draw(**sizes)
    wanted = token_by_token(**plain, chunk_size=4, top_k=3, mask=mask, **options)
    cotangents = [torch.randn_like(tensor) for tensor in wanted]
    wanted_grads = torch.autograd.grad(wanted, list(plain.values()), cotangents)
    for impl in ("reference", "sparse"):
        if impl == "sparse" and options.get("weight_decay"):
            continue  # refused by name: test_fwpkm_sparse.py
        ours = draw(**sizes)
        out = fast_weight_pkm(**ours, chunk_size=4, top_k=3, mask=mask, scope="shared", impl=impl, **options)
        found = (out.read, out.keys, out.values)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        grads = torch.autograd.grad(found, list(ours.values()), cotangents)
        for name, got, want in zip(ours, grads, wanted_grads, strict=True):
            assert torch.isfinite(got).all()
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=lambda m, n=f"{impl} {name}": f"{n}: {m}")


@pytest.mark.parametrize("update_scale", ["paper", "released"])
def test_sequence_scope_is_one_shared_memory_per_sequence(update_scale: str) -> None:
    x = draw()
    options = {"chunk_size": 7, "top_k": 3, "update_scale": update_scale}
    together = fast_weight_pkm(**x, scope="sequence", **options)
    for b in range(SIZES["B"]):
        alone = {name: tensor[b : b + 1] for name, tensor in x.items() if name in ("q", "v", "gate")}
        single = fast_weight_pkm(**alone, keys=x["keys"], values=x["values"], scope="shared", **options)
        torch.testing.assert_close(together.read[b : b + 1], single.read)
        torch.testing.assert_close(together.keys[b], single.keys)
        torch.testing.assert_close(together.values[b], single.values)
        torch.testing.assert_close(together.slots[b : b + 1], single.slots)


def test_gradients_by_finite_differences() -> None:
    x = draw(B=2, T=5, n=3, V=2, H=2, K=4)

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = fast_weight_pkm(*tensors, chunk_size=2, top_k=2, scope="sequence", impl="reference")
        return out.read, out.keys, out.values

    assert torch.autograd.gradcheck(run, tuple(x.values()), eps=1e-7, atol=1e-6)


def test_reads_see_only_earlier_chunks() -> None:
    x = {name: tensor.detach() for name, tensor in draw().items()}
    changed = dict(x)
    changed["v"] = x["v"].clone()
    changed["v"][:, 3] += 1.0  # inside the first chunk of 7
    before = fast_weight_pkm(**x, chunk_size=7, top_k=3).read
    after = fast_weight_pkm(**changed, chunk_size=7, top_k=3).read
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


LAYER = {"d_model": 10, "n_heads": 2, "top_k": 3, "n_subkeys": 6, "key_dim": 6, "value_dim": 5, "chunk_size": 4}
LAYER_OPTIONS = [
    {},
    {"scope": "shared"},
    {"update_scale": "released", "scope": "shared"},
    {"lookahead": 0},
    {"lookahead": 2, "initial_memory": "learned"},
    {"use_gate": False},
    {"gate_weighting": False},
    {"use_gate": False, "gate_weighting": False},
    {"z_score": False},
    {"score": "dot", "address_weight": 0.0, "value_loss_to_keys": True},
    {"gate_outputs": 8, "weight_decay": 0.01, "clip": True},
]


def layer(**options) -> FastWeightPKM:
    torch.manual_seed(3)
    return FastWeightPKM(FastWeightPKM.Config(**LAYER, **options)).double()


@pytest.mark.parametrize("cut", [[1] * 17, [17], [3, 1, 8, 5], [4, 4, 9], [0, 16, 0, 1]], ids=str)
@pytest.mark.parametrize(
    "options", LAYER_OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "default"
)
def test_streaming_equals_one_call(options: dict, cut: list[int]) -> None:
    m = layer(**options)
    x = torch.randn(2, 17, 10, dtype=torch.float64, requires_grad=True)
    whole = m(x, return_state=True)
    state, parts = None, []
    for part in x.split(cut, dim=1):
        out = m(part, state, return_state=True)
        state = out.state
        parts.append(out.y)
    streamed = torch.cat(parts, dim=1)
    torch.testing.assert_close(streamed, whole.y, rtol=1e-10, atol=1e-10)
    for got, want in zip(state_tensors(state), state_tensors(whole.state), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(streamed)
    (want,) = torch.autograd.grad((whole.y * cotangent).sum(), x)
    (got,) = torch.autograd.grad((streamed * cotangent).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scope", ["sequence", "shared"])
def test_masked_values_are_never_written(scope: str) -> None:
    m = layer(scope=scope)
    x = torch.randn(2, 17, 10, dtype=torch.float64)
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[0, 5:8] = False
    mask[1, 0] = False
    target = {}
    hook = m.v_proj.register_forward_hook(lambda _m, _i, out: target.get("v", out))
    whole = m(x, mask=mask, return_state=True)
    target["v"] = torch.where(mask.unsqueeze(-1), m.v_proj(m.v_norm(x)), torch.randn(2, 17, 5, dtype=torch.float64))
    other = m(x, mask=mask, return_state=True)
    hook.remove()
    torch.testing.assert_close(other.y[mask], whole.y[mask])
    torch.testing.assert_close(m.tables(other.state), m.tables(whole.state))
    assert whole.y[~mask].abs().max() == 0


def test_frozen_memory_is_a_buffer_and_learned_one_a_parameter() -> None:
    frozen, learned = layer(), layer(initial_memory="learned")
    assert {"keys", "values"} <= dict(frozen.named_buffers()).keys()
    assert {"keys", "values"} <= dict(learned.named_parameters()).keys()
    assert not learned.parameter_options()["values"].weight_decay
    learned(torch.randn(2, 9, 10, dtype=torch.float64)).y.sum().backward()
    assert learned.values.grad.abs().max() > 0
    assert learned.keys.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 9}, "top_k must be within 1..n=6, got 9"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"impl": "sparce"}, "impl='sparce' is not available"),
        ({"scope": "batch"}, "scope must be 'sequence' or 'shared'"),
        ({"update_scale": "papper"}, "update_scale must be"),
        ({"activation": "relu"}, "activation must be 'softmax'"),
        ({"mask": torch.ones(2, 2)}, r"mask must be \(3, 23\), got \(2, 2\)"),
        ({"values": torch.zeros(10, 5, dtype=torch.float64)}, r"values must be \(n\*n,V\) = \(36, 5\), got \(10, 5\)"),
        ({"q": torch.zeros(3, 23, 2, 5, dtype=torch.float64)}, "key width K must be even"),
        ({"v": torch.zeros(3, 23, 5)}, "must all be float32 or all float64"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {**draw(), "chunk_size": 7, "top_k": 3, **change}
    with pytest.raises(UserError, match=message):
        fast_weight_pkm(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 7}, "top_k must be at most n_subkeys=6"),
        ({"key_dim": 5}, "key width must be even"),
        ({"lookahead": 4}, "lookahead must be below chunk_size=4"),
        ({"lookahed": 0}, "did you mean 'lookahead'"),
        ({"chunk_size": "8"}, "chunk_size"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        FastWeightPKM.Config.parse(LAYER | options, "mixer 'fwpkm'")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scope", ["sequence", "shared"])
def test_one_chunk_a_write_is_the_same_layer(scope: str) -> None:
    class ByChunk(FastWeightPKM):
        one_chunk_per_write = True
        lengths: list[int] = []  # noqa: RUF012

        def write(self, q, v, gate, keys, values, mask):
            self.lengths.append(q.shape[1])
            return super().write(q, v, gate, keys, values, mask)

    options = {"d_model": 8, "n_subkeys": 4, "key_dim": 6, "value_dim": 5, "top_k": 3, "chunk_size": 7, "scope": scope}
    x = torch.randn(2, 23, 8, dtype=torch.float64)
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[0, 5:9] = False
    outs = []
    for cls in (FastWeightPKM, ByChunk):
        torch.manual_seed(0)
        layer = cls(FastWeightPKM.Config.parse(options, "test")).double()
        first = layer(x[:, :3], mask=mask[:, :3], return_state=True)  # tokens wait
        outs.append(layer(x[:, 3:], first.state, mask=mask[:, 3:], return_state=True))
    whole, by_chunk = outs
    assert ByChunk.lengths == [7, 7, 7]
    torch.testing.assert_close(by_chunk.y, whole.y)
    torch.testing.assert_close(layer.tables(by_chunk.state), layer.tables(whole.state))
    torch.testing.assert_close(state_tensors(by_chunk.state)[-4:], state_tensors(whole.state)[-4:])  # the queue
    torch.testing.assert_close(by_chunk.aux, whole.aux)
