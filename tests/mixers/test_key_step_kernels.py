"""A chunk's use of the sub-keys and the step of the keys, in several parts, against dense sums in float64."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    pytest.skip("needs a CUDA GPU or triton's interpreter", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("heads", [1, 2])
def test_several_parts(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixers.kernels import key_step, use
    from mixers.kernels.chunk import Chunk

    monkeypatch.setattr(use, "QUERIES_PER_PART", 14)
    monkeypatch.setattr(use, "BLOCK_S", 8)
    generator = torch.Generator().manual_seed(heads)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

    n_rows, n_tokens, n_chunk, key_dim, n, k = 4, 12, 10, 6, 37, 3
    chunk, inside = Chunk(1, n_rows, n_tokens, 2, n_chunk), slice(2, 12)
    listed = (1, n_rows, n_tokens, heads, 2)
    q, keys = normal(1, n_rows, n_tokens, heads, key_dim), normal(1, heads, 2, n, key_dim // 2)
    order = torch.rand(*listed, n, generator=generator)
    # Sub-key 5 is listed by every query, so that one list takes several steps.
    order[..., 5] = -1
    indices = order.argsort(-1)[..., :k].int().contiguous().to(DEVICE)
    x, y = normal(*listed, k), normal(*listed, k)
    dense_x, dense_y = (
        q.new_zeros(*listed, n).scatter(-1, indices.long(), part)[:, :, inside] for part in (x, y)
    )  # fmt: skip

    mean = q.new_zeros(1, 2, n)
    found = use.uses(indices, mean, chunk.n_queries)
    assert len(found.partial) == 3
    for _ in range(2):  # the second call finds the counters as the first left them
        use.mean_use(indices, x, found, mean, chunk)
    want = dense_x.sum((1, 2, 3)) / (chunk.n_queries * heads)
    assert (mean - want).abs().max().item() <= 1e-12

    halves = q.view(1, n_rows, n_tokens, heads, 2, key_dim // 2)[:, :, inside]
    pull = torch.einsum("mrthbn,mrthbd->mhbnd", dense_x, halves)
    sums = dense_x.sum((1, 2)).unsqueeze(-1)
    base, moved = normal(*keys.shape), torch.empty_like(keys)
    for score in ("idw", "dot"):
        key_step.key_step_backward(q, keys, x, y, found, base, moved, chunk, score)
        want = base + pull
        if score == "idw":
            want = base * (1 + dense_y.sum((1, 2)).unsqueeze(-1)) + keys * sums - pull
        assert (moved - want).abs().max().item() <= 1e-12, score
