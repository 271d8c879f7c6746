"""Differences on shared seeds, and how often all of them together may err."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from analysis.stats.intervals import t_quantile


class PairedT(NamedTuple):
    """Arrays of one shape: ``n`` pairs, their mean difference, its interval and the two-sided p-value; NaN: unknown."""

    n: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray


def paired_t(differences: np.ndarray, confidence: float = 0.95) -> PairedT:
    """Paired Student-t over the last axis of ``differences`` (...,S), one entry per seed, NaN where it has no pair.

    t = mean / (s / sqrt(n)) with n - 1 degrees of freedom. Exact when the differences are normal. Fewer than two
    pairs: no interval and no p. Differences that are the same on every seed have no spread to judge by: p is 1 when
    they are all 0, else NaN.
    """
    from scipy.special import stdtr

    present = np.isfinite(differences)
    n = present.sum(-1)
    filled = np.where(present, differences, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = filled.sum(-1) / np.where(n > 0, n, np.nan)
        squares = np.where(present, (filled - mean[..., None]) ** 2, 0.0).sum(-1)
        error = np.sqrt(squares / np.where(n > 1, n - 1, np.nan) / n)
        # the spread of equal numbers is not always exactly zero in floating point
        flat = error <= 1e-12 * np.maximum(np.abs(mean), 1e-300)
        p = 2 * stdtr(np.maximum(n - 1, 1), -np.abs(mean) / error)
    p = np.where(flat, np.where(np.abs(mean) == 0, 1.0, np.nan), p)
    sizes = range(2, int(n.max(initial=0)) + 1)
    quantiles = np.array([np.nan, np.nan, *(t_quantile(0.5 + confidence / 2, size - 1) for size in sizes)])
    half = np.where(flat, 0.0, error) * quantiles[np.minimum(n, len(quantiles) - 1)]
    return PairedT(n, mean, mean - half, mean + half, np.where(n > 1, p, np.nan))


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values (m,) adjusted for the number of comparisons, m, whatever their dependence (Holm 1979).

    Calling a difference real where the adjusted p is at most a errs in one comparison or more with probability at
    most a. With p_(1) <= ... <= p_(m): adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)). A NaN counts
    as one of the m and stays NaN.
    """
    known = np.where(np.isnan(p_values), 1.0, p_values)
    order = np.argsort(known, kind="stable")
    factors = len(known) - np.arange(len(known))
    adjusted = np.empty_like(known, dtype=float)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * known[order]))
    return np.where(np.isnan(p_values), np.nan, adjusted)
