"""Arms next to each other: one line per arm and cell, with what it reached, what it cost and who is on the front."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from analysis.axes import axis, sign
from analysis.pareto import pareto
from analysis.runs import RunRow, replicates
from analysis.stats import Interval, interval, split_missing
from experiments.errors import UserError, nearest
from experiments.records import finite
from sweeps.saved import SavedSweep

DEFAULT_X = "cost/state_bytes"
# Facts of the configuration: seeds of one arm and cell must agree on them.
_SIZES = ("state_bytes", "state_bytes_fixed", "state_bytes_per_token", "params", "flops_per_token")


@dataclass(frozen=True)
class Trial:
    """A tuning trial: its tuned ``settings``, how it ended, and the select metric that it reached (or had reached)."""

    trial: int | None
    key: str
    settings: dict[str, Any]
    outcome: str
    reason: str
    value: float | None


@dataclass(frozen=True)
class Comparison:
    """One arm in one cell over its seeds (replicates only; tuning trials never count, all are listed in ``trials``).

    ``n_seeds`` finished of ``n_planned``; ``metrics`` over the finished seeds; ``cost`` is the mean over the
    finished seeds, or over the others that measured it where none finished. ``notes`` say what is missing or odd.
    ``pareto``: no other arm of the cell is as good on both axes and better on one.
    """

    arm: str
    cell: str
    factors: dict[str, Any]
    pattern: str
    n_seeds: int
    n_planned: int
    n_diverged: int
    n_failed: int
    metrics: dict[str, Interval]
    cost: dict[str, float]
    pareto: bool
    notes: tuple[str, ...]
    trials: tuple[Trial, ...] = ()

    def value(self, name: str) -> float | None:
        """The mean of ``report/...``, ``select/...`` or ``cost/...``; None where there is none."""
        if name.startswith("cost/"):
            return self.cost.get(name.removeprefix("cost/"))
        found = self.metrics.get(name)
        return found.mean if found else None


def compare(saved: SavedSweep, rows: Iterable[RunRow], x: str = DEFAULT_X, y: str | None = None) -> list[Comparison]:
    """One :class:`Comparison` for every arm and cell of the plan, in its order (arms, within them cells).

    The Pareto set is taken within each cell over ``x`` and ``y`` (default: the sweep's report metric), in the
    direction that is better for each. An arm without a finished seed is never in it.
    """
    y = y or saved.metric["report"]
    rows = list(rows)
    groups: dict[tuple[str, str], list[RunRow]] = {}
    for row in replicates(rows):
        groups.setdefault((row.arm, row.cell), []).append(row)
    lines = [_line(saved, arm, cell, groups.get((arm, cell), [])) for arm in saved.arms for cell in saved.cells]
    x_sign, y_sign = sign(axis(x, saved.metric)), sign(axis(y, saved.metric))
    marked: dict[tuple[str, str], bool] = {}
    by_cell: dict[str, list[Comparison]] = {cell: [] for cell in saved.cells}
    for line in lines:
        by_cell[line.cell].append(line)
    for cell, here in by_cell.items():
        points = [(line.value(x), line.value(y)) if line.n_seeds else (None, None) for line in here]
        best = pareto(points, x_sign=x_sign, y_sign=y_sign)
        marked.update({(line.arm, cell): on_front for line, on_front in zip(here, best, strict=True)})
    unequal = _unequal_data(groups)
    trials = _trials(saved, rows)
    return [
        replace(
            line,
            pareto=marked[line.arm, line.cell],
            notes=line.notes + unequal.get(line.cell, ()),
            trials=trials.get((line.arm, line.cell), ()),
        )
        for line in lines
    ]


def _unequal_data(groups: dict[tuple[str, str], list[RunRow]]) -> dict[str, tuple[str, ...]]:
    """Notes by cell on seeds for which its arms were not trained on the same data in the same order."""
    notes: dict[str, tuple[str, ...]] = {}
    for name, words in (("data_hash", "other data"), ("order_hash", "another order of the data")):
        hashes: dict[str, dict[int, set[str]]] = {}
        for (_, cell), rows in groups.items():
            for row in rows:
                hashes.setdefault(cell, {}).setdefault(row.seed, set()).update({getattr(row, name)} - {""})
        for cell, of_seeds in hashes.items():
            if seeds := sorted(seed for seed, found in of_seeds.items() if len(found) > 1):
                told = f"arms of this cell saw {words} (seeds {', '.join(map(str, seeds))})"
                notes[cell] = (*notes.get(cell, ()), told)
    return notes


def _trials(saved: SavedSweep, rows: list[RunRow]) -> dict[tuple[str, str], tuple[Trial, ...]]:
    """All tuning trials by arm and cell. A plan read from MLflow does not say what was tuned: then what differs was."""
    groups: dict[tuple[str, str], list[RunRow]] = {}
    for row in rows:
        if row.role == "tuning":
            groups.setdefault((row.arm, row.cell), []).append(row)
    numbers = {run.key: run.trial for run in saved.runs}
    return {name: _trials_of(saved, tuned, numbers) for name, tuned in groups.items()}


def _trials_of(saved: SavedSweep, tuned: list[RunRow], numbers: dict[str, int | None]) -> tuple[Trial, ...]:
    names = list(saved.tune) or _differing(tuned)
    return tuple(
        Trial(
            trial=numbers.get(row.key),
            key=row.key,
            settings={name: row.settings.get(name) for name in names},
            outcome=row.outcome,
            reason=row.reason,
            value=row.metrics.get(saved.metric["select"]),
        )
        for row in tuned
    )


def _differing(rows: list[RunRow]) -> list[str]:
    first = rows[0].settings
    return sorted({name for row in rows for name, value in row.settings.items() if value != first.get(name)})


def _line(saved: SavedSweep, arm: str, cell: str, rows: list[RunRow]) -> Comparison:
    finished = [row for row in rows if row.outcome == "finished"]
    n_planned = max(len(saved.seeds), len(rows))
    metrics, notes = _metrics(finished, saved.metric["report"])
    cost = _mean_costs(finished) or _mean_costs(rows)
    n_diverged = sum(row.outcome == "diverged" for row in rows)
    n_failed = sum(row.outcome == "failed" for row in rows)
    n_missing = n_planned - len(finished) - n_diverged - n_failed
    counts = [(n_diverged, "diverged"), (n_failed, "failed"), (n_missing, "missing")]
    notes = [f"{word} {n}/{n_planned}" for n, word in counts if n] + notes
    differing = [
        name for name in _SIZES if len({row.cost[name] for row in finished if row.cost.get(name) is not None}) > 1
    ]
    return Comparison(
        arm=arm,
        cell=cell,
        factors=saved.cells[cell],
        pattern=saved.arms[arm],
        n_seeds=len(finished),
        n_planned=n_planned,
        n_diverged=n_diverged,
        n_failed=n_failed,
        metrics=metrics,
        cost=cost,
        pareto=False,
        notes=tuple(notes + [f"{name} differs between seeds" for name in differing]),
    )


def _metrics(finished: list[RunRow], report: str) -> tuple[dict[str, Interval], list[str]]:
    """Intervals by name, and notes on the report metric and the others that some finished seeds lack."""
    metrics: dict[str, Interval] = {}
    n_missing: dict[str, int] = {}
    names = sorted({name for row in finished for name in row.metrics} | ({report} if finished else set()))
    for name in names:
        values, n_missing[name] = split_missing(row.metrics.get(name) for row in finished)
        found = interval(values)
        if found is not None:
            metrics[name] = found
    n_others = sum(n > 0 for name, n in n_missing.items() if name != report)
    notes = [f"{report} missing in {n_missing[report]}/{len(finished)}"] if n_missing.get(report) else []
    return metrics, notes + ([f"other metrics missing in some seeds: {n_others}"] if n_others else [])


def _mean_costs(rows: list[RunRow]) -> dict[str, float]:
    costs: dict[str, float] = {}
    for name in sorted({name for row in rows for name in row.cost}):
        values, _ = split_missing(row.cost.get(name) for row in rows)
        if values:
            costs[name] = sum(values) / len(values)
    return costs


def axis_names(saved: SavedSweep, comparisons: Iterable[Comparison]) -> list[str]:
    """Everything that can stand on an axis: costs, then report and select metrics; the sweep's own always."""
    comparisons = list(comparisons)
    costs = {f"cost/{name}" for line in comparisons for name in line.cost} | {DEFAULT_X}
    metrics = {name for line in comparisons for name in line.metrics} | {saved.metric["report"]}
    first = [DEFAULT_X, saved.metric["report"]]
    return sorted(costs, key=lambda name: (name not in first, name)) + sorted(
        metrics, key=lambda name: (name not in first, not name.startswith("report/"), name)
    )


def check_axis(option: str, name: str, saved: SavedSweep, comparisons: Iterable[Comparison]) -> None:
    """Raise UserError, naming ``option`` and near matches, unless the sweep has something called ``name``."""
    known = axis_names(saved, comparisons)
    if name not in known:
        raise UserError(f"{option} {name!r}: sweep {saved.name!r} has no such metric or cost{nearest(name, known)}")


def chance_accuracy(rows: Iterable[RunRow]) -> float | None:
    """Accuracy of guessing on associative recall: 2/vocab_size, as values come from one half of the vocabulary.

    None unless every run is of that task with one and the same vocabulary.
    """
    tasks = {(row.settings.get("task.name"), row.settings.get("task.vocab_size")) for row in rows}
    if len(tasks) != 1:
        return None
    name, vocab_size = tasks.pop()
    return 2 / vocab_size if name == "mqar" and isinstance(vocab_size, int) and vocab_size > 0 else None


def as_json(comparisons: Iterable[Comparison]) -> list[dict[str, Any]]:
    """Plain JSON values, one object per arm and cell; no NaN."""
    objects = []
    for line in comparisons:
        metrics = {
            name: {"mean": found.mean, "low": found.low, "high": found.high} for name, found in line.metrics.items()
        }
        trials = [vars(trial) for trial in line.trials]
        objects.append(finite({**vars(line), "metrics": metrics, "trials": trials}))
    return objects
