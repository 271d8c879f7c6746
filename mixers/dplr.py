"""Diagonal plus low rank, twice: token by token as it is defined, and by chunks as it is trained.

    S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,    y_t = S_t^T q_t,    g_t <= 0

Shapes: q, a, b, k (B,T,H,K), v (B,T,H,V), log decays g (B,T,H,K) <= 0, one for each key channel, the state S
(B,H,K,V), mask (B,T) bool. a reads what the state held before the token's decay, b says where the answer is added.
Without k, b takes its place: S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1} + v_t^T), the delta rule's form, for
about half of the time. Padded tokens write nothing and forget nothing; their y is what the state answers.

Both compute in float32, or float64 for float64 inputs, whatever autocast says: rounding errors of the state
stay in it.

Source: the rule from Peng et al., RWKV-7, arXiv:2503.14456, and Kimi Linear, arXiv:2510.26692; triangular systems
for chunks from Yang et al., arXiv:2406.06484. The scores of a chunk are often taken as quotients of accumulated
decays, which then must be bounded; ours are merged from halves, without a quotient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixers.chunking import join_chunks, split_chunks
from mixers.masking import zero_padding


class DPLROutput(NamedTuple):
    """y (B,T,H,V) and the state after the last token (B,H,K,V), both at least float32."""

    y: Tensor
    state: Tensor


class ChunkScores(NamedTuple):
    """What a chunk of C tokens does, with R rows (readers) and S columns (writers) of width K.

    scores (...,R,C,S,C): r_t . (decays over s+1..t) c_s for s <= t, zero for s > t. rows (...,R,C,K): decayed over
    the chunk up to t. columns (...,S,C,K): decayed from s+1 to the chunk's end. whole (...,1,1,K): over the chunk.
    """

    scores: Tensor
    rows: Tensor
    columns: Tensor
    whole: Tensor


def dplr_recurrent(
    q: Tensor,
    a: Tensor,
    b: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    k: Tensor | None = None,
) -> DPLROutput:
    """One token after the other: the definition, and the way to decode. Work of a token: three K x V products, four
    with k."""
    with torch.autocast(q.device.type, enabled=False):
        q, a, b, v, log_decay, k, state = _prepared(q, a, b, v, log_decay, state, mask, k)
        ys = []
        for t in range(q.shape[1]):
            answer = a[:, t, :, None, :] @ state  # (B,H,1,V)
            value = v[:, t, :, None, :]
            state = log_decay[:, t, :, :, None].exp() * state
            if k is None:
                state = state + b[:, t, :, :, None] @ (answer + value)
            else:
                state = state + b[:, t, :, :, None] @ answer + k[:, t, :, :, None] @ value
            ys.append((q[:, t, :, None, :] @ state).squeeze(-2))
        y = torch.stack(ys, dim=1) if ys else torch.zeros_like(v)
    return DPLROutput(y, state)


def dplr_chunked(
    q: Tensor,
    a: Tensor,
    b: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    k: Tensor | None = None,
    chunk_size: int = 32,
) -> DPLROutput:
    """Chunks of C tokens, C the largest power of two in ``chunk_size``: the same numbers, from products of matrices.

    Let D_ts be the decays over s+1..t, S the state at the chunk's start, u_t = a_t^T S_{t-1} the answers. Unrolled,
    u_t = (D_{t-1,0} a_t)^T S + sum_{s<t} (a_t . D_{t-1,s} b_s) u_s + (a_t . D_{t-1,s} k_s) v_s, a triangular system
    (I - L) U = A S + N V. Then Y = Q S + M_b U + M_k V and S' = D_C S + B^T U + K^T V, each decayed to where it is
    read. Without k, W = U + V solves (I - L) W = A S + V and stands for both.
    """
    n_tokens = q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        q, a, b, v, log_decay, k, state = _prepared(q, a, b, v, log_decay, state, mask, k)
        if n_tokens == 0:
            return DPLROutput(v, state)
        length = _power_of_two(n_tokens, chunk_size)
        plan = -(-n_tokens // length), length
        q, a, b, v, log_decay = (split_chunks(x, *plan) for x in (q, a, b, v, log_decay))  # (B,H,n,C,...)
        columns = b.unsqueeze(3) if k is None else torch.stack([b, split_chunks(k, *plan)], dim=3)
        chunk = chunk_scores(q, a, columns, log_decay.exp())

        # unbind, here and below, not indices: the gradient of n slices would be n tensors as large as the whole.
        (read_b, *read_k), (answer_b, *answer_k) = (part.unbind(-2) for part in chunk.scores.unbind(3))
        rows_q, rows_a = chunk.rows.unbind(3)
        columns_b, *columns_k = chunk.columns.transpose(-1, -2).unbind(3)
        forced, direct, written = v, None, None
        if k is not None:
            forced, direct, written = answer_k[0] @ v, read_k[0] @ v, (columns_k[0] @ v).unbind(2)
        whole = chunk.whole.squeeze(-3).transpose(-1, -2)
        parts = (rows_q, rows_a, columns_b, -answer_b, read_b, forced, whole)
        ys = []
        per_chunk = zip(*(x.unbind(2) for x in parts), strict=True)
        for n, (q_n, a_n, b_n, system_n, read_n, forced_n, whole_n) in enumerate(per_chunk):
            writes = torch.linalg.solve_triangular(system_n, a_n @ state + forced_n, upper=False, unitriangular=True)
            ys.append(q_n @ state + read_n @ writes)
            state = whole_n * state + b_n @ writes
            if written is not None:
                state = state + written[n]
        y = torch.stack(ys, dim=2)
        y = join_chunks(y if direct is None else y + direct, n_tokens)
    return DPLROutput(y, state)


def chunk_scores(q: Tensor, a: Tensor, columns: Tensor, decay: Tensor) -> ChunkScores:
    """Decayed scores within chunks, R = 2 readers: q, that sees its own token and decay, and a, that sees neither.

    Shapes: q, a and decay, in [0,1], (B,H,n,C,K); columns (B,H,n,S,C,K); C a power of two.

    Blocks of m tokens are merged in pairs: scores of the second block's rows with the first one's columns are the
    product of the rows, decayed since the second block's start, with the columns, decayed to the first one's end.
    Then the second rows decay over the first block too, and the first columns over the second. All factors are
    decays, so at most 1: nothing overflows, nothing is divided by, and a strong decay becomes a clean zero.
    """
    # Blocks of one token: (B,H,n,C/m,R,m,K), (B,H,n,C/m,S,m,K), (B,H,n,C/m,1,1,K), (B,H,n,C/m,R,m,S,m).
    rows = torch.stack([decay * q, a], dim=-2).unsqueeze(-2)
    columns = columns.transpose(-2, -3).unsqueeze(-2)
    whole = decay[..., None, None, :]
    own = (q.unsqueeze(-2) * columns.squeeze(-2)).sum(-1)
    scores = torch.stack([own, torch.zeros_like(own)], dim=-2)[..., :, None, :, None]
    while rows.shape[3] > 1:
        (rows_1, rows_2), (columns_1, columns_2), (whole_1, whole_2), (scores_1, scores_2) = (
            x.unflatten(3, (-1, 2)).unbind(4) for x in (rows, columns, whole, scores)
        )
        across = rows_2.flatten(-3, -2) @ columns_1.flatten(-3, -2).transpose(-1, -2)
        across = across.unflatten(-1, columns_1.shape[-3:-1]).unflatten(-3, rows_2.shape[-3:-1])
        first = torch.cat([scores_1, torch.zeros_like(scores_1)], dim=-1)
        scores = torch.cat([first, torch.cat([across, scores_2], dim=-1)], dim=-3)
        rows = torch.cat([rows_1, whole_1 * rows_2], dim=-2)
        columns = torch.cat([whole_2 * columns_1, columns_2], dim=-2)
        whole = whole_1 * whole_2
    return ChunkScores(*(x.squeeze(3) for x in (scores, rows, columns, whole)))


def _power_of_two(n_tokens: int, chunk_size: int) -> int:
    """The largest power of two up to ``chunk_size``, or the smallest that holds all tokens if that is less."""
    return min(1 << (chunk_size.bit_length() - 1), 1 << (n_tokens - 1).bit_length())


def _prepared(
    q: Tensor,
    a: Tensor,
    b: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Wide dtypes, a state, and no write and no decay at padded tokens."""
    wide = torch.promote_types(q.dtype, torch.float32)
    b, log_decay = zero_padding(b, mask), zero_padding(log_decay, mask)
    k = None if k is None else zero_padding(k, mask).to(wide)
    q, a, b, v, log_decay = (x.to(wide) for x in (q, a, b, v, log_decay))
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[2], b.shape[-1], v.shape[-1])
    return q, a, b, v, log_decay, k, state.to(wide)
