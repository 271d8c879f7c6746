"""Rotary position embedding, and its YaRN extension to longer contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

YARN_BETA_FAST = 32.0  # turns within the original length from which on a frequency is left alone
YARN_BETA_SLOW = 1.0  # turns up to which a frequency is divided by the whole factor


def rope_frequencies(
    head_dim: int, base: float, yarn_factor: float | None, yarn_original_length: int | None, device: torch.device
) -> Tensor:
    """Angle per token of every pair, (K/2,) float64: base^(-2i/K), changed as YaRN says where a factor s is given.

    YaRN, "NTK by parts": a pair that turns r = L theta / (2 pi) times within the original length L keeps theta
    when r > 32, gets theta / s when r < 1, and in between a mixture that is linear in r.
    """
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    theta = base ** (-pair / head_dim)
    if yarn_factor is None:
        return theta
    assert yarn_original_length is not None
    n_turns = yarn_original_length * theta / (2 * math.pi)
    kept = ((n_turns - YARN_BETA_SLOW) / (YARN_BETA_FAST - YARN_BETA_SLOW)).clamp(0, 1)
    return theta * (kept + (1 - kept) / yarn_factor)


def rope_tables(
    positions: Tensor,
    head_dim: int,
    *,
    base: float,
    yarn_factor: float | None = None,
    yarn_original_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T,K/2) in float64 for integer ``positions`` (T,).

    The angles are taken in float64: in float32 the position 10^6 would be off by 0.06 radians. With YaRN both
    tables carry the factor 0.1 ln(s) + 1, so that the logits get its square, the paper's attention temperature.

    Source: Su et al., RoFormer, arXiv:2104.09864; Peng et al., YaRN, arXiv:2309.00071.
    """
    theta = rope_frequencies(head_dim, base, yarn_factor, yarn_original_length, positions.device)
    angle = positions.to(torch.float64)[:, None] * theta
    factor = 1.0 if yarn_factor is None else 0.1 * math.log(yarn_factor) + 1.0
    return angle.cos() * factor, angle.sin() * factor


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (x_i, x_{i+K/2}) of ``x`` (B,T,H,K) by their position's angles.

    Pairs are halves apart, not neighbours as in the paper: the same up to a fixed permutation of the columns of
    the projections. Half dtypes are rotated in float32.
    """
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.to(wide)[:, None, :] for table in tables)
    inner = x.to(wide)
    # (a, b) -> (a cos - b sin, b cos + a sin) in two products over all of K: 3x faster on CPU than by halves.
    swapped = inner.roll(half, dims=-1)
    return (inner * torch.cat([cos, cos], -1) + swapped * torch.cat([-sin, sin], -1)).to(x.dtype)
