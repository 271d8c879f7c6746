"""States of the sparse FwPKM layer: the same memory as whole tables, at the price of the rows that were written."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mixers.base import detach_state, map_state, state_bytes, state_tensors
from mixers.fwpkm import FastWeightPKM
from mixers.fwpkm.layer import _slot_use

SMALL = {"d_model": 10, "n_heads": 2, "top_k": 3, "n_subkeys": 6, "key_dim": 6, "value_dim": 5, "chunk_size": 4}
LARGE = {"d_model": 8, "top_k": 2, "n_subkeys": 64, "key_dim": 4, "value_dim": 16, "chunk_size": 4, "impl": "sparse"}


def layer(impl: str, **options) -> FastWeightPKM:
    torch.manual_seed(3)
    return FastWeightPKM(FastWeightPKM.Config.parse({**SMALL, "impl": impl, **options}, "test")).double()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    options=st.fixed_dictionaries(
        {
            "scope": st.sampled_from(["sequence", "shared"]),
            "initial_memory": st.sampled_from(["frozen", "learned"]),
            "update_scale": st.sampled_from(["paper", "released"]),
            "lookahead": st.integers(0, 2),
            "address_weight": st.sampled_from([0.0, 0.7]),
            "gate_weighting": st.booleans(),
        }
    ),
    with_mask=st.booleans(),
)
def test_calls_from_state_to_state_equal_those_of_the_reference(lengths, options, with_mask) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    n_tokens = sum(lengths)
    drawn = torch.randn(3, n_tokens, 10, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, n_tokens, generator=generator) > 0.3 if with_mask else None
    results = []
    for impl in ("reference", "sparse"):
        m, x, state, ys, start = layer(impl, **options), drawn.clone().requires_grad_(), None, [], 0
        assert m.impl == impl
        for length in lengths:
            part = slice(start, start + length)
            y, state, _ = m(x[:, part], state, return_state=True, mask=None if mask is None else mask[:, part])
            ys.append(y)
            start += length
        found = [torch.cat(ys, 1), *m.tables(state), *state_tensors((state.q, state.v, state.gate, state.mask))]
        noise = torch.Generator().manual_seed(1)
        loss = sum((t * torch.randn(t.shape, generator=noise, dtype=t.dtype)).sum() for t in found[:3])
        trained = [x, *m.parameters()]
        results.append(found + list(torch.autograd.grad(loss, trained, materialize_grads=True)))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scope", ["sequence", "shared"])
@pytest.mark.parametrize(("first", "second"), [("reference", "sparse"), ("sparse", "reference")])
def test_a_state_of_one_implementation_continues_in_the_other(scope: str, first: str, second: str) -> None:
    x = torch.randn(2, 23, 10, dtype=torch.float64)
    before, after = layer(first, scope=scope), layer(second, scope=scope)
    whole = before(x, return_state=True)
    continued = after(x[:, 10:], before(x[:, :10], return_state=True).state, return_state=True)
    torch.testing.assert_close(continued.y, whole.y[:, 10:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after.tables(continued.state), before.tables(whole.state), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("initial_memory", ["frozen", "learned"])
def test_forks_of_a_state_are_independent(initial_memory: str) -> None:
    m = layer("sparse", initial_memory=initial_memory)
    x, left, right = (torch.randn(2, n, 10, dtype=torch.float64) for n in (14, 9, 9))
    state = m(x, return_state=True).state
    kept = map_state(torch.clone, state)
    for branch in (left, right, left):
        forked, alone = m(branch, state, return_state=True), m(torch.cat([x, branch], 1), return_state=True)
        torch.testing.assert_close(forked.y, alone.y[:, 14:], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state_tensors(forked.state), state_tensors(alone.state), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(state_tensors(state), state_tensors(kept), strict=True))


def saved(state) -> bytes:
    file = io.BytesIO()
    torch.save(state_tensors(map_state(torch.clone, state)), file)
    return file.getvalue()


@pytest.mark.parametrize("scope", ["sequence", "shared"])
def test_a_saved_state_is_as_large_as_what_was_written_and_continues(scope: str) -> None:
    torch.manual_seed(0)
    m = FastWeightPKM(FastWeightPKM.Config.parse({**LARGE, "scope": scope}, "test"))
    x = torch.randn(2, 21, 8)
    with torch.no_grad():
        state = m(x, return_state=True).state
    assert 0 < len(state.codes) <= 2 * 20 * 2
    table_bytes = m.values.numel() * 4
    assert len(saved(state)) < table_bytes / 8
    tensors = iter(torch.load(io.BytesIO(saved(state))))
    loaded = map_state(lambda _: next(tensors), m.initial_state(2, device="cpu", dtype=torch.float32))
    more = torch.randn(2, 9, 8)
    assert torch.equal(m(more, loaded).y, m(more, state).y)


@pytest.mark.parametrize("scope", ["sequence", "shared"])
def test_comparisons_count_the_same_memory_with_every_implementation(scope: str) -> None:
    torch.manual_seed(0)
    x, counted = torch.randn(2, 21, 8), []
    for impl in ("reference", "sparse"):
        m = FastWeightPKM(FastWeightPKM.Config.parse({**LARGE, "scope": scope, "impl": impl}, "test"))
        state = m(x, return_state=True).state
        counted.append(m.full_state_bytes(state))
        stored = state_bytes(state)
        assert stored == counted[0] if impl == "reference" else stored < counted[0] / 4
    assert counted[0] == counted[1]


@pytest.mark.parametrize("impl", ["reference", "sparse"])
@pytest.mark.parametrize("n_tokens", [3, 14])
def test_a_state_does_not_follow_what_the_optimiser_does_to_a_learned_memory(impl: str, n_tokens: int) -> None:
    m = layer(impl, initial_memory="learned")
    state = detach_state(m(torch.randn(2, n_tokens, 10, dtype=torch.float64), return_state=True).state)
    before = [part.clone() for part in m.tables(state)]
    with torch.no_grad():
        m.keys.add_(1.0)
        m.values.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(m.tables(state), before, strict=True))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor in storage of its own that any operation gave, ``known`` tensors aside."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.n_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.n_elements = max(self.n_elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("scope", ["sequence", "shared"])
def test_a_training_call_never_makes_a_table(scope: str) -> None:
    found = {}
    for impl in ("sparse", "reference"):
        torch.manual_seed(0)
        m = FastWeightPKM(FastWeightPKM.Config.parse({**LARGE, "scope": scope, "impl": impl}, "test"))
        with Largest(m.values) as largest:
            m(torch.randn(2, 23, 8)).y.square().sum().backward()
        found[impl] = largest.n_elements
    assert found["sparse"] < m.values.numel() / 4
    assert found["reference"] >= m.values.numel()


@pytest.mark.parametrize("scope", ["sequence", "shared"])
@torch.no_grad()
def test_a_token_inside_a_chunk_makes_nothing_of_the_size_of_the_table_or_of_what_was_written(scope: str) -> None:
    found = set()
    for n_subkeys, n_tokens in ((16, 5), (16, 81), (64, 5), (64, 81), (128, 81)):
        torch.manual_seed(0)
        options = {**LARGE, "n_subkeys": n_subkeys, "scope": scope}
        m = FastWeightPKM(FastWeightPKM.Config.parse(options, "test")).eval()
        state = m(torch.randn(2, n_tokens, 8), return_state=True).state
        known = (*m.parameters(), *m.buffers(), *state_tensors(state))
        # Keys and scores follow n, the square root of N.
        with Largest(*known) as largest:
            m(torch.randn(2, 1, 8), state, return_state=True)
        found.add((n_subkeys, largest.n_elements))
    sizes = dict(found)
    assert len(found) == len(sizes) == 3, f"depends on what was written: {found}"
    assert sizes[128] <= 2 * sizes[64] <= 8 * sizes[16]
    assert sizes[128] < 128**2 / 4


def test_slot_use_is_that_of_a_histogram() -> None:
    slots = torch.randint(0, 20, (3, 7, 2, 4)) ** 2 // 20
    n_slots, flat = 36, slots.flatten(1)
    counts = torch.stack([torch.bincount(row, minlength=n_slots) for row in flat]).double()
    share = counts / flat.shape[1]
    found = _slot_use(slots, n_slots)
    distinct = (counts > 0).sum(1).double()
    torch.testing.assert_close(found["slot_coverage"].double(), (distinct / n_slots).mean())
    torch.testing.assert_close(found["slot_collisions"].double(), (1 - distinct / flat.shape[1]).mean())
    torch.testing.assert_close(
        found["slot_kl_uniform"].double(), torch.xlogy(share, share * n_slots).sum(1).mean(), rtol=1e-5, atol=1e-6
    )
