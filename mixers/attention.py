"""Causal softmax attention over a cache, three times: written out, torch's fused kernel, and flash-attn.

All take q (B,H,T,K), k (B,G,S,K) and v (B,G,S,V) with G key heads, each shared by H/G neighbouring query heads,
and S >= T: the keys end with those of the T queries, so that query i has index S-T+i. ``window`` w lets a query
see its own key and the w-1 before it. All return (B,H,T,V), scaled by K^-0.5.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mixers.errors import UserError

# Queries per block of windowed attention: at least so many, so that short windows don't mean many small kernels.
MIN_BLOCK_TOKENS = 64


def allowed_pairs(
    n_queries: int, n_keys: int, window: int | None, valid: Tensor | None, device: torch.device
) -> Tensor:
    """Which key each query sees: bool (T,S), or (B,1,T,S) with ``valid`` (B,S), False at padding.

    A query always sees its own key, so that a padded one has something to attend to and stays finite.
    """
    query = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    key = torch.arange(n_keys, device=device)
    allowed = key <= query
    if window is not None:
        allowed = allowed & (key > query - window)
    if valid is not None:
        allowed = allowed & valid[:, None, None, :] | (key == query)
    return allowed


def attend_reference(q: Tensor, k: Tensor, v: Tensor, window: int | None, valid: Tensor | None) -> Tensor:
    """softmax(q k^T K^-0.5 + mask) v with all T x S scores; half dtypes are normalised in float32."""
    n_shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(n_shared, dim=1) for x in (k, v))
    allowed = allowed_pairs(q.shape[2], k.shape[2], window, valid, q.device)
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    return weights.to(v.dtype) @ v


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, window: int | None, valid: Tensor | None) -> Tensor:
    """The same by ``scaled_dot_product_attention``. With a window the work grows with T w, not with T S."""
    n_queries, n_keys = q.shape[2], k.shape[2]
    block = n_queries if window is None else max(window, MIN_BLOCK_TOKENS)
    if n_queries <= block:
        return _sdpa(q, k, v, window, valid)
    assert window is not None
    parts = []
    for start in range(0, n_queries, block):
        stop = min(start + block, n_queries)
        last = n_keys - n_queries + stop
        first = max(0, last - (stop - start) - (window - 1))
        seen = None if valid is None else valid[:, first:last]
        parts.append(_sdpa(q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last], window, seen))
    return torch.cat(parts, dim=2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, window: int | None, valid: Tensor | None) -> Tensor:
    n_queries, n_keys = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    whole = valid is None and (window is None or n_keys <= window)
    if whole and n_queries == n_keys:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if whole and n_queries == 1:  # one more token sees the whole cache
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    allowed = allowed_pairs(n_queries, n_keys, window, valid, q.device)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=grouped)


def attend_flash(q: Tensor, k: Tensor, v: Tensor, window: int | None, valid: Tensor | None, place: str) -> Tensor:
    """The same by the flash-attn package: CUDA, float16 or bfloat16, no padding.

    Raises:
        UserError: the tensors are elsewhere or of another dtype, or there is padding.
    """
    if q.device.type != "cuda":
        raise UserError(
            f"{place}: impl='flash_attn' runs on cuda only and the layer is on {q.device.type}; "
            "move it there, or use impl='sdpa'"
        )
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise UserError(
            f"{place}: impl='flash_attn' takes float16 and bfloat16 only, got {q.dtype}; "
            "train with precision='bf16', or use impl='sdpa'"
        )
    if valid is not None:
        raise UserError(f"{place}: impl='flash_attn' takes no padding mask; use impl='sdpa'")
    from flash_attn import flash_attn_func

    past = -1 if window is None else window - 1
    y = flash_attn_func(
        *(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=q.shape[-1] ** -0.5, causal=True, window_size=(past, 0)
    )
    return y.transpose(1, 2)
