"""The replicates of a sweep as tables of seeds by arms: what paired statistics work on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from analysis.runs import RunRow
from sweeps.saved import SavedSweep


@dataclass(frozen=True)
class SeedTable:
    """The replicates of one cell: ``rows[s][a]`` is that of seed ``seeds[s]`` and arm ``arms[a]``, or None."""

    cell: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: tuple[tuple[RunRow | None, ...], ...]

    def values(self, name: str) -> np.ndarray:
        """A metric or cost (S,A) of the finished runs, NaN elsewhere."""
        return np.array([[_number(row, name) for row in of_seed] for of_seed in self.rows], dtype=float).reshape(
            len(self.seeds), len(self.arms)
        )

    def data(self) -> np.ndarray:
        """A number (S,A) for each different data hash of a seed, -1 where it is not known."""
        numbers = [{"": -1} for _ in self.seeds]
        return np.array(
            [
                [known.setdefault(row.data_hash if row else "", len(known)) for row in of_seed]
                for known, of_seed in zip(numbers, self.rows, strict=True)
            ],
            dtype=int,
        ).reshape(len(self.seeds), len(self.arms))


def seed_tables(saved: SavedSweep, replicates: Iterable[RunRow]) -> list[SeedTable]:
    """One table per cell of the plan. Seeds are those of the plan and any others that occur in the cell."""
    found: dict[str, dict[tuple[int, str], RunRow]] = {cell: {} for cell in saved.cells}
    for row in replicates:
        if row.cell in found:
            found[row.cell][row.seed, row.arm] = row
    tables = []
    for cell, rows in found.items():
        seeds = tuple(dict.fromkeys([*saved.seeds, *sorted(seed for seed, _ in rows)]))
        arms = tuple(saved.arms)
        tables.append(SeedTable(cell, arms, seeds, tuple(tuple(rows.get((s, a)) for a in arms) for s in seeds)))
    return tables


def _number(row: RunRow | None, name: str) -> float:
    if row is None or row.outcome != "finished":
        return np.nan
    value = row.cost.get(name.removeprefix("cost/")) if name.startswith("cost/") else row.metrics.get(name)
    return np.nan if value is None else value
