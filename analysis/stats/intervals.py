"""Means over seeds and how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` seeds and its confidence interval; ``low`` and ``high`` are None with a single seed."""

    mean: float
    low: float | None
    high: float | None
    n: int


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Mean and two-sided Student-t interval over independent seeds.

    mean +- t(1 - (1 - confidence)/2, n - 1) * s / sqrt(n), with s the sample standard deviation (divisor n - 1).
    No values: None. One value: a mean without interval, since one seed says nothing about spread.

    Exact for normal values. The interval is not clipped to the range of the metric: that of an accuracy may reach
    above 1 when few seeds disagree, and hiding it would hide how little they say.

    Raises ValueError for a value that is not finite: leave those out with :func:`split_missing`, which counts them.
    """
    if any(value is None or not math.isfinite(value) for value in values):
        raise ValueError(f"a mean needs finite values, got {list(values)!r}")
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(0.5 + confidence / 2, n - 1) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


@cache
def t_quantile(probability: float, n_free: int) -> float:
    """Quantile of Student's t with ``n_free`` degrees of freedom."""
    # scipy.stats would do, but takes half a second to import
    from scipy.special import stdtrit

    return float(stdtrit(n_free, probability))


def split_missing(values: Iterable[float | None]) -> tuple[list[float], int]:
    """The finite values, and how many were None, NaN or infinite."""
    values = list(values)
    present = [float(value) for value in values if value is not None and math.isfinite(value)]
    return present, len(values) - len(present)
