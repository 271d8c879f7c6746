"""The chain of the keys against dense sums in float64: tiles in parts, a sub-key listed by all, rows of all sizes."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    pytest.skip("needs a CUDA GPU or triton's interpreter", allow_module_level=True)

tl = triton.language
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("mean_list", [0, 1000])
@pytest.mark.parametrize("score", ["idw", "dot"])
def test_long_lists(score: str, mean_list: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step as a product of matrices, and by lists of queries."""
    from mixers.kernels import key_chain
    from mixers.kernels import listed as listed_queries
    from mixers.kernels.key_step import ENTROPY_EPS, StepTiles
    from mixers.product_keys import IDW_EPS

    # Tiles smaller than what they are used for: several sub-keys, queries and elements one after the other.
    monkeypatch.setattr(key_chain, "step_tiles", lambda *sizes: StepTiles(2, 4, 4, 8, 2, 2, 4, 1, 32))
    monkeypatch.setattr(key_chain, "MEAN_LIST", mean_list)
    monkeypatch.setattr(key_chain, "LISTED", 8)
    if DEVICE == "cpu":
        # Of the 40 queries' two words one after the other.
        monkeypatch.setattr(listed_queries, "WORDS", tl.constexpr(1))
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

    n_rows, n_tokens, n_chunk, heads, n, k = 4, 12, 10, 2, 7, 3
    q, keys = normal(1, n_rows, n_tokens, heads, 6), normal(3, 1, heads, 2, n, 3)
    # Sub-key 5 is near to all queries (or along all): it is listed by each of them.
    q[..., [0, 3]] = 3.0
    keys[0, ..., 5, :] = torch.tensor([3.0, 0, 0], dtype=keys.dtype)
    listed = (1, n_rows, n_tokens, heads, 2, k)
    indices = torch.zeros(listed, dtype=torch.int32, device=DEVICE)
    measures, probabilities, mean = q.new_empty(listed), q.new_empty(listed), q.new_empty(2, 1, 2, n)
    totals = q.new_empty(2, 1, heads, 2, n)
    lr, weight = 0.7, 0.3
    work = (q, keys, indices, measures, probabilities, mean, totals, n_chunk, score, lr, weight)
    key_chain.key_chain(key_chain.KeyWork(*work))

    halves = q.view(1, n_rows, n_tokens, heads, 2, 3)
    for chunk, inside in enumerate((slice(0, 10), slice(10, 12))):
        now = keys[chunk].detach().clone().requires_grad_()
        all_measures = torch.einsum("mrthbd,mhbnd->mrthbn", halves[:, :, inside], now)
        if score == "idw":
            all_measures = (halves[:, :, inside].unsqueeze(-2) - now.unsqueeze(1).unsqueeze(1)).square().sum(-1)
        scores = -(IDW_EPS + all_measures).log() if score == "idw" else all_measures
        best = scores.topk(k, -1)
        assert (best.indices == 5).any(-1).all()
        assert torch.equal(best.indices.int(), indices[:, :, inside])
        shares = best.values.softmax(-1)
        assert (shares - probabilities[:, :, inside]).abs().max().item() <= 1e-12
        used = torch.zeros_like(scores).scatter(-1, best.indices, shares).mean((1, 2, 3))
        assert (used - mean[chunk]).abs().max().item() <= 1e-12
        (weight * (used * (used + ENTROPY_EPS).log()).sum()).backward()
        assert (now - lr * now.grad - keys[chunk + 1]).abs().max().item() <= 1e-12


@pytest.mark.parametrize("exponent", [-70, 0, 70])
def test_float32_products_of_parts(exponent: int) -> None:
    from mixers.kernels.key_chain import KeyWork, key_chain

    generator = torch.Generator().manual_seed(2)
    n_tokens, n, k = 20, 40, 3
    q = torch.randn(1, 1, n_tokens, 1, 96, generator=generator, dtype=torch.float64)
    # Within a row from 1e-9 to 1; whole rows by powers of two, which change no digit.
    q *= 10.0 ** -torch.randint(0, 10, q.shape, generator=generator)
    q *= 2.0 ** (exponent + torch.arange(n_tokens) % 5).view(-1, 1, 1)
    keys = torch.randn(1, 1, 1, 2, n, 48, generator=generator, dtype=torch.float64)
    q, keys = q.float().to(DEVICE), keys.float().to(DEVICE)
    listed = (1, 1, n_tokens, 1, 2, k)
    indices = torch.zeros(listed, dtype=torch.int32, device=DEVICE)
    measures, probabilities, none = q.new_empty(listed), q.new_empty(listed), q.new_empty(0)
    key_chain(KeyWork(q, keys, indices, measures, probabilities, none, none, n_tokens, "dot", 1.0, 0.0))

    halves, table = q.double().view(n_tokens, 2, 48), keys[0, 0, 0].double()
    exact = torch.einsum("tbd,bnd->tbn", halves, table)
    size = halves.norm(dim=-1)[..., None] * table.norm(dim=-1)
    error = (measures[0, 0, :, 0] - exact.gather(-1, indices[0, 0, :, 0].long())).abs()
    assert (error <= 2**-21 * size.gather(-1, indices[0, 0, :, 0].long())).all()
    # None that was left out is better by more than the error.
    assert (exact.topk(k).values - exact.gather(-1, indices[0, 0, :, 0].long())).abs().max() <= 2**-20 * size.max()


def test_far_and_near_distances_in_float32() -> None:
    from mixers.kernels.key_chain import KeyWork, key_chain

    generator = torch.Generator().manual_seed(3)
    n_tokens, n, k = 24, 40, 3
    keys = torch.randn(1, 1, 1, 2, n, 24, generator=generator)
    q = torch.randn(1, 1, n_tokens, 1, 48, generator=generator)
    # The second half of the queries lie on keys, up to a thousandth: the difference of the squares would lose it.
    q[0, 0, 12:, 0] = keys[0, 0, 0, :, 12:24].transpose(0, 1).reshape(12, 48) * 1.001
    q, keys = q.to(DEVICE), keys.to(DEVICE)
    listed = (1, 1, n_tokens, 1, 2, k)
    indices = torch.zeros(listed, dtype=torch.int32, device=DEVICE)
    measures, probabilities, none = q.new_empty(listed), q.new_empty(listed), q.new_empty(0)
    key_chain(KeyWork(q, keys, indices, measures, probabilities, none, none, n_tokens, "idw", 1.0, 0.0))

    halves, table = q.double().view(n_tokens, 2, 24), keys[0, 0, 0].double()
    exact = (halves.unsqueeze(2) - table).square().sum(-1)
    want = exact.topk(k, largest=False)
    assert torch.equal(want.indices.int(), indices[0, 0, :, 0])
    assert (want.values[:12] > 0.5 * halves[:12].square().sum(-1, keepdim=True)).any()
    assert ((measures[0, 0, :, 0] - want.values).abs() <= 2e-6 * want.values).all()


@pytest.mark.parametrize(("columns", "parts"), [(100, 1), (150, 2), (300, 4), (700, 8)])
def test_the_best_of_rows_in_parts(columns: int, parts: int) -> None:
    """Best first, the lowest column of equal ones, in rows that one warp holds; the last row does not exist."""
    from tests.mixers.best_of_rows import best_of_rows

    generator = torch.Generator().manual_seed(columns)
    x = torch.randint(-5, 6, (4, columns), generator=generator, dtype=torch.float32).to(DEVICE)
    x[1] = torch.randn(columns, generator=generator).to(DEVICE)
    found, best = (torch.empty(4, 32, device=DEVICE, dtype=dtype) for dtype in (torch.float32, torch.int32))
    best_of_rows[(1,)](x, found, best, COLUMNS=columns, WIDTH=128, PARTS=parts, COUNT=6)
    wanted = x[:3].sort(dim=1, descending=True, stable=True)
    assert torch.equal(best[:3, :6].long(), wanted.indices[:, :6])
    assert torch.equal(found[:3, :6], wanted.values[:, :6])
