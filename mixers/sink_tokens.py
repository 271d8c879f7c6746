"""The first real tokens of each sequence, kept beside a window: their keys, values and positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Position of a slot that no token has taken yet: in the far future, so that the causal rule hides it.
NOT_TAKEN = 2**62


class SinkTokens(NamedTuple):
    """keys (B,G,n,K), already rotated, and values (B,G,n,K) of n slots; position (B,n) int64 in the sequence, padding
    counted, ``NOT_TAKEN`` where the slot is empty."""

    keys: Tensor
    values: Tensor
    position: Tensor


def no_sink_tokens(
    batch_size: int, n_key_heads: int, n_slots: int, key_dim: int, *, device: torch.device | str, dtype: torch.dtype
) -> SinkTokens:
    """Empty slots: before the first token."""
    keys = torch.zeros(batch_size, n_key_heads, n_slots, key_dim, device=device, dtype=dtype)
    position = torch.full((batch_size, n_slots), NOT_TAKEN, dtype=torch.int64, device=device)
    return SinkTokens(keys, keys.clone(), position)


def fill_sink_tokens(sinks: SinkTokens, k: Tensor, v: Tensor, mask: Tensor | None, position: Tensor) -> SinkTokens:
    """The slots after a call's tokens k, v (B,G,T,K), the first of them at ``position``: each real token takes the next
    free slot, as long as there is one. Sequences may start at different tokens: ``mask`` (B,T) bool, or None.
    """
    n_sequences, n_key_heads, n_tokens, key_dim = k.shape
    if n_tokens == 0:
        return sinks
    real = k.new_ones(n_sequences, n_tokens, dtype=torch.bool) if mask is None else mask
    n_taken = (sinks.position != NOT_TAKEN).sum(1, keepdim=True)
    slot_of_token = n_taken + real.cumsum(1) - 1
    slot = torch.arange(sinks.position.shape[1], device=k.device)[:, None]
    takes = real[:, None] & (slot_of_token[:, None] == slot)  # (B,n,T), at most one token per slot
    is_new, token = takes.any(-1), takes.int().argmax(-1)
    rows = token[:, None, :, None].expand(-1, n_key_heads, -1, key_dim)
    keys, values = (
        torch.where(is_new[:, None, :, None], new.gather(2, rows), old.to(new.dtype))
        for new, old in ((k, sinks.keys), (v, sinks.values))
    )
    return SinkTokens(keys, values, torch.where(is_new, position + token, sinks.position))
