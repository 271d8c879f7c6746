"""Arms compared seed by seed: the same data and the same initial embedding, so that what seeds share cancels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.seeds import SeedTable
from analysis.stats.paired import holm, paired_t

# All pairs of arms are compared up to this many comparisons; beyond, every arm with the baseline only.
MOST_COMPARISONS = 3_000


@dataclass(frozen=True)
class PairedDifference:
    """``a`` minus ``b`` in a cell over the ``n`` seeds that both finished on the same data.

    low, high: 95 % Student-t, of this comparison alone. p: two-sided paired t-test; p_holm: adjusted for all
    comparisons of the table. None where it can't be known: fewer than two pairs, or the same difference on every
    seed. n_unfinished, n_other_data: seeds left out, as one of the two lacks the value, or as their data differ or
    are not known to agree.
    """

    cell: str
    a: str
    b: str
    n: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    n_unfinished: int
    n_other_data: int


def paired_differences(
    tables: Sequence[SeedTable], metric: str, baseline: str | None = None
) -> tuple[PairedDifference, ...]:
    """``metric`` compared between arms, in every cell, with Holm's correction over all of these comparisons.

    With a ``baseline`` (an arm) every other arm minus it; else all pairs, the later arm of the plan minus the earlier.
    Where that would be more than ``MOST_COMPARISONS``, the first arm is the baseline. Comparisons without a p count.
    """
    arms = tables[0].arms if tables else ()
    if baseline is None and len(tables) * len(arms) * (len(arms) - 1) // 2 > MOST_COMPARISONS:
        baseline = arms[0]
    if baseline is None:
        pairs = [(b, a) for a, b in itertools.combinations(range(len(arms)), 2)]
    else:
        pairs = [(a, arms.index(baseline)) for a in range(len(arms)) if arms[a] != baseline]
    if not pairs:
        return ()
    found = [difference for table in tables for difference in _of_cell(table, metric, pairs)]
    adjusted = holm(np.array([np.nan if each.p is None else each.p for each in found]))
    return tuple(replace(each, p_holm=_known(p)) for each, p in zip(found, adjusted, strict=True))


def _of_cell(table: SeedTable, metric: str, pairs: list[tuple[int, int]]) -> list[PairedDifference]:
    a, b = (list(side) for side in zip(*pairs, strict=True))
    values, data = table.values(metric), table.data()
    differences = values[:, a] - values[:, b]  # (S,P)
    finished = np.isfinite(differences)
    same = (data[:, a] == data[:, b]) & (data[:, a] >= 0)
    test = paired_t(np.where(same, differences, np.nan).T)
    n_other = (finished & ~same).sum(0)
    return [
        PairedDifference(
            cell=table.cell,
            a=table.arms[a[i]],
            b=table.arms[b[i]],
            n=int(test.n[i]),
            mean=_known(test.mean[i]),
            low=_known(test.low[i]),
            high=_known(test.high[i]),
            p=_known(test.p[i]),
            p_holm=None,
            n_unfinished=len(table.seeds) - int(test.n[i]) - int(n_other[i]),
            n_other_data=int(n_other[i]),
        )
        for i in range(len(pairs))
    ]


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
