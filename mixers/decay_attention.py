"""Linear attention whose memory decays, twice: token by token as it is defined, and by chunks as it is trained.

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T,    y_t = S_t^T q_t,    g_t <= 0

Shapes: q, k (B,T,H,K), v (B,T,H,V), the state S (B,H,K,V), mask (B,T) bool; finite log decays g: (B,T,H,K), one
for each key channel, (B,T,H), one for each head, or (H,), the same at all tokens. Padded tokens write nothing and
forget nothing; their y is what the state answers.

Everything is computed in float32, or float64 for float64 inputs, whatever autocast says: rounding errors of the
state stay in it.

Source: Sun et al., RetNet, arXiv:2307.08621 (fixed decays); Yang et al., GLA, arXiv:2312.06635 (a decay for each
channel); Dao and Gu, Mamba-2, arXiv:2405.21060 (a decay for each head). GLA cuts chunks once more and
treats the pieces on the diagonal element by element; ours halves chunks down to single tokens, in products of matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixers.chunk_decays import chunk_decays
from mixers.chunking import chunk_plan, join_chunks, split_chunks
from mixers.masking import zero_padding


class DecayAttentionOutput(NamedTuple):
    """y (B,T,H,V) and the state after the last token (B,H,K,V); both at least float32 from the readable path."""

    y: Tensor
    state: Tensor


def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    impl: str,
    chunk_size: int,
) -> DecayAttentionOutput:
    """The way that suits ``impl`` (``reference`` or ``fla``, resolved) and the number of tokens.

    Raises:
        UserError: the mask is not bool of shape (B,T).
    """
    if impl == "fla" and q.shape[1] > 0:
        return _fla(q, *_masked_writes(k, v, log_decay, mask), state)
    if q.shape[1] == 1:
        return decay_attention_recurrent(q, k, v, log_decay, state, mask)
    return decay_attention_chunked(q, k, v, log_decay, state, mask, chunk_size=chunk_size)


def why_not_fla(dtype: torch.dtype, key_dim: int, value_dim: int) -> str:
    """What fla's kernels lack for heads of these widths in this dtype; empty: nothing."""
    if dtype == torch.float64:
        return "float64"
    if key_dim % 2 or value_dim % 2:
        return f"odd widths of a head (keys of {key_dim}, values of {value_dim})"
    return ""


def decay_attention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
) -> DecayAttentionOutput:
    """One token after the other: the definition, and the way to decode. Work of a token: two K x V products."""
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, log_decay, state = _prepared(q, k, v, log_decay, state, mask)
        ys = []
        for t in range(q.shape[1]):
            write = k[:, t, :, :, None] @ v[:, t, :, None, :]
            state = log_decay[:, t, :, :, None].exp() * state + write
            ys.append((q[:, t, :, None, :] @ state).squeeze(-2))
        y = torch.stack(ys, dim=1) if ys else v
    return DecayAttentionOutput(y, state)


def decay_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    chunk_size: int = 32,
) -> DecayAttentionOutput:
    """Chunks of C tokens: the same numbers, from products of matrices.

    Let G_t be the sum of g over the chunk up to t, and S the state at its start. Then
    y_t = (e^{G_t} q_t)^T S + sum_{s<=t} (q_t^T e^{G_t - G_s} k_s) v_s and S' = e^{G_C} S + (e^{G_C - G} K)^T V.

    Every exponent is a sum of some g, so at most 0: nothing overflows, and a strong decay becomes a clean zero.
    """
    n_tokens = q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, log_decay, state = _prepared(q, k, v, log_decay, state, mask)
        if n_tokens == 0:
            return DecayAttentionOutput(v, state)
        by_head = log_decay.shape[-1] == 1
        n_chunks, length = chunk_plan(n_tokens, chunk_size)
        if not by_head:
            length = 1 << (length - 1).bit_length()  # chunks are halved down to single tokens
            n_chunks = -(-n_tokens // length)
        q, k, v, log_decay = (split_chunks(x, n_chunks, length) for x in (q, k, v, log_decay))  # (B,H,n,C,...)
        y, since_start, to_end = (_within_by_head if by_head else _within_by_channel)(q, k, v, log_decay)

        whole = since_start[..., -1, :].unsqueeze(-1)  # (B,H,n,K,1) or (B,H,n,1,1)
        writes = (to_end * k).transpose(-1, -2) @ v
        starts = []
        # unbind, not indices: the gradient of n slices would be n tensors as large as the whole.
        for whole_n, write_n in zip(whole.unbind(2), writes.unbind(2), strict=True):
            starts.append(state)
            state = whole_n * state + write_n
        y = y + (since_start * q) @ torch.stack(starts, dim=2)
    return DecayAttentionOutput(join_chunks(y, n_tokens), state)


def _masked_writes(k: Tensor, v: Tensor, log_decay: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """k, v and log decays with no write and no decay at padded tokens."""
    if mask is not None and log_decay.ndim == 1:
        log_decay = log_decay.expand(*k.shape[:2], -1)
    return zero_padding(k, mask), zero_padding(v, mask), zero_padding(log_decay, mask)


def _within_by_head(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What tokens (...,C,.) read from their own chunk, and the decays since its start and to its end (...,C,1).

    One decay for all channels is a factor of the scores: one masked product of C x C."""
    decays = chunk_decays(log_decay.squeeze(-1))
    return (decays.between * (q @ k.transpose(-1, -2))) @ v, decays.since_start, decays.to_end


def _within_by_channel(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a decay of each channel, (...,C,K); C is a power of two.

    Any s < t are parted by the middle of just one block in a chunk that is halved again and again. There the decay
    is the product of two with exponents at most 0: from s to the end of the first half, and from the start of the
    second half to t. So each level of halving is a product of matrices, from blocks of two tokens up to the chunk.
    Both sums grow with the blocks, without a difference: no strong decay costs the mild ones their precision.
    """
    y = (q * k).sum(-1, keepdim=True) * v
    since_start, to_end = log_decay, torch.zeros_like(log_decay)  # logs, within blocks of one token
    half = 1
    while half < q.shape[-2]:
        q_2, k_1, v_1 = _halves(q, half)[1], _halves(k, half)[0], _halves(v, half)[0]
        y_1, y_2 = _halves(y, half)
        since_1, since_2 = _halves(since_start, half)
        to_end_1, to_end_2 = _halves(to_end, half)
        scores = (since_2.exp() * q_2) @ (to_end_1.exp() * k_1).transpose(-1, -2)
        y = _joined(y_1, y_2 + scores @ v_1)
        since_start = _joined(since_1, since_1[..., -1:, :] + since_2)
        to_end = _joined(to_end_1 + since_2[..., -1:, :], to_end_2)
        half *= 2
    return y, since_start.exp(), to_end.exp()


def _halves(x: Tensor, half: int) -> tuple[Tensor, ...]:
    """(...,C,K) -> first and second halves of blocks of 2 ``half`` tokens, each (...,C/(2 half),half,K)."""
    return x.unflatten(-2, (-1, 2, half)).unbind(-3)


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """The inverse of :func:`_halves`."""
    return torch.stack([first, second], dim=-3).flatten(-4, -2)


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, ...]:
    """All at least float32, the log decays (B,T,H,1) or (B,T,H,K)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v, log_decay = _masked_writes(k, v, log_decay, mask)
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(*k.shape[:2], -1)
    if log_decay.ndim == 3:
        log_decay = log_decay.unsqueeze(-1)
    q, k, v, log_decay = (x.to(wide) for x in (q, k, v, log_decay))
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[2], k.shape[-1], v.shape[-1])
    return q, k, v, log_decay, state.to(wide)


def _fla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> DecayAttentionOutput:
    """The same on CUDA; the kernels keep the state in float32."""
    from fla.ops.gla import chunk_gla, fused_recurrent_gla
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    by_head = log_decay.ndim < 4
    if q.shape[1] == 1 and not torch.is_grad_enabled():
        kernel = fused_recurrent_simple_gla if by_head else fused_recurrent_gla
    else:
        kernel = chunk_simple_gla if by_head else chunk_gla
    # A decay that is the same at all tokens gets no gradient, and needs no kernel that computes one.
    decay_name = "g_gamma" if log_decay.ndim == 1 else "gk" if kernel is fused_recurrent_gla else "g"
    y, new_state = kernel(
        q=q.to(v.dtype),
        k=k.to(v.dtype),
        v=v,
        scale=1.0,
        initial_state=state,
        output_final_state=True,
        **{decay_name: log_decay},
    )
    return DecayAttentionOutput(y, new_state)
