"""The chain of the keys with lists longer than a tile, against dense sums in float64."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    pytest.skip("needs a CUDA GPU or triton's interpreter", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("score", ["idw", "dot"])
def test_long_lists(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixers.kernels import key_chain
    from mixers.kernels.key_step import ENTROPY_EPS, StepTiles
    from mixers.product_keys import IDW_EPS

    # Tiles smaller than what they are used for: several lists, queries and accesses one after the other.
    monkeypatch.setattr(key_chain, "step_tiles", lambda *sizes: StepTiles(3, 4, 2, 4, 2, 2, 2, 2, 32))
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
    key_chain.key_chain(q, keys, indices, measures, probabilities, mean, totals, n_chunk, score, lr, weight)

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
