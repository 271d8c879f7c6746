"""How much is recalled: the largest load that still passes a threshold, and the information in what is recalled."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

Kind = Literal["inside", "above", "below", "unknown"]


class Crossing(NamedTuple):
    """``log2`` of the load; ``above``: the largest tested load still passes; ``below``: the smallest fails."""

    log2: float
    kind: Kind


def crossing(loads: np.ndarray, scores: np.ndarray, threshold: float) -> Crossing:
    """Where the scores (L,) of one seed first fall below ``threshold``, over ascending ``loads`` (L,).

    Between the last load that passes and the first that fails the score is taken as linear in log2(load). A score of
    -inf stands for a run that diverged: it fails, and nothing is interpolated towards it. A NaN (a missing run)
    makes the answer unknown, unless the score has fallen before.
    """
    for i, score in enumerate(scores):
        if np.isnan(score):
            return Crossing(math.nan, "unknown")
        if score >= threshold:
            continue
        if i == 0:
            return Crossing(math.log2(loads[0]), "below")
        last, first = math.log2(loads[i - 1]), math.log2(loads[i])
        share = 0.0 if score == -math.inf else (scores[i - 1] - threshold) / (scores[i - 1] - score)
        return Crossing(last + float(share) * (first - last), "inside")
    return Crossing(math.log2(loads[-1]), "above")


def recalled_bits(accuracy: float, n_pairs: float, n_values: int) -> float:
    """Bits of ``n_pairs`` values out of ``n_values`` each that an accuracy stands for, if a pair is known or guessed.

    A share k of the pairs known and the others guessed gives accuracy = k + (1 - k) / M, so k = (accuracy - 1/M) /
    (1 - 1/M), and every known value is worth log2(M) bits: bits = k * n_pairs * log2(M). Below chance it is negative.
    """
    chance = 1 / n_values
    return (accuracy - chance) / (1 - chance) * n_pairs * math.log2(n_values)


def least_bits(accuracy: float, n_pairs: float, n_values: int) -> float:
    """The fewest bits with which such an accuracy can be reached, however the memory fails (Fano 1961).

    n_pairs * (log2 M - H(e) - e log2(M - 1)), with e = 1 - accuracy and H the binary entropy in bits; 0 at chance and
    below.
    """
    error = 1 - accuracy
    if accuracy <= 1 / n_values:
        return 0.0
    entropy = sum(-p * math.log2(p) for p in (error, accuracy) if p > 0)
    return n_pairs * max(0.0, math.log2(n_values) - entropy - error * math.log2(max(n_values - 1, 1)))
