"""What lies in the folder of the runs beside the store: plans, results of the contract suite, benchmarks."""

from __future__ import annotations

import threading
from collections.abc import Collection, Hashable, Iterator
from pathlib import Path
from typing import Any

from analysis.patterns import mixer_names
from experiments.records import read_json
from sweeps.saved import SavedSweep, read_saved, saved_names

CHECKS, BENCH = "checks", "bench"  # folders below that of the runs


class Plans:
    """The plans of the sweeps on disk, each read again when its file has changed.

    They know the order of arms and cells, and what is still to be run. A server elsewhere has none.
    """

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._kept: dict[str, tuple[Hashable, SavedSweep]] = {}
        self._lock = threading.Lock()

    def version(self, sweep: str) -> Hashable:
        """What changes with the plan; None where there is none."""
        if sweep not in saved_names(self._runs):  # a name may hold anything: it becomes no path before it is known
            return None
        return _mark(self._runs / sweep / "sweep.json")

    def get(self, sweep: str) -> SavedSweep | None:
        version = self.version(sweep)
        if version is None:
            return None
        with self._lock:
            kept = self._kept.get(sweep)
            if kept is None or kept[0] != version:
                kept = self._kept[sweep] = (version, read_saved(self._runs, sweep))
            return kept[1]


def results_version(runs: Path) -> Hashable:
    """What changes with the results of checks and benchmarks."""
    return tuple(
        (path.name, _mark(path)) for folder in (CHECKS, BENCH) for path in sorted((runs / folder).glob("*.json"))
    )


def contract_result(runs: Path, mixer: str) -> dict[str, Any] | None:
    """What `mixlab check MIXER --json` last found, from the newest file RUNS/checks/*.json that has it."""
    for path, made_ms, values in _newest_first(runs / CHECKS):
        for row in values if isinstance(values, list) else ():
            if isinstance(row, dict) and row.get("name") == mixer and isinstance(row.get("checks"), list):
                return {**row, "file": path.name, "made_ms": made_ms}
    return None


def bench_results(runs: Path, mixer: str, known: Collection[str]) -> dict[str, list[dict[str, Any]]]:
    """What `mixlab bench --json RUNS/bench/FILE.json` measured of layers with ``mixer`` in them, newest file first:
    its ``rows`` and ``growth``. Layers with a mixer that is not ``known`` are left out."""
    found: dict[str, list[dict[str, Any]]] = {"rows": [], "growth": []}
    for path, made_ms, values in _newest_first(runs / BENCH):
        for name, rows in found.items():
            for row in values.get(name) or () if isinstance(values, dict) else ():
                label = row.get("label") if isinstance(row, dict) else None
                names = mixer_names(label) if isinstance(label, str) else []
                if mixer in names and set(names) <= set(known):
                    rows.append({**row, "file": path.name, "made_ms": made_ms})
    return found


def _newest_first(folder: Path) -> Iterator[tuple[Path, int, Any]]:
    """The files of ``folder`` with when they were made and what they hold; torn ones are left out."""
    marks = {path: mark for path in folder.glob("*.json") if (mark := _mark(path)) is not None}
    for path, (made_ns, _) in sorted(marks.items(), key=lambda entry: entry[1], reverse=True):
        if (values := read_json(path)) is not None:
            yield path, made_ns // 1_000_000, values


def _mark(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size
