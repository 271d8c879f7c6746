"""The MLflow mirror of run records. The record on disk is the truth: a tracker that is slow or gone stops nothing."""

from experiments.tracking.run_tracker import RunTracker
from experiments.tracking.store import StoreOutOfReach, ensure_experiment, ensure_parent, prepare_store
from experiments.tracking.sync import SyncReport, mirror_lock, sync

__all__ = [
    "RunTracker",
    "StoreOutOfReach",
    "SyncReport",
    "ensure_experiment",
    "ensure_parent",
    "mirror_lock",
    "prepare_store",
    "sync",
]
