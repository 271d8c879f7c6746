"""Causal softmax attention over a cache, three times: written out, torch's fused kernel, and flash-attn.

All take q (B,H,T,K), k (B,G,S,K) and v (B,G,S,V) with G key heads, each shared by H/G neighbouring query heads,
and S >= T: the keys end with those of the T queries, so that query i has index S-T+i. ``window`` w lets a query
see its own key and the w-1 before it. All return (B,H,T,V), scaled by K^-0.5.

The first two take two kinds of sinks. :class:`Sinks` are keys that stay visible behind the window. ``sink_logits``
(H,) are one more logit in each head's softmax, which has no value: w_s = exp(l_s) / (exp(sink_h) + sum_s' exp(l_s')).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mixers.errors import UserError

# Queries per block of windowed attention: at least so many, so that short windows don't mean many small kernels.
MIN_BLOCK_TOKENS = 64
# Channels that a sink's logit adds to queries and keys: one would do, but the fused kernels like multiples of 8.
LOGIT_CHANNELS = 8
# Where a key stands that is behind every window.
BEFORE_ALL = -(2**62)


class Sinks(NamedTuple):
    """Keys that a query sees once its window has passed them.

    keys (B,G,n,K), values (B,G,n,V); index (B,n) or (1,n) int64, where they stand as counted from the first of the S
    keys, below 0 when before it; None: seen by all queries.
    """

    keys: Tensor
    values: Tensor
    index: Tensor | None


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


def _join_sinks(
    sinks: Sinks, k: Tensor, v: Tensor, allowed: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with the sinks before them, and which of these each query sees, (B or 1,1,T,n+S).

    A query sees a sink from the token on at which the window no longer holds it: never twice, never ahead of it.
    """
    n_queries, n_keys = allowed.shape[-2:]
    if sinks.index is None:
        seen = allowed.new_ones(1, 1, n_queries, sinks.keys.shape[2])
    else:
        query = torch.arange(n_keys - n_queries, n_keys, device=k.device)[:, None]
        seen = sinks.index[:, None, None, :] <= query - (window or 0)
    rows = torch.broadcast_shapes(seen.shape[:-1], allowed.shape[:-1])
    pairs = torch.cat([part.expand(*rows, part.shape[-1]) for part in (seen, allowed)], dim=-1)
    return torch.cat([sinks.keys, k], dim=2), torch.cat([sinks.values, v], dim=2), pairs


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    valid: Tensor | None,
    sinks: Sinks | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T K^-0.5 + mask) v with all T x S scores; half dtypes are normalised in float32."""
    allowed = allowed_pairs(q.shape[2], k.shape[2], window, valid, q.device)
    if sinks is not None:
        k, v, allowed = _join_sinks(sinks, k, v, allowed, window)
    n_shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(n_shared, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sink_logits is not None:
        column = sink_logits.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return weights.to(v.dtype) @ v


def attend_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    valid: Tensor | None,
    sinks: Sinks | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """The same by ``scaled_dot_product_attention``. With a window the work grows with T (w + n), not with T S."""
    n_queries, value_dim = q.shape[2], v.shape[3]
    scale = q.shape[-1] ** -0.5
    if sink_logits is not None:
        q, k, v, sinks = _logits_as_key(q, k, v, sinks, sink_logits)
    if window is None or n_queries <= max(window, MIN_BLOCK_TOKENS):
        return _sdpa(q, k, v, window, valid, sinks, scale)[..., :value_dim]
    return _in_blocks(q, k, v, window, valid, sinks, scale)[..., :value_dim]


def _in_blocks(
    q: Tensor, k: Tensor, v: Tensor, window: int, valid: Tensor | None, sinks: Sinks | None, scale: float
) -> Tensor:
    """Blocks of queries, each with the keys that it can see: the first, all that follow in one call, and the rest.

    Every slice of k and v costs its backward a gradient of their full length, so there are three at most.
    """
    block = max(window, MIN_BLOCK_TOKENS)
    n_queries, n_before = q.shape[2], k.shape[2] - q.shape[2]
    n_blocks = n_queries // block - 1
    stop = (n_blocks + 1) * block
    first, middle, rest = q.split([block, stop - block, n_queries - stop], dim=2)

    def seen_by(queries: Tensor, start: int) -> tuple[Any, ...]:
        """What ``queries``, the first of which has index ``start``, attend to, and how."""
        here = slice(max(0, n_before + start - (window - 1)), n_before + start + queries.shape[2])
        behind = sinks
        if sinks is not None and sinks.index is not None:
            behind = sinks._replace(index=sinks.index - here.start)
        return k[:, :, here], v[:, :, here], window, None if valid is None else valid[:, here], behind, scale

    parts = [_sdpa(first, *seen_by(first, 0))]
    if n_blocks:
        parts.append(_equal_blocks(n_blocks, middle, *seen_by(middle, block)))
    if stop < n_queries:
        parts.append(_sdpa(rest, *seen_by(rest, stop)))
    # As the kernels lay it out, by token: who joins the heads then need not copy.
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def _equal_blocks(
    n_blocks: int, q: Tensor, k: Tensor, v: Tensor, window: int, valid: Tensor | None, sinks: Sinks | None, scale: float
) -> Tensor:
    """``n_blocks`` equal blocks of queries as sequences of one call; the window-1 keys before the first are given."""
    block = q.shape[2] // n_blocks
    if valid is not None:
        valid = _Windows.apply(valid[:, None, :, None], block, n_blocks)[:, 0, :, 0]
    if sinks is not None:
        keys, values, index = sinks
        if index is not None:
            starts = torch.arange(0, n_blocks * block, block, device=q.device)
            index = (index[:, None] - starts[:, None]).expand(q.shape[0], -1, -1).flatten(0, 1)
        sinks = Sinks(keys.repeat_interleave(n_blocks, dim=0), values.repeat_interleave(n_blocks, dim=0), index)
    queries = q.unflatten(2, (n_blocks, block)).transpose(1, 2).flatten(0, 1)
    near_k, near_v = (_Windows.apply(x, block, n_blocks) for x in (k, v))
    out = _sdpa(queries, near_k, near_v, window, valid, sinks, scale)
    return out.unflatten(0, (q.shape[0], n_blocks)).transpose(1, 2).flatten(2, 3)


class _Windows(torch.autograd.Function):
    """x (B,G,p + n block,K) -> (B*n,G,p + block,K): each block after the p < block entries before it.

    A view for one sequence. Its backward is written out, as torch's for overlapping views adds entry by entry.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int, n_blocks: int) -> Tensor:
        ctx.sizes = x.shape, block, n_blocks
        n_past = x.shape[2] - n_blocks * block
        return x.unfold(2, n_past + block, block).permute(0, 2, 1, 4, 3).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_windows: Tensor) -> tuple[Tensor, None, None]:
        shape, block, n_blocks = ctx.sizes
        n_past, n_own = shape[2] - n_blocks * block, n_blocks * block
        d_past, d_own = d_windows.unflatten(0, (shape[0], n_blocks)).transpose(1, 2).split([n_past, block], dim=3)
        d_x = d_windows.new_empty(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
        d_x[:, :, :n_past] = 0
        d_x[:, :, n_past:].unflatten(2, (n_blocks, block)).copy_(d_own)
        d_x[:, :, :n_own].unflatten(2, (n_blocks, block))[:, :, :, :n_past] += d_past
        return d_x, None, None


def _logits_as_key(
    q: Tensor, k: Tensor, v: Tensor, sinks: Sinks | None, sink_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Sinks]:
    """Sink logits for a kernel that knows keys only: one more key, of value zero, that every query sees.

    It is the unit vector of a new channel, in which all other keys are zero and every query holds sink_h K^0.5: its
    scaled product is sink_h. The logit sits in the queries because key heads may be shared. As the log of the sum of
    exponentials that the kernels keep has no gradient, dividing it out afterwards would train no sink.
    """
    n_sequences, n_key_heads, _, key_dim = k.shape
    width = key_dim + LOGIT_CHANNELS
    logits = (sink_logits * key_dim**0.5).to(q.dtype)[:, None, None].expand(*q.shape[:3], 1)
    q = functional.pad(torch.cat([q, logits], dim=-1), (0, LOGIT_CHANNELS - 1))
    unit = functional.one_hot(torch.tensor(key_dim, device=k.device), width).to(k.dtype)
    key = unit.expand(n_sequences, n_key_heads, 1, width)
    value = torch.zeros_like(key)
    k, v = (functional.pad(x, (0, width - x.shape[-1])) for x in (k, v))
    if sinks is None:
        return q, k, v, Sinks(key, value, None)
    assert sinks.index is not None
    index = functional.pad(sinks.index, (1, 0), value=BEFORE_ALL)
    keys, values = (functional.pad(x, (0, width - x.shape[-1])) for x in (sinks.keys, sinks.values))
    return q, k, v, Sinks(torch.cat([key, keys], dim=2), torch.cat([value, values], dim=2), index)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, valid: Tensor | None, sinks: Sinks | None, scale: float
) -> Tensor:
    n_queries, n_keys = q.shape[2], k.shape[2]
    options = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    whole = valid is None and (window is None or n_keys <= window) and (sinks is None or sinks.index is None)
    if whole and n_queries in (1, n_keys):
        n_before = 0
        if sinks is not None:
            n_before = sinks.keys.shape[2]
            k, v = torch.cat([sinks.keys, k], dim=2), torch.cat([sinks.values, v], dim=2)
        if n_queries == 1:  # one more token sees the whole cache
            return functional.scaled_dot_product_attention(q, k, v, **options)
        if n_before:  # a query of zeros for each sink keeps the causal triangle: it can then go without a mask
            q = functional.pad(q, (0, 0, n_before, 0))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, **options)[:, :, n_before:]
    allowed = allowed_pairs(n_queries, n_keys, window, valid, q.device)
    if sinks is not None:
        k, v, allowed = _join_sinks(sinks, k, v, allowed, window)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, **options)


def attend_flash(q: Tensor, k: Tensor, v: Tensor, window: int | None, valid: Tensor | None, place: str) -> Tensor:
    """The same by the flash-attn package: CUDA, float16 or bfloat16, no padding, no sinks.

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
