"""One run from config to record: train, measure, write the folder first, mirror to MLflow second."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.backbone import Backbone, build_model, validate_model
from experiments.config import ExperimentConfig
from experiments.cost import PeakMemory, measure_cost
from experiments.device import Compute, resolve_compute
from experiments.environment import environment, git_state
from experiments.progress import Interrupted, OnProgress, Pruned
from experiments.records import (
    FINAL_OUTCOMES,
    OUT_OF_MEMORY,
    Outcome,
    RunIdentity,
    RunOutcome,
    clear_temporaries,
    finite,
    is_full,
    metrics_are_torn,
    read_metrics,
    read_outcome,
    run_folder,
    write_identity,
    write_json,
    write_outcome,
)
from experiments.run_lock import run_lock
from experiments.tasks import build_task
from experiments.tasks.base import Task
from experiments.tracking import RunTracker
from experiments.tracking.unsynced import way_to_catch_up
from experiments.train import Trainer, TrainResult, training_batch
from experiments.turns import Turns


@dataclass(frozen=True)
class TrackingTarget:
    """Where a run is mirrored: an MLflow store, the experiment in it, the parent run of its arm and cell."""

    uri: str
    experiment_id: str
    parent_id: str = ""


def run_experiment(
    config: ExperimentConfig,
    identity: RunIdentity,
    runs: Path,
    *,
    tracking: TrackingTarget | None = None,
    on_progress: OnProgress | None = None,
) -> RunOutcome:
    """Run to the end, or on from the checkpoint of an interrupted try; a final outcome found is returned as it is.

    A training that raises ends as ``failed`` with the reason; :class:`Interrupted` ends as ``killed``, the checkpoint
    saved; :class:`Pruned` ends as ``pruned``. All are recorded, none is raised. User mistakes in the config raise
    before anything is written, and a full disk raises its ``OSError``: that is nothing that the run could keep as its
    result.
    """
    folder = run_folder(runs, identity.sweep, identity.key)
    before = read_outcome(folder)
    if before is not None and before.outcome in FINAL_OUTCOMES:
        return before

    compute = resolve_compute(config.train)
    validate_model(config)
    task = build_task(config.task, config.seed_for("data"))
    with run_lock(folder):
        return _run(config, identity, task, compute, folder, tracking, on_progress)


def _run(
    config: ExperimentConfig,
    identity: RunIdentity,
    task: Task,
    compute: Compute,
    folder: Path,
    tracking: TrackingTarget | None,
    on_progress: OnProgress | None,
) -> RunOutcome:
    before = read_outcome(folder)
    if before is not None and before.outcome in FINAL_OUTCOMES:
        return before  # by the process that held the lock until now
    clear_temporaries(folder)
    if metrics_are_torn(folder):  # rows from before the checkpoint may be gone with the rest: all are made again
        for name in ("metrics.jsonl", "checkpoint.pt"):
            (folder / name).unlink(missing_ok=True)
    write_identity(folder, identity, config.resolved())
    write_json(folder / "environment.json", environment(str(compute.device)))
    (folder / "outcome.json").unlink(missing_ok=True)

    tracker = _start_tracker(config, identity, tracking, before)
    recorder = _Recorder(folder, tracker)
    turns = Turns(folder.parent.parent, str(compute.device))
    try:
        outcome = _train_and_measure(config, task, compute, folder, recorder, on_progress, turns)
    except Pruned as told:
        select = {k: v for row in read_metrics(folder) for k, v in row.items() if k.startswith("select/")}
        outcome = replace(recorder.ended("pruned", str(told)), metrics=select)
    except Interrupted:
        outcome = recorder.ended("killed", "interrupted; the same command resumes it")
    except (torch.OutOfMemoryError, MemoryError) as error:
        outcome = recorder.ended("failed", f"{OUT_OF_MEMORY}: {error}")
    except Exception as error:
        if isinstance(error, OSError) and is_full(error):
            raise  # with space again, the same run goes on
        traceback.print_exc()
        # The CPU's allocator has no exception of its own.
        is_memory = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
        outcome = recorder.ended("failed", f"{OUT_OF_MEMORY if is_memory else type(error).__name__}: {error}")
    finally:
        recorder.close()
        turns.close()
    if tracker is not None:
        outcome = replace(outcome, mlflow_run_id=tracker.run_id)
    write_outcome(folder, outcome)
    if outcome.outcome in FINAL_OUTCOMES and not config.train.keep_checkpoint:
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    if tracker is not None:
        tracker.finish(outcome, folder)
        if tracker.run_id != outcome.mlflow_run_id:  # a short training was over before the store had answered
            outcome = replace(outcome, mlflow_run_id=tracker.run_id)
            write_outcome(folder, outcome)
        if tracker.behind:
            print(way_to_catch_up(tracker.problem, identity.sweep), file=sys.stderr, flush=True)
    return outcome


def _start_tracker(
    config: ExperimentConfig, identity: RunIdentity, tracking: TrackingTarget | None, before: RunOutcome | None
) -> RunTracker | None:
    if tracking is None:
        return None
    tracker = RunTracker(
        tracking.uri,
        tracking.experiment_id,
        identity,
        config.resolved(),
        parent_id=tracking.parent_id or None,
        tags={"mixlab.git": git_state()},
    )
    tracker.start("" if before is None else before.mlflow_run_id)
    return tracker


def _train_and_measure(
    config: ExperimentConfig,
    task: Task,
    compute: Compute,
    folder: Path,
    recorder: _Recorder,
    on_progress: OnProgress | None,
    turns: Turns,
) -> RunOutcome:
    model = build_model(config, task.vocab_size)
    memory = PeakMemory(compute)
    trainer = Trainer(
        config,
        model,
        task,
        compute,
        checkpoint=folder / "checkpoint.pt",
        on_metrics=recorder.log,
        on_progress=on_progress,
        turns=turns,
    )
    recorder.drop_after(trainer.resume())
    recorder.reached = lambda: (trainer.at.step, trainer.at.tokens, trainer.at.wall_s)
    result = trainer.run()
    if config.train.keep_checkpoint:
        trainer.save()
    cost = _costs(config, model, task, compute, result, memory.bytes(), recorder.tracking_s, turns)
    return RunOutcome(
        outcome="diverged" if result.outcome == "diverged" else "finished",
        reason=result.reason,
        step=result.step,
        tokens=result.tokens,
        wall_s=result.wall_s,
        metrics=dict(result.metrics),
        cost=dict(cost),
        impl={place: f"{mixer.name}:{mixer.impl}:{mixer.state_scope}" for place, mixer in model.named_mixers().items()},
        data_hash=task.data_hash(),
        order_hash=order_hash(config, task, trainer.n_steps),
    )


def _costs(
    config: ExperimentConfig,
    model: Backbone,
    task: Task,
    compute: Compute,
    result: TrainResult,
    peak_bytes: int,
    tracking_s: float,
    turns: Turns,
) -> dict[str, float]:
    cost = measure_cost(model, longest_report_sample(task, config.train.eval_batch_size), compute, turns)
    cost["train_tokens_per_s"] = result.tokens_per_s
    cost["peak_bytes"] = float(peak_bytes)
    cost["train_s"] = result.wall_s
    cost["tracking_s"] = tracking_s
    return cost


def order_hash(config: ExperimentConfig, task: Task, n_steps: int) -> str:
    """SHA-256 (16 hex digits) over training batches as the loop asks for them: step 0, powers of 2 and the last.

    Of the steps that the budget allows, so that an early stop does not change it.
    """
    digest = hashlib.sha256()
    for step in sorted({2**i for i in range(n_steps.bit_length()) if 2**i < n_steps} | {0, n_steps - 1}):
        batch = training_batch(config, task, step)
        digest.update(f"{step} {batch.tokens.shape}\n".encode())
        digest.update(batch.tokens.astype("<i8").tobytes())
        digest.update(batch.targets.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def longest_report_sample(task: Task, batch_size: int) -> int:
    """The number of tokens at which costs are measured."""
    return max(batch.tokens.shape[1] for batch in task.eval_batches("report", batch_size))


def _is_end(row: dict[str, Any]) -> bool:
    return any(name.startswith("report/") for name in row)


class _Recorder:
    """Writes metrics.jsonl line by line, then hands the same row to the tracker."""

    def __init__(self, folder: Path, tracker: RunTracker | None) -> None:
        self.folder, self.tracker = folder, tracker
        self.reached: Callable[[], tuple[int, int, float]] = lambda: (0, 0, 0.0)  # step, tokens, seconds of training
        self.file = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115  closed by the run

    def drop_after(self, step: int) -> None:
        """Forget rows that an earlier try made after its last checkpoint: they are made again.

        Those of later steps, and the row of the end, the only one that has report metrics: a try that had written it
        was cut off before its outcome.
        """
        rows = read_metrics(self.folder)
        kept = [row for row in rows if step and row["step"] <= step and not _is_end(row)]
        if len(kept) == len(rows):
            return
        self.file.close()
        path = self.folder / "metrics.jsonl"
        temporary = path.with_name(".metrics.jsonl.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(path)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by the run

    def log(self, step: int, tokens: int, wall_s: float, values: dict[str, float]) -> None:
        time_ms = time.time_ns() // 1_000_000
        row = {"step": step, "tokens": tokens, "time_ms": time_ms, "wall_s": round(wall_s, 6), **finite(values)}
        self.file.write(json.dumps(row, allow_nan=False) + "\n")
        self.file.flush()
        if self.tracker is not None:
            self.tracker.log(values, step, time_ms)

    def ended(self, outcome: Outcome, reason: str) -> RunOutcome:
        """The outcome of a training that did not reach its end, as far as it came."""
        step, tokens, wall_s = self.reached()
        return RunOutcome(outcome, reason, step, tokens, wall_s)

    @property
    def tracking_s(self) -> float:
        return 0.0 if self.tracker is None else self.tracker.seconds

    def close(self) -> None:
        """All rows are on the disk before an outcome says that the run is complete."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
