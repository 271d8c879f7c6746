"""Which points no other point beats on both axes."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto(points: Sequence[tuple[float | None, float | None]], *, x_sign: int, y_sign: int) -> list[bool]:
    """Mark the Pareto set of ``points`` (x, y).

    A sign of +1 says that higher is better on that axis, -1 that lower is. A point is dominated when another is at
    least as good on both axes and better on one; equal points stand or fall together. A point with a coordinate
    that is None or not finite is never in the set and dominates nothing.
    """
    assert x_sign in (1, -1), x_sign
    assert y_sign in (1, -1), y_sign
    scored = [
        (x_sign * x, y_sign * y) if x is not None and y is not None and math.isfinite(x) and math.isfinite(y) else None
        for x, y in points
    ]
    present = [point for point in scored if point is not None]
    return [point is not None and not any(_dominates(other, point) for other in present) for point in scored]


def _dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] >= b[0] and a[1] >= b[1] and a != b
