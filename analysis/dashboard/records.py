"""What lies in the folder of the runs beside the store: plans, results of the contract suite, benchmarks."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from pathlib import Path
from typing import Any

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


def contract_result(runs: Path, mixer: str) -> dict[str, Any] | None:
    """What `mixlab check MIXER --json` last found, from the newest file RUNS/checks/*.json that has it."""
    return next((row for _, row in _rows(runs / CHECKS, mixer) if isinstance(row.get("checks"), list)), None)


def bench_results(runs: Path, mixer: str) -> list[dict[str, Any]]:
    """What benchmarks measured of ``mixer``, from the files RUNS/bench/*.json, newest first."""
    return [row for _, row in _rows(runs / BENCH, mixer)]


def _rows(folder: Path, mixer: str) -> list[tuple[Path, dict[str, Any]]]:
    """The objects of the lists in ``folder`` that are of ``mixer``, those of the newest file first."""
    found = []
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        values = read_json(path)
        rows = values.get("rows") if isinstance(values, dict) else values
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict) and mixer in (row.get("name"), row.get("mixer")):
                made_ms = path.stat().st_mtime_ns // 1_000_000
                found.append((path, {**row, "file": path.name, "made_ms": made_ms}))
    return found


def _mark(path: Path) -> Hashable:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size
