"""Decays between the tokens of a chunk, one for each head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ChunkDecays(NamedTuple):
    """between (...,C,C), from token s to token t, zero for s > t; since_start (...,C,1) and to_end (...,C,1)."""

    between: Tensor
    since_start: Tensor
    to_end: Tensor


def chunk_decays(log_decay: Tensor) -> ChunkDecays:
    """between_ts = e^{G_t - G_s}, since_start_t = e^{G_t}, to_end_t = e^{G_C - G_t}, with G_t the sum of
    ``log_decay`` (...,C) up to t. Every exponent is a sum of some log decays: at most 0 if they are."""
    # Summed in float64: after one strong decay, differences of float32 sums would lose the mild ones.
    total = log_decay.double().cumsum(-1)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(log_decay.dtype)
    later = torch.ones(between.shape[-2:], dtype=torch.bool, device=between.device).triu(1)
    since_start = total.to(log_decay.dtype).exp().unsqueeze(-1)
    to_end = (total[..., -1:] - total).to(log_decay.dtype).exp().unsqueeze(-1)
    return ChunkDecays(between.masked_fill(later, float("-inf")).exp(), since_start, to_end)
