"""How likely each arm is on the Pareto front of its cell, given the spread of its seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.axes import axis, sign
from analysis.seeds import SeedTable
from analysis.stats.front import front_probability


def pareto_probabilities(
    tables: Sequence[SeedTable], metric: dict[str, str], x: str, y: str
) -> dict[tuple[str, str], float | None]:
    """(arm, cell) -> probability; None with fewer than two finished seeds, whose spread is unknown.

    Of the finished seeds only, as the means are: how often an arm diverges stands beside it, not in it.
    """
    signs = {"x_sign": sign(axis(x, metric)), "y_sign": sign(axis(y, metric))}
    return {
        (arm, table.cell): None if np.isnan(p) else round(float(p), 4)
        for table in tables
        for arm, p in zip(table.arms, front_probability(table.values(x), table.values(y), **signs), strict=True)
    }
