"""Names and values as they stand in MLflow. They are stable: the dashboard and users' notebooks read them."""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from experiments.config import flatten
from experiments.records import RunIdentity, RunOutcome

KEY, SWEEP, ARM, CELL = "mixlab.key", "mixlab.sweep", "mixlab.arm", "mixlab.cell"
FACTORS, ROLE, SEED, PATTERN = "mixlab.factors", "mixlab.role", "mixlab.seed", "mixlab.pattern"
OUTCOME, REASON, IMPL, DATA_HASH = "mixlab.outcome", "mixlab.reason", "mixlab.impl", "mixlab.data_hash"
GIT = "mixlab.git"
# Fingerprint of the record that this MLflow run mirrors completely; absent until then.
MIRRORED = "mixlab.mirrored"
PARENT_RUN, RUN_NAME = "mlflow.parentRunId", "mlflow.runName"
PARENT_ROLE = "parent"

STATUS = {"finished": "FINISHED", "diverged": "FINISHED", "pruned": "FINISHED", "failed": "FAILED", "killed": "KILLED"}

NOT_METRICS = frozenset({"step", "tokens", "time_ms", "wall_s"})  # of a row of metrics.jsonl
MAX_PARAM_CHARACTERS = 6000
MAX_TAG_CHARACTERS = 8000
MAX_NAME_CHARACTERS = 250
MAX_METRICS_PER_CALL = 1000
MAX_PARAMS_PER_CALL = 100


class Point(NamedTuple):
    """One value of a metric. NaN stands for anything that is not finite."""

    name: str
    value: float
    step: int
    time_ms: int


def chunks(items: list[Any], n: int) -> Iterator[list[Any]]:
    """The items in order, ``n`` at a time: MLflow bounds what one call may carry."""
    for start in range(0, len(items), n):
        yield items[start : start + n]


def points(metrics: dict[str, Any], step: int, time_ms: int) -> list[Point]:
    """The numbers among ``metrics``; None (the null of a record) and infinities become NaN."""
    found = []
    for name, value in metrics.items():
        number = math.nan if value is None else float(value)
        found.append(Point(metric_name(name), number if math.isfinite(number) else math.nan, step, time_ms))
    return found


def row_points(rows: Iterable[dict[str, Any]]) -> list[Point]:
    """All points of the rows of metrics.jsonl."""
    return [
        point
        for row in rows
        for point in points({k: v for k, v in row.items() if k not in NOT_METRICS}, row["step"], row["time_ms"])
    ]


def final_points(outcome: RunOutcome, time_ms: int) -> list[Point]:
    """Final metrics by their full names, costs as ``cost/<name>``."""
    final = {**outcome.metrics, **{f"cost/{name}": value for name, value in outcome.cost.items()}}
    return points(final, outcome.step, time_ms)


def metric_name(name: str) -> str:
    """``name`` with every character that MLflow refuses replaced by an underscore, so that one odd name from a
    plugin does not cost a whole batch of metrics."""
    name = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:MAX_NAME_CHARACTERS]
    is_plain_path = posixpath.normpath(name) == name and not name.startswith(("..", "/")) and name != "."
    return name if is_plain_path else name.replace("/", "_").replace(".", "_") or "_"


def params(config: dict[str, Any]) -> dict[str, str]:
    """The flat resolved config as text; what is too long is cut and says so (config.json is an artifact)."""
    return {name: _clipped(_text(value), MAX_PARAM_CHARACTERS) for name, value in flatten(config).items()}


def identity_tags(identity: RunIdentity) -> dict[str, str]:
    """Tags that say who a run is."""
    role = f"{identity.role} seed {identity.seed}"
    values = {
        KEY: identity.key,
        SWEEP: identity.sweep,
        ARM: identity.arm,
        CELL: identity.cell,
        FACTORS: json.dumps(identity.factors, sort_keys=True),
        ROLE: identity.role,
        SEED: str(identity.seed),
        PATTERN: identity.pattern,
        RUN_NAME: " | ".join(part for part in (identity.arm, identity.cell, role) if part),
    }
    return clipped_tags(values)


def parent_tags(sweep: str, arm: str, cell: str, factors: dict[str, Any], pattern: str) -> dict[str, str]:
    """Tags of the parent run of an arm and cell."""
    values = {SWEEP: sweep, ARM: arm, CELL: cell, FACTORS: json.dumps(factors, sort_keys=True)}
    values |= {ROLE: PARENT_ROLE, PATTERN: pattern, RUN_NAME: " | ".join(part for part in (arm, cell) if part)}
    return clipped_tags(values)


def outcome_tags(outcome: RunOutcome | None) -> dict[str, str]:
    """Tags that say how a run ended; a record without outcome was cut off."""
    if outcome is None:
        return {OUTCOME: "killed"}
    values = {OUTCOME: outcome.outcome, IMPL: json.dumps(outcome.impl, sort_keys=True), DATA_HASH: outcome.data_hash}
    return clipped_tags(values | ({REASON: outcome.reason} if outcome.reason else {}))


def status(outcome: RunOutcome | None) -> str:
    """MLflow's own status of a run that has ended."""
    return STATUS[outcome.outcome] if outcome else "KILLED"


def clipped_tags(tags: dict[str, str]) -> dict[str, str]:
    return {name: _clipped(value, MAX_TAG_CHARACTERS) for name, value in tags.items()}


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else str(value)


def _clipped(text: str, n_characters: int) -> str:
    if len(text) <= n_characters:
        return text
    note = f"... (cut, {len(text)} characters; see config.json)"
    return text[: n_characters - len(note)] + note
