"""What a run leaves on disk, written before anything is mirrored elsewhere.

    RUNS/<sweep>/<key>/run.json          who it is: key, sweep, arm, cell, factors, role, seed, pattern
                       config.json       the full resolved config
                       environment.json  versions, device, git state
                       metrics.jsonl     one object a line: step, tokens, wall_s and metrics by name
                       attempts.jsonl    one object a line: when, where and by which process it was started
                       checkpoint.pt     while unfinished, or when kept
                       outcome.json      last of all, atomically: outcome, reason, metrics, cost
                       unsynced.json     while MLflow lacks something of the above: why
                       .lock             held by the process that trains the run

A folder without outcome.json is a run that has not finished.
"""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["finished", "diverged", "failed", "pruned", "killed"]
Role = Literal["tuning", "replicate"]
# How the reason of a failure for want of memory begins.
OUT_OF_MEMORY = "out of memory"
# Outcomes that stand as results: the same sweep started again does not run them once more.
FINAL_OUTCOMES: frozenset[str] = frozenset({"finished", "diverged", "failed", "pruned"})


@dataclass(frozen=True)
class RunIdentity:
    """Who a run is within its sweep. ``factors`` holds the varied settings of its cell, ``cell`` their label."""

    key: str
    sweep: str
    arm: str
    cell: str
    factors: dict[str, Any]
    role: Role
    seed: int
    pattern: str


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended. ``metrics`` are final values by full name (``report/accuracy``), ``cost`` without prefix."""

    outcome: Outcome
    reason: str = ""
    step: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    metrics: dict[str, float | None] = field(default_factory=dict)
    cost: dict[str, float | None] = field(default_factory=dict)
    impl: dict[str, str] = field(default_factory=dict)
    data_hash: str = ""
    order_hash: str = ""
    mlflow_run_id: str = ""


@dataclass(frozen=True)
class RunRecord:
    """A run read back from its folder; ``outcome`` is None while it is unfinished."""

    folder: Path
    identity: RunIdentity
    config: dict[str, Any]
    outcome: RunOutcome | None


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(finite(value), file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def clear_temporaries(folder: Path) -> None:
    """Remove what a killed process was just writing. Only for whoever owns the folder."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def tidy_run(folder: Path) -> None:
    """Do what a process that was killed at the very end of a run has left undone. Only for whoever owns the folder."""
    clear_temporaries(folder)
    checkpoint = folder / "checkpoint.pt"
    if not checkpoint.exists():
        return
    run = read_run(folder)
    if run is None or run.outcome is None or run.outcome.outcome not in FINAL_OUTCOMES - {"failed"}:
        return  # a failed run that is tried again goes on from there
    if not run.config["train"]["keep_checkpoint"]:
        checkpoint.unlink()


def is_full(error: OSError) -> bool:
    """Whether there was no space left to write: no run is to blame for that, and none can go on."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_json(path: Path) -> Any | None:
    """The value, or None where the file is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def run_folder(runs: Path, sweep: str, key: str) -> Path:
    return runs / sweep / key


def write_identity(folder: Path, identity: RunIdentity, config: dict[str, Any]) -> None:
    write_json(folder / "config.json", config)
    write_json(folder / "run.json", asdict(identity))


def write_outcome(folder: Path, outcome: RunOutcome) -> None:
    write_json(folder / "outcome.json", asdict(outcome))


def read_outcome(folder: Path) -> RunOutcome | None:
    values = read_json(folder / "outcome.json")
    return RunOutcome(**values) if isinstance(values, dict) else None


def read_run(folder: Path) -> RunRecord | None:
    """The record in ``folder``, or None where there is none."""
    identity, config = read_json(folder / "run.json"), read_json(folder / "config.json")
    if not isinstance(identity, dict) or not isinstance(config, dict):
        return None
    return RunRecord(folder, RunIdentity(**identity), config, read_outcome(folder))


def read_sweep_runs(runs: Path, sweep: str) -> list[RunRecord]:
    """All records of a sweep, ordered by key."""
    root = runs / sweep
    if not root.is_dir():
        return []
    records = (read_run(folder) for folder in sorted(root.iterdir()) if folder.is_dir())
    return [record for record in records if record is not None]


def write_attempt(folder: Path) -> None:
    """Add this process to the run's attempts."""
    attempt = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
    with open(folder / "attempts.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(attempt) + "\n")


def n_attempts(folder: Path) -> int:
    """How often the run was started."""
    return len(_read_lines(folder / "attempts.jsonl"))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a torn last line is left out."""
    return _read_lines(folder / "metrics.jsonl")


def metrics_are_torn(folder: Path) -> bool:
    """Whether metrics.jsonl ends in the middle of a line: nobody knows what else it has lost."""
    try:
        content = (folder / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return False
    return bool(content) and not content.endswith(b"\n")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
