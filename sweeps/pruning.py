"""How a driver ends a tuning trial early: by a file in the run's folder, which its worker looks for after every step.

A file outlives both: a run whose driver or worker is lost between decision and end is pruned by the next ones.
"""

from __future__ import annotations

from pathlib import Path

from experiments.records import read_json, write_json

_FILE = "prune.json"


def ask_to_prune(folder: Path, reason: str) -> None:
    write_json(folder / _FILE, {"reason": reason})


def prune_reason(folder: Path) -> str:
    """Why the run is to end, or nothing."""
    found = read_json(folder / _FILE)
    return found["reason"] if isinstance(found, dict) else ""


def asked_to_prune(sweep_folder: Path) -> list[Path]:
    """Folders of the runs that a driver has asked to end: all that were pruned are among them."""
    return sorted(path.parent for path in sweep_folder.glob(f"*/{_FILE}"))


def forget_pruning(folder: Path) -> None:
    (folder / _FILE).unlink(missing_ok=True)
