"""The gated delta rule, twice: token by token as it is defined, and by chunks as it is trained.

    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,    y_t = S_t^T q_t,    a_t = exp(g_t), g_t <= 0

Shapes: q, k (B,T,H,K), v (B,T,H,V), write strengths b (B,T,H) in [0,2], log decays g (B,T,H) <= 0, the state S
(B,H,K,V), mask (B,T) bool. The paper writes S transposed, (V,K). Keys should have length one (at most), or the
state may grow without bound. Padded tokens write nothing and forget nothing; their y is what the state answers.

Both compute in float32, or float64 for float64 inputs, whatever autocast says: rounding errors of the state
stay in it.

Source: Yang, Kautz, Hatamizadeh, Gated Delta Networks, arXiv:2412.06464; the chunked form from Yang et al.,
arXiv:2406.06484. There the triangular system is solved for K + V columns of all chunks before the states are known;
ours solves it chunk after chunk, once the state is known, for the V columns of the writes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixers.chunk_decays import chunk_decays
from mixers.chunking import chunk_plan, join_chunks, split_chunks

# Widest key that fla's chunk kernels take.
FLA_MAX_KEY_DIM = 256


class DeltaRuleOutput(NamedTuple):
    """y (B,T,H,V) and the state after the last token (B,H,K,V), both at least float32."""

    y: Tensor
    state: Tensor


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    chunk_size: int,
    impl: str,
) -> DeltaRuleOutput:
    """The rule by ``impl``, ``reference`` or ``fla``: a single token by the definition, several by chunks."""
    if impl == "fla" and q.shape[1] > 0:
        return _fla(q, k, v, *masked_gates(beta, log_decay, mask), state)
    if q.shape[1] == 1:
        return gated_delta_rule_recurrent(q, k, v, beta, log_decay, state, mask)
    return gated_delta_rule_chunked(q, k, v, beta, log_decay, state, mask, chunk_size=chunk_size)


def unsupported_by_fla(dtype: torch.dtype, key_dim: int) -> str:
    """Why fla has no kernel for weights of this dtype and keys of this width; empty: it has one."""
    if dtype == torch.float64:
        return "float64"
    if key_dim > FLA_MAX_KEY_DIM:
        return f"keys of width {key_dim} (at most {FLA_MAX_KEY_DIM})"
    return ""


def gated_delta_rule_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
) -> DeltaRuleOutput:
    """One token after the other: the definition, and the way to decode. Work of a token: three K x V products."""
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, beta, log_decay, state = _prepared(q, k, v, beta, log_decay, state, mask)
        ys = []
        for t in range(q.shape[1]):
            key = k[:, t, :, None, :]  # (B,H,1,K)
            state = log_decay[:, t, :, None, None].exp() * state
            error = v[:, t, :, None, :] - key @ state
            state = state + key.transpose(-1, -2) @ (beta[:, t, :, None, None] * error)
            ys.append((q[:, t, :, None, :] @ state).squeeze(-2))
        y = torch.stack(ys, dim=1) if ys else torch.zeros_like(v)
    return DeltaRuleOutput(y, state)


def gated_delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    chunk_size: int = 64,
) -> DeltaRuleOutput:
    """Chunks of C tokens: the same numbers, from products of matrices.

    Let G_t be the sum of g over the chunk up to t, and S the state at its start. Token t writes u_t, what its value
    lacks: S_t = e^{G_t} S + sum_{s<=t} e^{G_t - G_s} k_s u_s^T. Put into the rule, that is a triangular system
    (I + L) U = b (V - e^G K S) with L_ts = b_t e^{G_t - G_s} k_t.k_s for s < t. Then
    Y = e^G Q S + M U with M_ts = e^{G_t - G_s} q_t.k_s for s <= t, and S' = e^{G_C} S + sum_s e^{G_C - G_s} k_s u_s^T.

    Every exponent is a sum of some g, so at most 0: nothing overflows, and a strong decay becomes a clean zero.
    """
    n_tokens = q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, beta, log_decay, state = _prepared(q, k, v, beta, log_decay, state, mask)
        if n_tokens == 0:
            return DeltaRuleOutput(v, state)
        plan = chunk_plan(n_tokens, chunk_size)
        q, k, v, beta, log_decay = (split_chunks(x, *plan) for x in (q, k, v, beta, log_decay))  # (B,H,n,C,...)
        beta = beta.unsqueeze(-1)

        decay, since_start, to_end = chunk_decays(log_decay)
        keys = k.transpose(-1, -2)
        system = (beta * decay * (k @ keys)).tril(-1)  # L; the solver takes its diagonal as ones
        chunks = (
            since_start * q,
            since_start * k,
            (to_end * k).transpose(-1, -2),
            v,
            beta,
            system,
            decay * (q @ keys),
            since_start[..., -1:, :],
        )
        ys = []
        # unbind, not indices: the gradient of n slices would be n tensors as large as the whole.
        for q_n, k_n, to_end_n, v_n, beta_n, system_n, readout_n, whole_n in zip(
            *(x.unbind(2) for x in chunks), strict=True
        ):
            writes = beta_n * (v_n - k_n @ state)
            writes = torch.linalg.solve_triangular(system_n, writes, upper=False, unitriangular=True)
            ys.append(q_n @ state + readout_n @ writes)
            state = whole_n * state + to_end_n @ writes
        y = join_chunks(torch.stack(ys, dim=2), n_tokens)
    return DeltaRuleOutput(y, state)


def masked_gates(beta: Tensor, log_decay: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """No write and no decay at padded tokens."""
    if mask is None:
        return beta, log_decay
    padding = ~mask.unsqueeze(-1)
    return beta.masked_fill(padding, 0), log_decay.masked_fill(padding, 0)


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(q.dtype, torch.float32)
    beta, log_decay = masked_gates(beta, log_decay, mask)
    q, k, v, beta, log_decay = (x.to(wide) for x in (q, k, v, beta, log_decay))
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[2], k.shape[-1], v.shape[-1])
    return q, k, v, beta, log_decay, state.to(wide)


def _fla(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor | None) -> DeltaRuleOutput:
    """The same on CUDA; the kernels keep the state in float32."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    # The recurrent kernel has no backward: it serves decoding only.
    decoding = q.shape[1] == 1 and not torch.is_grad_enabled()
    kernel = fused_recurrent_gated_delta_rule if decoding else chunk_gated_delta_rule
    y, new_state = kernel(
        q=q,
        k=k,
        v=v,
        g=log_decay,
        beta=beta.to(v.dtype),
        scale=1.0,
        initial_state=state,
        output_final_state=True,
    )
    return DeltaRuleOutput(y, new_state)
