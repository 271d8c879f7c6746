"""How the numbers of a report were made, in words, and what to type to make them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from analysis.axes import axis
from analysis.findings import Findings
from analysis.runs import RunRow, replicates
from analysis.stats.bootstrap import FEWEST_SEEDS
from analysis.stats.tolerance import TOLERANCE
from analysis.toml_text import toml_text
from sweeps.saved import SavedSweep


def method(
    saved: SavedSweep, rows: Sequence[RunRow], found: Findings, environment: dict[str, Any] | None = None
) -> dict[str, Any]:
    """``sections`` (title, text), ``commands`` to repeat it, ``sweep_file`` (TOML that alone defines the sweep, ""
    where it was not kept) and ``environment`` (git state, versions, devices of the runs)."""
    return {
        "sections": [
            {"title": title, "text": text}
            for title, text in (
                ("Data and splits", _data(saved, rows)),
                ("Budget and tuning", _tuning(saved, found)),
                ("Seeds and exclusions", _seeds(saved, rows, found)),
                ("Statistics", _statistics(saved, found)),
            )
        ],
        "commands": _commands(saved, found),
        "sweep_file": toml_text(saved.definition) if saved.definition else "",
        "environment": environment or {},
    }


def _data(saved: SavedSweep, rows: Sequence[RunRow]) -> str:
    hashes = {row.data_hash for row in replicates(rows) if row.data_hash}
    return (
        "Every run trains on the train split. Settings are chosen, and training is stopped early, on the select split "
        f"alone ({saved.metric['select']}). The report split is read once, at the end of each replicate "
        f"({saved.metric['report']}). All arms of a cell see the same data in the same order for the same seed; "
        f"{len(hashes)} different data sets are recorded, and only seeds whose data agree are paired."
    )


def _tuning(saved: SavedSweep, found: Findings) -> str:
    limits = [
        f"{saved.budget[name]:,} {words}"
        for name, words in (("max_tokens", "training tokens"), ("max_steps", "training steps"))
        if saved.budget.get(name)
    ]
    text = f"Every run may spend {' and '.join(limits) or 'the same budget'} at most. "
    if not found.tuning:
        return text + "Nothing was tuned."
    n_trials = found.tuning[0].n_planned
    spaces = "; ".join(f"{name} in {_space(space)}" for name, space in saved.tune.items())
    text += f"For each arm and cell {n_trials} tuning trials{f' ({spaces})' if spaces else ''} were planned, "
    text += "on a seed of their own; the best by the select metric is run again with every seed. "
    text += (
        "All arms and cells had the same number of trials and the same budget."
        if found.equal_tuning
        else ("TUNING WAS NOT EQUAL: " + "; ".join(found.tuning_faults) + ".")
    )
    if found.edges:
        text += (
            f" In {len(found.edges)} of {len(found.tuning)} arm-cells the best setting is the smallest or largest "
            "tried, so better ones may lie outside the searched range."
        )
    return text


def _space(space: dict[str, Any]) -> str:
    kind, values = next(iter(space.items()))
    words = {"log_uniform": ", log scale", "uniform": "", "int_uniform": ", whole numbers", "choice": ""}
    return f"[{', '.join(str(value) for value in values)}]{words.get(kind, '')}"


def _seeds(saved: SavedSweep, rows: Sequence[RunRow], found: Findings) -> str:
    n_planned = len(saved.arms) * len(saved.cells) * len(saved.seeds)
    finished = sum(row.outcome == "finished" for row in replicates(rows))
    left_out = Counter(each.outcome for each in found.exclusions if each.role == "replicate")
    text = f"{len(saved.seeds)} seeds per arm and cell: {n_planned} replicates planned, {finished} finished"
    if left_out:
        text += f"; in no mean: {', '.join(f'{n} {outcome}' for outcome, n in left_out.items())}, all listed"
    tuning = Counter(each.outcome for each in found.exclusions if each.role == "tuning")
    if tuning:
        text += f". Tuning trials without a value: {', '.join(f'{n} {outcome}' for outcome, n in tuning.items())}"
    return text + ". Runs that diverged are results: a mean over the survivors flatters an arm."


def _statistics(saved: SavedSweep, found: Findings) -> str:
    m = len(found.paired)
    y = axis(found.y, saved.metric).label
    return (
        "Means over seeds with 95 % Student-t intervals (exact for normal values; with 3 seeds on skewed ones they "
        f"cover some 85 %). From {FEWEST_SEEDS} seeds on a studentised bootstrap interval stands beside them; with "
        f"fewer the bootstrap has no valid one. Arms are compared by paired t-tests of {y} on shared seeds and data; "
        f"p-values are adjusted by Holm's method for all {m} comparisons. The probability of being on the Pareto "
        "front comes from a multiplier bootstrap over seeds, the same for all arms. Learning-rate ranges hold the "
        f"select metric within {100 * TOLERANCE:.0f} % of its best. docs/statistics.md has the formulas and limits."
    )


def _commands(saved: SavedSweep, found: Findings) -> list[str]:
    source = f"{saved.name}.toml" if saved.definition else saved.name
    options = f" --x {found.x} --y {found.y}" + (f" --baseline {_quoted(found.baseline)}" if found.baseline else "")
    return [
        f"mixlab sweep run {source}",
        f"mixlab compare {saved.name}{options} --html report.html --figures figures",
    ]


def _quoted(name: str) -> str:
    import shlex

    return shlex.quote(name)
