"""What our pages ask for, as plain JSON values, from a store as one user may see it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from analysis.axes import axis
from analysis.comparison import DEFAULT_X, as_json, check_axis, compare
from analysis.dashboard.overview import sweep_overview
from analysis.dashboard.records import Plans, bench_results, contract_result, results_version
from analysis.dashboard.store import StoredExperiment, StoredRun, VisibleStore
from analysis.findings import Findings, findings
from analysis.findings import as_json as findings_json
from analysis.method import method
from analysis.patterns import mixer_names
from analysis.payload import payload
from analysis.runs import RunRow, find_experiment, replicates, rows_from_mlflow_runs, sweep_experiments
from experiments.errors import UserError
from experiments.records import finite
from sweeps.saved import SavedSweep

# tags that say who a run is, or that the page shows anyway
_NOT_FILTERS = {"key", "sweep", "arm", "cell", "factors", "role", "seed", "pattern", "reason", "mirrored"}
_STATISTICS = ("paired", "pareto_probability", "bootstrap", "capacity", "tuning", "exclusions")
_MAX_TAG_VALUES = 30
_MAX_TOLD_VALUES = 5


class Views:
    """The values of our pages. ``runs`` is the folder of the records, for plans, contract results and benchmarks."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._plans = Plans(runs)
        self._rows: dict[str, tuple[Hashable, SavedSweep, list[RunRow]]] = {}

    def state(self, store: VisibleStore, sweeps: Iterable[StoredExperiment]) -> Hashable:
        """What changes whenever an answer about these sweeps may."""
        return tuple((e.experiment_id, store.version(e.experiment_id), self._plans.version(e.name)) for e in sweeps)

    def results_state(self) -> Hashable:
        """What changes whenever an answer about a mixer may, beside its sweeps."""
        return results_version(self._runs)

    def overview(self, store: VisibleStore) -> list[dict[str, Any]]:
        """All sweeps, newest first."""
        return [
            finite(sweep_overview(entry, store.runs(entry.experiment_id), self._plans.get(entry.name)))
            for entry in sweep_experiments(store)
        ]

    def comparison(self, store: VisibleStore, sweep: str, x: str, y: str, tags: list[str]) -> dict[str, Any]:
        """One sweep: what `mixlab compare --json` prints, and how to show it; see :func:`analysis.payload.payload`.

        Instead of the runs there is for every comparison in which settings its runs differ (``told``). ``tags``
        (``name=value``) leave only runs that have one of the values of every name. Raises UserError.
        """
        entry = find_experiment(store, sweep)
        saved, all_rows = self._sweep(store, entry)
        rows = _with_tags(store, entry, all_rows, tags)
        x, y = x or DEFAULT_X, y or saved.metric["report"]
        lines = compare(saved, rows, x, y)
        check_axis("x", x, saved, lines)
        check_axis("y", y, saved, lines)
        values = payload(saved, rows, lines, _nothing_found(x, y), experiment_id=entry.experiment_id)
        for name in ("runs", "method", "shared_settings", *_STATISTICS):
            del values[name]
        told = _told(rows, values["told_settings"])
        for line in values["comparisons"]:
            del line["trials"]
            line["told"] = told.get((line["arm"], line["cell"]), {})
        counts = sweep_overview(entry, store.runs(entry.experiment_id), self._plans.get(entry.name))
        return values | {
            "tags": _tag_values(store.runs(entry.experiment_id)),
            "progress": {name: counts[name] for name in ("planned", "counts", "changed_ms")},
        }

    def statistics(self, store: VisibleStore, sweep: str, x: str, y: str, tags: list[str]) -> Any:
        """What is inferred of one sweep beside its means, see :mod:`analysis.findings`, and how it was made."""
        entry = find_experiment(store, sweep)
        saved, all_rows = self._sweep(store, entry)
        rows = _with_tags(store, entry, all_rows, tags)
        x, y = x or DEFAULT_X, y or saved.metric["report"]
        lines = compare(saved, rows, x, y)
        for option, name in (("x", x), ("y", y)):
            check_axis(option, name, saved, lines)
        found = findings(saved, rows, lines, x=x, y=y)
        trials = [
            finite({"arm": line.arm, "cell": line.cell, "trials": [vars(trial) for trial in line.trials]})
            for line in lines
            if line.trials
        ]
        told = {"trials": trials, "method": method(saved, rows, found)}
        return {"sweep": saved.name, "x": x, "y": y, **findings_json(found), **told}

    def runs_of(self, store: VisibleStore, sweep: str, arm: str, cell: str, tags: list[str]) -> dict[str, Any]:
        """All runs of an arm and cell, replicates first, with their settings."""
        entry = find_experiment(store, sweep)
        _, rows = self._sweep(store, entry)
        found = [row for row in _with_tags(store, entry, rows, tags) if (row.arm, row.cell) == (arm, cell)]
        found.sort(key=lambda row: (row.role != "replicate", row.seed))
        return finite({"runs": [asdict(row) for row in found]})

    def seeds(self, store: VisibleStore, sweep: str, x: str, y: str, tags: list[str]) -> dict[str, Any]:
        """Both coordinates of every finished replicate, column by column."""
        entry = find_experiment(store, sweep)
        _, rows = self._sweep(store, entry)
        found = [row for row in replicates(_with_tags(store, entry, rows, tags)) if row.outcome == "finished"]
        columns: dict[str, list[Any]] = {
            name: [getattr(row, name) for row in found] for name in ("arm", "cell", "seed")
        }
        return finite(columns | {"x": [_value(row, x) for row in found], "y": [_value(row, y) for row in found]})

    def mixers(self, store: VisibleStore) -> list[dict[str, Any]]:
        """Every mixer that stands in an arm's pattern, with how many runs and sweeps there are of it."""
        found: dict[str, dict[str, Any]] = {}
        for entry in sweep_experiments(store):
            for run in store.runs(entry.experiment_id):
                tags = run.data.tags
                for name in mixer_names(tags.get("mixlab.pattern", "")) if "mixlab.arm" in tags else ():
                    one = found.setdefault(name, {"name": name, "n_runs": 0, "sweeps": {}})
                    one["n_runs"] += tags.get("mixlab.role") != "parent"
                    one["sweeps"][entry.name] = True
        return [{**one, "sweeps": list(one["sweeps"])} for _, one in sorted(found.items())]

    def mixer(self, store: VisibleStore, name: str) -> dict[str, Any]:
        """One mixer: its arms in every sweep, its contract result, and what a benchmark measured. Raises UserError.

        Results of the contract and of benchmarks are shown only of mixers that stand in a sweep the user may see.
        """
        sweeps = []
        known: set[str] = set()
        for entry in sweep_experiments(store):
            saved, rows = self._sweep(store, entry)
            known.update(one for pattern in saved.arms.values() for one in mixer_names(pattern))
            arms = {arm: pattern for arm, pattern in saved.arms.items() if name in mixer_names(pattern)}
            if not arms:
                continue
            part = replace(saved, arms=arms)
            own = [row for row in rows if row.arm in arms]
            lines = compare(part, own)
            costs = sorted({f"cost/{cost}" for line in lines for cost in line.cost})
            sweeps.append(
                {
                    "name": saved.name,
                    "experiment_id": entry.experiment_id,
                    "metric": saved.metric,
                    "arms": [{"name": arm, "pattern": pattern} for arm, pattern in arms.items()],
                    "axes": [asdict(axis(one, saved.metric)) for one in [saved.metric["report"], *costs]],
                    "comparisons": [
                        {name: value for name, value in line.items() if name != "trials"} for line in as_json(lines)
                    ],
                }
            )
        if not sweeps:
            raise UserError(f"no mixer {name!r} in the sweeps of this store")
        return finite(
            {
                "name": name,
                "sweeps": sweeps,
                "contract": contract_result(self._runs, name),
                "bench": bench_results(self._runs, name, known),
            }
        )

    def _sweep(self, store: VisibleStore, entry: StoredExperiment) -> tuple[SavedSweep, list[RunRow]]:
        """Plan and rows, kept while neither changes. What is kept says nothing about who may see it."""
        state = self.state(store, [entry])
        kept = self._rows.get(entry.experiment_id)
        if kept is None or kept[0] != state:
            saved, rows = rows_from_mlflow_runs(store, entry.name, self._plans.get(entry.name))
            kept = self._rows[entry.experiment_id] = (state, saved, rows)
        return kept[1], kept[2]


def _nothing_found(x: str, y: str) -> Findings:
    """In place of statistics that are asked for by themselves, since they take longer than the means."""
    return Findings(x, y, None, (), {}, {}, (), (), True, (), (), ())


def _with_tags(store: VisibleStore, entry: StoredExperiment, rows: list[RunRow], tags: list[str]) -> list[RunRow]:
    wanted: dict[str, set[str]] = {}
    for text in tags:
        name, found, value = text.partition("=")
        if not found:
            raise UserError(f"tag {text!r}: expected NAME=VALUE")
        wanted.setdefault(name, set()).add(value)
    if not wanted:
        return rows
    fits: Callable[[StoredRun], bool] = lambda run: all(  # noqa: E731
        run.data.tags.get(name) in values for name, values in wanted.items()
    )
    fitting = {run.info.run_id for run in store.runs(entry.experiment_id) if fits(run)}
    return [row for row in rows if row.link in fitting]


def _tag_values(runs: list[StoredRun]) -> dict[str, list[str]]:
    """The tags by which runs can be told apart, with their values; not those with a value for nearly every run."""
    found: dict[str, dict[str, bool]] = {}
    for run in runs:
        if run.data.tags.get("mixlab.role") == "parent":
            continue
        for name, value in run.data.tags.items():
            own = name.startswith("mixlab.") and name.removeprefix("mixlab.") in _NOT_FILTERS
            if not own and (not name.startswith("mlflow.") or name == "mlflow.user"):
                found.setdefault(name, {})[value] = True
    return {name: sorted(values) for name, values in sorted(found.items()) if 1 <= len(values) <= _MAX_TAG_VALUES}


def _told(rows: list[RunRow], names: list[str]) -> dict[tuple[str, str], dict[str, list[str]]]:
    """For every arm and cell the values of the settings ``names`` over its replicates, a few of each."""
    found: dict[tuple[str, str], dict[str, dict[str, bool]]] = {}
    for row in replicates(rows):
        of_line = found.setdefault((row.arm, row.cell), {name: {} for name in names})
        for name in names:
            of_line[name][str(row.settings.get(name, "–"))] = True
    return {
        where: {name: list(values)[: _MAX_TOLD_VALUES + 1] for name, values in of_line.items()}
        for where, of_line in found.items()
    }


def _value(row: RunRow, name: str) -> Any:
    if name.startswith("cost/"):
        return row.cost.get(name.removeprefix("cost/"))
    return row.factors.get(name.removeprefix("factor/")) if name.startswith("factor/") else row.metrics.get(name)
