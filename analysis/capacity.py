"""How many pairs each arm recalls: accuracy over difficulty, thresholds of it, and bits for every byte of state."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.comparison import Comparison
from analysis.runs import RunRow
from analysis.stats import Interval, interval
from analysis.stats.thresholds import Crossing, crossing, least_bits, recalled_bits
from sweeps.saved import SavedSweep

LOAD = "task.n_pairs"
METRIC = "report/accuracy"
THRESHOLDS = (0.9, 0.99)
# accuracy of one segment of a mixture of lengths
_SEGMENT = re.compile(r"report/accuracy/T(?P<T>\d+)_P(?P<P>\d+)")


@dataclass(frozen=True)
class Point:
    """Accuracy with ``n_pairs`` pairs over seeds, and what it amounts to; None where it is not known.

    bits: values known, if a pair is either known or guessed. bits_at_least: Fano's bound. Both of the mean accuracy.
    bits_per_byte: ``bits`` over the state's bytes; None for a state of none.
    """

    n_pairs: int
    accuracy: Interval | None
    n_diverged: int
    bits: float | None
    bits_at_least: float | None
    state_bytes: float | None
    bits_per_byte: float | None


@dataclass(frozen=True)
class Threshold:
    """The largest number of pairs recalled at ``accuracy``: geometric mean over ``n`` seeds, 95 % Student-t of its log.

    n_above seeds still passed at the largest number tested and n_below failed at the smallest: both are counted at
    that bound, so ``pairs`` is too low or too high, and there is no interval. n_unknown: a run is missing.
    """

    accuracy: float
    pairs: float | None
    low: float | None
    high: float | None
    n: int
    n_above: int
    n_below: int
    n_unknown: int


@dataclass(frozen=True)
class Capacity:
    """One arm over the numbers of pairs. ``group`` names the other varied settings, "" without any.

    trained: True where each number of pairs is a training of its own (a varied setting), False where one training is
    evaluated on several (a mixture; its lengths grow along with the pairs).
    """

    arm: str
    group: str
    trained: bool
    points: tuple[Point, ...]
    thresholds: tuple[Threshold, ...]


def capacities(saved: SavedSweep, replicates: Sequence[RunRow], lines: Sequence[Comparison]) -> tuple[Capacity, ...]:
    """Of sweeps over associative recall with two numbers of pairs or more; else empty."""
    rows: dict[tuple[str, str], list[RunRow]] = {}
    for row in replicates:
        if row.settings.get("task.name") == "mqar":
            rows.setdefault((row.arm, row.cell), []).append(row)
    if not rows:
        return ()
    return (*_trained(saved, rows, lines), *_evaluated(rows, lines))


def _trained(
    saved: SavedSweep, rows: dict[tuple[str, str], list[RunRow]], lines: Sequence[Comparison]
) -> Iterable[Capacity]:
    groups: dict[str, dict[int, str]] = {}
    for cell, factors in saved.cells.items():
        if isinstance(factors.get(LOAD), int):
            others = ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in factors.items() if name != LOAD)
            groups.setdefault(others, {})[factors[LOAD]] = cell
    by_cell = {(line.arm, line.cell): line for line in lines}
    for group, cells in groups.items():
        loads = sorted(cells)
        for arm in saved.arms if len(loads) > 1 else ():
            of_loads = [(load, rows.get((arm, cells[load]), []), by_cell[arm, cells[load]]) for load in loads]
            scores = _scores([(METRIC, found) for _, found, _ in of_loads], saved.seeds)
            points = [_point(load, METRIC, found, line) for load, found, line in of_loads]
            yield Capacity(arm, group, True, tuple(points), _thresholds(np.array(loads), scores))


def _evaluated(rows: dict[tuple[str, str], list[RunRow]], lines: Sequence[Comparison]) -> Iterable[Capacity]:
    for line in lines:
        found = rows.get((line.arm, line.cell), [])
        segments = sorted(
            (int(match["P"]), int(match["T"]), name) for name in line.metrics if (match := _SEGMENT.fullmatch(name))
        )
        loads = [load for load, _, _ in segments]
        if len(set(loads)) < 2 or len(set(loads)) < len(loads):
            continue
        seeds = sorted({row.seed for row in found})
        scores = _scores([(name, found) for _, _, name in segments], seeds)
        points = [_point(load, name, found, line) for load, _, name in segments]
        group = "" if line.cell == "all" else line.cell
        yield Capacity(line.arm, group, False, tuple(points), _thresholds(np.array(loads), scores))


def _scores(columns: Iterable[tuple[str, list[RunRow]]], seeds: Sequence[int]) -> np.ndarray:
    """Accuracy (S,L): -inf of a run that diverged, NaN of one that is missing or failed."""
    table = []
    for name, rows in columns:
        by_seed = {row.seed: row for row in rows}
        column = []
        for seed in seeds:
            row = by_seed.get(seed)
            value = row.metrics.get(name) if row is not None and row.outcome == "finished" else None
            diverged = row is not None and row.outcome == "diverged"
            column.append(-np.inf if diverged else np.nan if value is None else value)
        table.append(column)
    return np.array(table, dtype=float).reshape(-1, len(seeds)).T


def _point(load: int, name: str, rows: list[RunRow], line: Comparison) -> Point:
    found = line.metrics.get(name)
    sizes = {row.settings.get("task.vocab_size") for row in rows}
    vocab_size = sizes.pop() if len(sizes) == 1 else None
    bits = least = None
    if found is not None and isinstance(vocab_size, int) and vocab_size >= 4:
        n_values = vocab_size - vocab_size // 2
        bits, least = recalled_bits(found.mean, load, n_values), least_bits(found.mean, load, n_values)
    state_bytes = line.cost.get("state_bytes")
    return Point(
        n_pairs=load,
        accuracy=found,
        n_diverged=sum(row.outcome == "diverged" for row in rows),
        bits=bits,
        bits_at_least=least,
        state_bytes=state_bytes,
        bits_per_byte=bits / state_bytes if bits is not None and state_bytes else None,
    )


def _thresholds(loads: np.ndarray, scores: np.ndarray) -> tuple[Threshold, ...]:
    return tuple(_threshold(level, [crossing(loads, of_seed, level) for of_seed in scores]) for level in THRESHOLDS)


def _threshold(level: float, crossings: list[Crossing]) -> Threshold:
    known = [found.log2 for found in crossings if found.kind != "unknown"]
    counts = {kind: sum(found.kind == kind for found in crossings) for kind in ("above", "below", "unknown")}
    over = interval(known)
    bounded = over is not None and not counts["above"] and not counts["below"] and over.low is not None
    return Threshold(
        accuracy=level,
        pairs=2**over.mean if over else None,
        low=2**over.low if bounded else None,
        high=2**over.high if bounded else None,
        n=len(known),
        n_above=counts["above"],
        n_below=counts["below"],
        n_unknown=counts["unknown"],
    )
