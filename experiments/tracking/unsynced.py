"""The mark of a record that MLflow lacks something of: RUNS/<sweep>/<key>/unsynced.json, which says why."""

from __future__ import annotations

import contextlib
from pathlib import Path

from experiments.records import read_json, write_json

FILE = "unsynced.json"


def mark(folder: Path, problem: str) -> None:
    """Without the mark, on a full disk, ``sync`` still finds the gap: it compares."""
    with contextlib.suppress(OSError):
        write_json(folder / FILE, {"problem": problem})


def unmark(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / FILE).unlink(missing_ok=True)


def problem_of(folder: Path) -> str:
    """Why MLflow lacks something of this record, "" where it does not."""
    values = read_json(folder / FILE)
    return str(values.get("problem", "")) if isinstance(values, dict) else ""


def any_unsynced(sweep_folder: Path) -> bool:
    return next(sweep_folder.glob(f"*/{FILE}"), None) is not None


def way_to_catch_up(problem: str, sweep: str) -> str:
    """The one line that a user sees."""
    return f"tracking is behind ({problem}); the records on disk are complete, `mixlab sync {sweep}` catches up"
