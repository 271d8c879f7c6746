"""How wide a range of a setting does nearly as well as the best one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# A trial is nearly as good when it loses at most this share of the best value.
TOLERANCE = 0.05


class Tolerated(NamedTuple):
    """The range around the best trial. ``low_open``/``high_open``: it reaches the end of what was tried, so it may go
    on beyond. ``edge``: which end of what was tried the best trial sits at, "" if inside."""

    best: float
    low: float
    high: float
    low_open: bool
    high_open: bool
    edge: str


def tolerated(
    settings: Sequence[float], values: Sequence[float | None], *, sign: int, log: bool, tolerance: float = TOLERANCE
) -> Tolerated | None:
    """The range of a setting, around its best trial, in which the value stays within ``tolerance`` of the best.

    The bound is best - sign * tolerance * |best|; ``sign`` +1 says that higher is better. Between a trial within and
    one outside, the value is taken as linear in the setting (its log where ``log``). None stands for a trial without
    a value (diverged, failed): it is outside, and nothing is interpolated towards it. The best is at an edge when
    every trial that reaches the best value is the smallest or the largest tried. None without any value.
    """
    place = math.log if log else float
    tried = sorted(zip(settings, values, strict=True), key=lambda point: point[0])
    at = [place(setting) for setting, _ in tried]
    scores = [None if value is None else sign * value for _, value in tried]
    known = [score for score in scores if score is not None]
    if not known:
        return None
    top = max(known)
    bound = top - tolerance * abs(top)
    tops = [i for i, score in enumerate(scores) if score == top]
    best = min(tops, key=lambda i: abs(i - (len(tried) - 1) / 2))

    def reach(step: int) -> tuple[float, bool]:
        i = best
        while 0 <= i + step < len(tried):
            here, there = scores[i], scores[i + step]
            assert here is not None
            if there is None:
                return at[i], False
            if there < bound:
                return at[i] + (here - bound) / (here - there) * (at[i + step] - at[i]), False
            i += step
        return at[i], True

    (low, low_open), (high, high_open) = reach(-1), reach(1)
    back = math.exp if log else float
    distinct = len(set(at)) > 1
    edge = ""
    if distinct and all(at[i] == at[0] for i in tops):
        edge = "low"
    elif distinct and all(at[i] == at[-1] for i in tops):
        edge = "high"
    return Tolerated(tried[best][0], back(low), back(high), low_open, high_open, edge)
