"""Rows of float32 as two float16 parts and a power of two: products on tensor cores with float32's accuracy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def unit_of(largest):
    """Power of two u of rows whose largest magnitude is given, and 1/u: largest / u is in [2^14, 2^15); float64: 1."""
    if largest.dtype.primitive_bitwidth == 64:
        unit = tl.full(largest.shape, 1.0, dtype=largest.dtype)
        return unit, unit
    else:
        # Of a float32 x, bits >> 23 is 127 + floor(log2 x). The bounds keep both powers normal, and one the inverse.
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
        exponent = tl.minimum(tl.maximum(exponent, 15), 254)
        unit = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
        return unit, ((268 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def write_parts(x, row, exists, parts, units, n_rows, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Write the parts of rows x (rows, columns >= WIDTH, zero where there is none): x = u (high + low).

    parts (PARTS, n_rows, WIDTH): high and low, float16, which hold 22 bits of the row's larger elements and all that
    is above 2^-38 of its largest; or, as one part, x itself. units (n_rows,): u, see :func:`unit_of`.
    """
    d = tl.arange(0, x.shape[1])
    unit, inverse = unit_of(tl.max(tl.abs(x), axis=1))
    scaled = x * inverse[:, None]
    high = scaled.to(parts.dtype.element_ty)
    at = row.to(tl.int64)[:, None] * WIDTH + d[None, :]
    inside = exists[:, None] & (d < WIDTH)[None, :]
    tl.store(parts + at, high, inside)
    if PARTS == 2:
        low = (scaled - high.to(x.dtype)).to(parts.dtype.element_ty)
        tl.store(parts + n_rows.to(tl.int64) * WIDTH + at, low, inside)
    tl.store(units + row, unit, exists)


@triton.jit
def products(a_high, a_low, b_high, b_low, total, PARTS: tl.constexpr):
    """total + a b of two matrices in parts (the low ones are not used if there is one part each).

    Three products of float16, each exact and summed in float32; low times low is left out: 2^-22 of |a| |b|.
    """
    total = tl.dot(a_high, b_high, total, out_dtype=total.dtype)
    if PARTS == 2:
        total = tl.dot(a_high, b_low, total, out_dtype=total.dtype)
        total = tl.dot(a_low, b_high, total, out_dtype=total.dtype)
    return total


def part_type(dtype: torch.dtype) -> tuple[torch.dtype, int]:
    """Element type of the parts of ``dtype`` and how many they are."""
    return (torch.float16, 2) if dtype == torch.float32 else (dtype, 1)


def part_width(half_dim: int) -> int:
    """Columns of parts: whole steps of the products, and 16-byte loads."""
    return triton.cdiv(half_dim, 32) * 32


def new_parts(like: Tensor, n_rows: int, half_dim: int) -> tuple[Tensor, Tensor]:
    """Room for the parts (PARTS,n_rows,width) of that many rows and their units (n_rows,)."""
    dtype, n_parts = part_type(like.dtype)
    return like.new_empty(n_parts, n_rows, part_width(half_dim), dtype=dtype), like.new_empty(n_rows)
