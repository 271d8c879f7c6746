"""All accesses of a call in the order (chunk, memory, slot), so that a slot's accesses lie side by side."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Accesses e = token * J + j, E = M*R*T*J of them, stably sorted by chunk, then memory and slot.

    order (E,) int64: the access at each position. row (E,) int64: its row m*N + slot of the table. first (E,) int64:
    the position where its group (same chunk, memory and slot) starts; the group is written by the program of that
    position. count (E,) int64: accesses in its group. Chunk c fills the positions c*M*R*C*J and on.
    """

    order: Tensor
    row: Tensor
    first: Tensor
    count: Tensor


def group_accesses(slots: Tensor, n_slots: int, chunk_size: int) -> Groups:
    """Group slots (M,R,T,J) int64 by one stable sort and two binary searches; no host synchronisation.

    Bytes: 4 radix passes over 12 E (codes below 2^31) or 8 over 16 E.
    """
    assert slots.numel() < 2**31, "accesses are counted in 32 bits"
    n_memories, _, n_tokens, _ = slots.shape
    n_rows = n_memories * n_slots
    device = slots.device
    chunk = torch.arange(n_tokens, device=device).div(chunk_size, rounding_mode="floor") * n_rows
    memory = torch.arange(n_memories, device=device) * n_slots
    codes = slots + memory.view(-1, 1, 1, 1) + chunk.view(1, 1, -1, 1)
    n_codes = -(-n_tokens // chunk_size) * n_rows
    codes, order = torch.sort(codes.flatten().to(torch.int32 if n_codes < 2**31 else torch.int64), stable=True)
    first = torch.searchsorted(codes, codes)
    count = torch.searchsorted(codes, codes, right=True) - first
    return Groups(order, codes.long() % n_rows, first, count)
