"""Where runs and the tracking store live, unless the user says otherwise."""

from __future__ import annotations

import os
from pathlib import Path


def runs_root(given: str | None = None) -> Path:
    """``given``, else ``$MIXLAB_RUNS``, else ``./runs``: records, the SQLite store and artifacts."""
    return Path(given or os.environ.get("MIXLAB_RUNS") or "runs")


def tracking_uri(runs: Path) -> str:
    """``$MLFLOW_TRACKING_URI``, else a SQLite file under ``runs``."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(runs / 'mlflow.db').resolve()}"


def artifact_root(runs: Path) -> str:
    """Where a local store puts artifacts: stated explicitly, as MLflow freezes it at creation."""
    return (runs / "artifacts").resolve().as_uri()
