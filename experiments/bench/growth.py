"""How a cost grows with T: the exponent of a power law, fitted to what was measured, with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; those beyond take the last, which is wider.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


class Growth(NamedTuple):
    """cost ~ T^exponent over ``n_points`` values of T; 95 % interval, or None where two points leave nothing over.

    ``last``: the slope between the two largest T alone. A cost a + b T has an exponent below 1 that rises with T, and
    the interval, which takes the points to scatter around one power law, is wide then.
    """

    exponent: float
    low: float | None
    high: float | None
    last: float
    n_points: int


def growth(costs: Mapping[int, float]) -> Growth | None:
    """Least squares of log cost on log T, with a Student-t interval; None for fewer than two positive costs."""
    points = sorted((math.log(n_tokens), math.log(cost)) for n_tokens, cost in costs.items() if n_tokens > 0 < cost)
    if len(points) < 2:
        return None
    n = len(points)
    mean_x, mean_y = (sum(point[axis] for point in points) / n for axis in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    (x0, y0), (x1, y1) = points[-2:]
    last = (y1 - y0) / (x1 - x0)
    if n == 2:
        return Growth(slope, None, None, last, n)
    residuals = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    half = T_975[min(n - 3, len(T_975) - 1)] * math.sqrt(residuals / (n - 2) / spread)
    return Growth(slope, slope - half, slope + half, last, n)
