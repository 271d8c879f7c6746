"""A kernel for tests: the best columns of four rows, of which the last is not there."""

from __future__ import annotations

import triton
import triton.language as tl

from mixers.kernels.select import choose_best_of_parts, from_order, order_in_parts


@triton.jit
def best_of_rows(x, found, best, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, COUNT: tl.constexpr):
    row = tl.arange(0, 4)
    order = order_in_parts(x, row, row < 3, COLUMNS, WIDTH, PARTS)
    column = tl.arange(0, WIDTH)[:, None] + (tl.arange(0, PARTS) * WIDTH)[None, :]
    highest, index = choose_best_of_parts(order, column, COUNT)
    at = row[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(found + at, from_order(highest))
    tl.store(best + at, index)
