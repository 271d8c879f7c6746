"""The sparse fast-weight memory: what it refuses, and the ways of large calls.

Equality with the reference: ``test_fwpkm_random.py``.
"""

from __future__ import annotations

import mmap

import pytest
import torch

from mixers.errors import UserError
from mixers.fwpkm import fast_weight_pkm, kept_memory, sparse, sparse_keys, sparse_rows, touched_rows
from tests.mixers.test_fwpkm import draw


def test_weight_decay_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"weight_decay=0.1 moves every row"):
        fast_weight_pkm(**draw(), chunk_size=7, top_k=3, weight_decay=0.1, impl="sparse")


def test_there_is_no_second_derivative() -> None:
    x = draw()
    read = fast_weight_pkm(**x, chunk_size=7, top_k=3, impl="sparse").read
    (first,) = torch.autograd.grad(read.square().sum(), x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_values_changed_in_place_before_they_are_read_are_an_error() -> None:
    x = {name: tensor.detach() for name, tensor in draw().items()}
    out = fast_weight_pkm(**x, chunk_size=7, top_k=3, impl="sparse")
    x["values"].add_(1)
    with pytest.raises(UserError, match="changed in place"):
        _ = out.values


@pytest.mark.parametrize("n_codes", [0, 1, sparse_rows.FEW_CODES - 1, sparse_rows.FEW_CODES, 5000])
def test_codes_sorted_with_their_positions(n_codes: int) -> None:
    codes = torch.randint(0, 2**40, (n_codes,)) if n_codes % 2 else torch.randint(0, 7, (n_codes,))
    for got, want in zip(sparse_rows.stable_sort(codes), torch.sort(codes, stable=True), strict=True):
        assert torch.equal(got, want)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="memory is kept on Linux only")
def test_kept_memory_is_used_again_only_when_no_tensor_shares_it() -> None:
    like, shape = torch.empty(0, dtype=torch.float64), (kept_memory.LARGE_BYTES // 8 // 512, 512)
    first = kept_memory.room_for(shape, like)
    assert (first.shape, first.dtype, first.is_contiguous(), first._base) == (shape, like.dtype, True, None)
    part = first[3:].fill_(1)
    at = first.data_ptr()
    del first
    second = kept_memory.room_for(shape, like).fill_(2)
    assert part.eq(1).all()
    assert second.data_ptr() != at
    del part
    fewer = kept_memory.room_for((shape[0] - 1, 512), like)  # too small for it
    assert fewer.data_ptr() != at
    assert kept_memory.room_for(shape, like).data_ptr() == at


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="memory is kept on Linux only")
def test_no_more_memory_is_kept_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_memory, "KEPT_BYTES", 2 * kept_memory.LARGE_BYTES)
    like = torch.empty(0, dtype=torch.uint8)
    rooms = [kept_memory.room_for((kept_memory.LARGE_BYTES + i,), like) for i in range(3)]
    del rooms
    assert sum(map(len, kept_memory._kept)) <= 2 * kept_memory.LARGE_BYTES


@pytest.mark.parametrize(("scope", "learned"), [("sequence", False), ("shared", False), ("shared", True)])
def test_sizes_that_take_the_ways_of_large_calls(scope: str, learned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``test_fwpkm_random.py``, but large enough for huge pages, for numbers that hold code and position, for
    derivatives of only those rows that have one, and for several blocks of rows in a chunk, of new ones and others."""
    monkeypatch.setattr(touched_rows, "BLOCK_BYTES", 99 * 176 * 8)
    x = draw(B=2, T=200, H=2, K=8, V=176, n=64)
    names = list(x) if learned else ["q", "v", "gate"]
    x = {name: tensor if name in names else tensor.detach() for name, tensor in x.items()}
    found = []
    for impl in ("reference", "sparse"):
        out = fast_weight_pkm(**x, chunk_size=48, top_k=8, scope=scope, impl=impl)
        grads = torch.autograd.grad(out.read.square().sum(), [x[name] for name in names])
        found.append((out.read, out.keys, out.values, *grads))
    n_tokens, n_read, n_rows = 2 * 200, 2 * 8, out.values.ne(x["values"]).any(-1).sum()
    assert n_tokens * n_read * 176 * 8 >= kept_memory.LARGE_BYTES
    assert n_rows * 176 > sparse.FEW_DERIVATIVES
    assert 2 * 48 * n_read * 2 >= sparse_rows.FEW_CODES
    for got, want in zip(*reversed(found), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("is_near", [False, True])
@pytest.mark.parametrize("options", [{}, {"clip": True}, {"value_loss_to_keys": True}])
def test_distances_are_as_precise_whether_keys_are_near(is_near: bool, options: dict, monkeypatch) -> None:
    """Far from all keys, distances come from products, which cancel for near ones: results 100 times less precise."""
    n_formed = 0
    form = sparse_keys.differences

    def differences(*arguments: object) -> torch.Tensor:
        nonlocal n_formed
        n_formed += 1
        return form(*arguments)

    monkeypatch.setattr(sparse_keys, "differences", differences)
    monkeypatch.setattr(sparse_keys, "MANY_DIFFERENCES", 0)
    x = {name: tensor.detach() for name, tensor in draw(T=64, H=1, K=256, V=12, n=20).items()}
    for name in ("q", "keys"):
        x[name] = 0.02 * x[name] + 1 / 16 if is_near else x[name] / 16
    x = {name: tensor.float().double() for name, tensor in x.items()}
    found = {}
    for impl, dtype in (("reference", torch.float64), ("reference", torch.float32), ("sparse", torch.float32)):
        mine = {name: tensor.to(dtype).requires_grad_() for name, tensor in x.items()}
        out = fast_weight_pkm(**mine, chunk_size=16, top_k=4, impl=impl, **options)
        wanted = [out.read, out.keys, out.weights.sort(-1).values]
        grads = torch.autograd.grad(out.read.square().sum(), [mine[name] for name in ("q", "v", "keys")])
        found[impl, dtype] = [*wanted, *grads]
    assert (n_formed >= 8) if is_near else n_formed == 0
    exact, plain, sparsely = found.values()
    for want, own, got in zip(exact, plain, sparsely, strict=True):
        largest = want.abs().max()
        rounding = (own - want).abs().max() / largest
        assert rounding < 1e-3
        assert (got - want).abs().max() / largest <= max(8 * rounding, 1e-6)
