"""What the tuning of every arm and cell found, how sensitive the arm is to it, and whether all had the same chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.axes import axis, sign
from analysis.comparison import Comparison
from analysis.runs import RunRow
from analysis.stats.tolerance import tolerated
from sweeps.saved import SavedSweep

# Fewer different values of a setting say nothing about the width of the range around the best.
FEWEST_FOR_WIDTH = 3
# What each training may spend; a comparison is of arms that may spend the same.
BUDGETS = ("train.max_steps", "train.max_tokens", "train.batch_size")


@dataclass(frozen=True)
class Sensitivity:
    """One tuned number of an arm-cell. ``low`` to ``high``: where the select metric stays within 5 % of the best;
    ``ratio`` is high / low. None where fewer than three values were tried, or several settings were tuned at once.

    open_low, open_high: the range reaches the end of what was tried, so it is at least this wide. edge: the best
    trial is the ``low``est or ``high``est of the ``n_values`` tried, and better settings may lie beyond.
    """

    setting: str
    best: float
    low: float | None
    high: float | None
    ratio: float | None
    open_low: bool
    open_high: bool
    edge: str
    n_values: int


@dataclass(frozen=True)
class Tuning:
    """The tuning trials of an arm-cell: ``n_planned``, how they ended, and the settings the replicates were run with.

    ``chosen_is_best`` is False when some replicate uses other settings than the best trial by the select metric.
    """

    arm: str
    cell: str
    n_planned: int
    n_finished: int
    ended: dict[str, int]
    best: float | None
    chosen: dict[str, Any]
    chosen_is_best: bool | None
    sensitivity: tuple[Sensitivity, ...]


def tunings(saved: SavedSweep, replicates: Iterable[RunRow], lines: Sequence[Comparison]) -> tuple[Tuning, ...]:
    """One for every arm and cell of the plan; none when the sweep tunes nothing."""
    rows: dict[tuple[str, str], list[RunRow]] = {}
    for row in replicates:
        rows.setdefault((row.arm, row.cell), []).append(row)
    planned = _planned(saved, lines)
    if not planned:
        return ()
    return tuple(_tuning(saved, line, planned, rows.get((line.arm, line.cell), [])) for line in lines)


def _planned(saved: SavedSweep, lines: Sequence[Comparison]) -> int:
    return saved.budget.get("tune_trials") or max((len(line.trials) for line in lines), default=0)


def _tuning(saved: SavedSweep, line: Comparison, n_planned: int, rows: list[RunRow]) -> Tuning:
    ended = Counter(trial.outcome for trial in line.trials)
    if n_planned > len(line.trials):
        ended["missing"] = n_planned - len(line.trials)
    better = sign(axis(saved.metric["select"], saved.metric))
    won = [trial for trial in line.trials if trial.outcome == "finished" and trial.value is not None]
    best = max(won, key=lambda trial: better * trial.value) if won else None
    names = list(line.trials[0].settings) if line.trials else list(saved.tune)
    used = [{name: row.settings.get(name) for name in names} for row in rows]
    chosen = saved.chosen.get(f"{line.arm} | {line.cell}", {}).get("settings") or (used[0] if used else {})
    tops = [trial.settings for trial in won if trial.value == best.value] if best else []
    # a search with objectives or constraints chooses by more than the select metric
    plain = not any(choice.get("front") for choice in saved.chosen.values())
    return Tuning(
        arm=line.arm,
        cell=line.cell,
        n_planned=n_planned,
        n_finished=ended["finished"],
        ended=dict(ended),
        best=best.value if best else None,
        chosen=chosen,
        chosen_is_best=all(settings in tops for settings in used) if used and tops and plain else None,
        sensitivity=tuple(found for name in names if (found := _sensitivity(saved, line, name, better, len(names)))),
    )


def is_log(saved: SavedSweep, setting: str, values: Sequence[float]) -> bool:
    """Whether a setting is searched on a log scale; one that spans a factor of 8 or more is taken to be."""
    if setting in saved.tune:
        return bool(saved.tune[setting].get("log_uniform")) or (
            bool(saved.tune[setting].get("choice")) and _wide(values)
        )
    return _wide(values)


def _wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= 8


def _sensitivity(saved: SavedSweep, line: Comparison, name: str, better: int, n_settings: int) -> Sensitivity | None:
    tried = [(trial.settings.get(name), trial) for trial in line.trials if trial.outcome not in ("pruned", "killed")]
    if not tried or not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value, _ in tried):
        return None
    at = [float(value) for value, _ in tried]
    if len(set(at)) < 2:
        return None
    values = [trial.value if trial.outcome == "finished" else None for _, trial in tried]
    found = tolerated(at, values, sign=better, log=is_log(saved, name, at))
    if found is None:
        return None
    wide = n_settings == 1 and len(set(at)) >= FEWEST_FOR_WIDTH
    return Sensitivity(
        setting=name,
        best=found.best,
        low=found.low if wide else None,
        high=found.high if wide else None,
        ratio=found.high / found.low if wide and found.low > 0 else None,
        open_low=found.low_open,
        open_high=found.high_open,
        edge=found.edge,
        n_values=len(set(at)),
    )


def equal_tuning(saved: SavedSweep, rows: Sequence[RunRow], found: Sequence[Tuning]) -> tuple[bool, tuple[str, ...]]:
    """Whether every arm and cell had the same chance, and one line for each way in which it had not."""
    faults = []
    budgets: dict[str, set[tuple[Any, ...]]] = {}
    for row in rows:
        budgets.setdefault(row.cell, set()).add(tuple(row.settings.get(name) for name in BUDGETS))
    for cell, seen in budgets.items():
        differing = [
            name for name, values in zip(BUDGETS, zip(*seen, strict=True), strict=True) if len(set(values)) > 1
        ]
        if differing:
            faults.append(f"{cell}: runs differ in {', '.join(differing)}")
    for tuning in found:
        tried = tuning.n_planned - tuning.ended.get("missing", 0)
        where = f"{tuning.arm}, {tuning.cell}"
        if tried < tuning.n_planned:
            faults.append(f"{where}: {tried} of {tuning.n_planned} tuning trials run")
        lost = [f"{n} {how}" for how, n in tuning.ended.items() if how in ("failed", "killed", "unfinished")]
        if lost:
            faults.append(f"{where}: {', '.join(lost)} of {tuning.n_planned} tuning trials, for no fault of the arm's")
        if tuning.chosen_is_best is False:
            faults.append(f"{where}: replicates do not use the trial that is best by {saved.metric['select']}")
    return not faults, tuple(faults)


def edge_notes(found: Sequence[Tuning]) -> tuple[str, ...]:
    """One line for each optimum at the end of what was searched. Of two values one always is: that says nothing."""
    return tuple(
        f"{tuning.arm}, {tuning.cell}: best {each.setting.rpartition('.')[2]} {each.best:.3g} is the "
        f"{each.edge}est tried"
        for tuning in found
        for each in tuning.sensitivity
        if each.edge and each.n_values >= FEWEST_FOR_WIDTH
    )


def too_few_values(found: Sequence[Tuning]) -> tuple[str, ...]:
    """The tuned settings of which so few values were tried that no optimum can be seen."""
    few = {each.setting for tuning in found for each in tuning.sensitivity if each.n_values < FEWEST_FOR_WIDTH}
    return tuple(sorted(few))
