"""The MLflow mirror of run records. The record on disk is the truth: a tracker that is slow or gone stops nothing."""

from experiments.tracking.run_tracker import RunTracker
from experiments.tracking.store import ensure_experiment, ensure_parent, prepare_store
from experiments.tracking.sync import SyncReport, sync

__all__ = ["RunTracker", "SyncReport", "ensure_experiment", "ensure_parent", "prepare_store", "sync"]
