"""The Triton implementation keeps versions of rows instead of tables: what each access reads, and what may be asked for
after a call, in which order. On a GPU or in triton's interpreter, see test_fwpkm_interpreted.py."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import Tensor

from mixers.errors import UserError
from mixers.fwpkm import FastWeightPKM, fast_weight_pkm

triton = pytest.importorskip("triton", reason="triton is not installed")
if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    pytest.skip("needs a CUDA GPU or triton's interpreter", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float32 if torch.cuda.is_available() else torch.float64
TOLERANCE = 2e-5 if torch.cuda.is_available() else 1e-10
INPUTS = ("q", "v", "gate", "keys", "values")


def draw(n: int, n_tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, DTYPE)

    return {
        "q": normal(2, n_tokens, 1, 4),
        "v": normal(2, n_tokens, 3),
        "gate": normal(2, n_tokens).sigmoid(),
        "keys": normal(1, 2, n, 2),
        "values": normal(n * n, 3),
    }


def call(x: dict[str, Tensor], impl: str = "triton"):
    return fast_weight_pkm(**x, chunk_size=2, top_k=2, impl=impl)


def trained(x: dict[str, Tensor]) -> list[Tensor]:
    return [x[name].requires_grad_() for name in INPUTS]


def test_find_versions() -> None:
    from mixers.kernels.versions import find_versions

    n_memories, n_rows, n_tokens, n_read, n_slots, chunk_size = 2, 3, 7, 4, 50, 3
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(0, n_slots, (n_memories, n_rows, n_tokens, n_read), generator=generator)
    slots[..., 0] = 7
    weights = torch.rand(slots.shape, generator=generator, dtype=torch.float64)
    scale = -torch.rand(3, n_memories, generator=generator, dtype=torch.float64)
    parts = (slots.to(DEVICE), weights.to(DEVICE, DTYPE), scale.to(DEVICE, DTYPE))
    found = [tensor.cpu() for tensor in find_versions(*parts, n_slots, chunk_size)]
    order, group, count, before, after, factor, move = found

    groups = defaultdict(list)
    for access, slot in enumerate(slots.flatten().tolist()):
        token = access // n_read
        memory, chunk = token // (n_rows * n_tokens), token % n_tokens // chunk_size
        groups[memory * n_slots + slot, chunk].append((access, scale[chunk, memory].item()))
    listed = order.tolist()
    assert sorted(listed) == list(range(slots.numel()))
    for (row, chunk), members in groups.items():
        accesses = [access for access, _ in members]
        first = group[accesses[0]].item()
        assert listed[first : first + len(accesses)] == accesses
        assert group[accesses].unique().tolist() == [first]
        assert count[accesses].tolist() == [len(accesses)] + [0] * (len(accesses) - 1)
        chunks = [c for r, c in groups if r == row]
        earlier = max((c for c in chunks if c < chunk), default=None)
        version = -1 if earlier is None else group[groups[row, earlier][0][0]].item()
        assert before[accesses].unique().tolist() == [version]
        assert after[accesses].unique().tolist() == [first if max(chunks) > chunk else -1]
        rate = members[0][1] / len(accesses)
        torch.testing.assert_close(factor[accesses].double(), torch.full((len(accesses),), rate).double())
        torch.testing.assert_close(move[accesses].double(), rate * weights.flatten()[accesses])


# More rows than accesses, and fewer: versions, and a copy of the table.
@pytest.mark.parametrize(("n", "n_tokens"), [(4, 3), (2, 4)])
def test_tables_without_gradients(n: int, n_tokens: int) -> None:
    x = draw(n, n_tokens)
    given = {name: tensor.clone() for name, tensor in x.items()}
    got, want = call(x), call(x, "reference")
    got.read.zero_()
    got.weights.zero_()
    torch.testing.assert_close(got.values, want.values, rtol=0, atol=TOLERANCE)
    assert got.values is got[2]
    assert all(torch.equal(x[name], given[name]) for name in x)


def test_backwards_of_a_kept_graph_are_equal() -> None:
    x = draw(3, 4)
    inputs = trained(x)
    read = call(x).read
    cotangent = torch.randn_like(read)
    first, second, last = (
        torch.autograd.grad(read, inputs, cotangent, retain_graph=keep) for keep in (True, True, False)
    )
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, last, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in first)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(read, inputs, cotangent)


def test_the_table_may_be_asked_for_at_any_time() -> None:
    """Before and after a backward, and with derivatives of its own."""
    x = draw(3, 4)
    inputs = trained(x)
    want = call(x, "reference")
    out = call(x)
    torch.autograd.grad(out.read.sum(), inputs)
    torch.testing.assert_close(out.values, want.values, rtol=0, atol=TOLERANCE)

    results = []
    for impl in ("triton", "reference"):
        out = call(x, impl)
        with torch.no_grad():
            values = out.values
        results.append((values, *torch.autograd.grad(values.square().sum() + out.read.sum(), inputs)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=20 * TOLERANCE)


def test_values_changed_before_the_table_was_read_are_an_error() -> None:
    x = draw(4, 3)
    out = call(x)
    x["values"].zero_()
    with pytest.raises(UserError, match="values were changed in place"):
        _ = out.values


def test_layer_without_a_state_after_it() -> None:
    results = []
    for impl in ("triton", "reference"):
        torch.manual_seed(0)
        options = {"d_model": 4, "n_subkeys": 3, "top_k": 2, "chunk_size": 2, "impl": impl, "initial_memory": "learned"}
        layer = FastWeightPKM(FastWeightPKM.Config(**options)).to(DEVICE, DTYPE)
        x = torch.randn(2, 4, 4, dtype=torch.float64).to(DEVICE, DTYPE).requires_grad_()
        waiting = layer(x[:, :1], return_state=True).state
        # Whole chunks; and with a queue before and a rest after them.
        ends = [layer(x), layer(x[:, 1:3], waiting)]
        losses = [out.aux[name] for out in ends for name in ("value_loss", "address_loss")]
        total = sum(out.y.square().sum() for out in ends)
        results.append((*(out.y for out in ends), *losses, *torch.autograd.grad(total, [x, layer.keys, layer.values])))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=100 * TOLERANCE)


@pytest.mark.parametrize(("goes_on", "address_weight"), [(True, 1.0), (False, 0.0)])
def test_a_long_call_in_parts(goes_on: bool, address_weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of a part beside the keys of the next, the last part and its last chunk shorter."""
    from mixers.fwpkm import reference, triton_chunks
    from mixers.fwpkm.gpu_check import draw, options_of

    monkeypatch.setattr(triton_chunks, "LEAST_CHUNKS", 2)
    beside = []
    monkeypatch.setattr(
        triton_chunks, "both_chains", lambda *parts, **rest: beside.append(0) or both_chains(*parts, **rest)
    )
    from mixers.kernels.both_chains import both_chains

    drawn = draw(1, 1, 39, 1, 6, 4, 5, torch.float64, DEVICE)
    x = [drawn[name].detach().to(DTYPE) for name in ("q", "v", "gate", "keys", "values")]
    mask = torch.arange(39, device=DEVICE).view(1, 1, 39) >= 5
    options = options_of(chunk_size=6, top_k=3, update_scale="released", address_weight=address_weight)
    want = reference.write_chunks(*(part.double() for part in x), mask, options)
    got = triton_chunks.write_chunks(*x, mask, options, goes_on=goes_on)
    assert triton_chunks._part_sizes(7) == [2, 2, 3]
    assert len(beside) == 2
    assert (got.read - want.read).abs().max() <= TOLERANCE
    if goes_on:
        for name in ("keys", "value_loss", "address_loss"):
            assert (getattr(got, name) - getattr(want, name)).abs().max() <= TOLERANCE
        assert (got.values.table() - want.values).abs().max() <= TOLERANCE
