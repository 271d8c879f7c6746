"""Stands in for the training: keeps the same records and obeys the same interrupts, in milliseconds.

``MIXLAB_FAKE_TARGET`` (JSON) sets how it behaves; every completed run appends its key to RUNS/<sweep>/completions.log.

    n_steps, step_s           length of a run
    (train.eval_every > 0)    the select metric is reported after every step
    stuck_s                   an uninterruptible wait in every run
    outcome                   {"<seed or trial lr>": "diverged" | "raise" | "die" | "die_once" | "killed_thrice" |
                              "hang_once" | "memory" | "memory_beside_others" | "disk_full" | "lingers"}

``lingers``: waits before its last step for the driver's word to prune it. The step that a run is at stands in step.txt.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

from experiments.config import ExperimentConfig
from experiments.progress import Interrupted, OnProgress, Progress, Pruned
from experiments.records import (
    RunIdentity,
    RunOutcome,
    read_json,
    run_folder,
    write_identity,
    write_json,
    write_outcome,
)

TARGET = "tests.sweeps.fake_target:run_experiment"
BEST_LR = 3e-3
LINGERS_S = 60.0


def run_experiment(
    config: ExperimentConfig, identity: RunIdentity, runs: Path, *, tracking: Any, on_progress: OnProgress
) -> RunOutcome:
    import torch  # the worker has it; a driver that knows this module's name does without

    behaviour = json.loads(os.environ.get("MIXLAB_FAKE_TARGET", "{}"))
    folder = run_folder(runs, identity.sweep, identity.key)
    write_identity(folder, identity, config.resolved())
    write_json(folder / "environment.json", {"n_threads": torch.get_num_threads()})
    (folder / "outcome.json").unlink(missing_ok=True)
    print(f"training {identity.key}")
    fates = behaviour.get("outcome", {})
    fate = fates.get(str(config.seed)) or fates.get(f"{config.train.lr:g}", "finished")
    n_steps = behaviour.get("n_steps", 2)
    evaluates, so_far = config.train.eval_every > 0, {}
    checkpoint = folder / "checkpoint.json"
    step = (read_json(checkpoint) or {"step": 0})["step"]
    with open(folder / "starts.log", "a", encoding="utf-8") as file:
        file.write(f"{step}\n")
    if fate == "raise":
        raise ValueError("this seed is bad")
    if fate == "die" or (fate == "die_once" and len((folder / "starts.log").read_text().split()) == 1):
        os.kill(os.getpid(), signal.SIGSEGV)
    if fate == "killed_thrice" and len((folder / "starts.log").read_text().split()) <= 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "disk_full":
        raise OSError(errno.ENOSPC, "No space left on device")
    first = len((folder / "starts.log").read_text().split()) == 1
    if fate == "hang_once" and first:
        time.sleep(600)
    if fate == "memory" or (fate == "memory_beside_others" and first):
        outcome = RunOutcome("failed", "out of memory: 3 GB asked for")
        write_outcome(folder, outcome)
        return outcome
    (folder / "spans.log").write_text(f"{time.monotonic()} ")
    if "stuck_s" in behaviour:
        stuck_until = time.monotonic() + behaviour["stuck_s"]
        while time.monotonic() < stuck_until:
            try:
                time.sleep(0.1)
            except Interrupted:
                continue
    try:
        while step < n_steps:
            time.sleep(behaviour.get("step_s", 0.0))
            until = time.monotonic() + (LINGERS_S if fate == "lingers" and step == n_steps - 1 else 0.0)
            while time.monotonic() < until:
                on_progress(Progress(step, n_steps, so_far))
                time.sleep(0.02)
            step += 1
            (folder / "step.txt").write_text(str(step))
            so_far = {"select/accuracy": scores(config)["select/accuracy"] * step / n_steps} if evaluates else {}
            metrics = {"train/loss": 1 / step, "text": "not a number", **so_far}
            on_progress(Progress(step, n_steps, metrics, evaluated=evaluates and step < n_steps))
    except Pruned as told:
        outcome = RunOutcome("pruned", str(told), step=step, metrics=so_far)
        write_outcome(folder, outcome)
        return outcome
    except Interrupted:
        write_json(checkpoint, {"step": step})
        outcome = RunOutcome("killed", "interrupted", step=step)
        write_outcome(folder, outcome)
        return outcome
    if fate == "diverged":
        outcome = RunOutcome("diverged", "training loss is nan", step=step, metrics={"select/accuracy": 1e9})
    else:
        outcome = RunOutcome("finished", step=step, wall_s=0.01, metrics=scores(config))
    write_outcome(folder, outcome)
    with open(folder / "spans.log", "a", encoding="utf-8") as file:
        file.write(f"{time.monotonic()}")
    with open(folder.parent / "completions.log", "a", encoding="utf-8") as file:
        file.write(f"{identity.key}\n")
    return outcome


def scores(config: ExperimentConfig) -> dict[str, float | None]:
    """Best on select at ``BEST_LR``, and worst there on report: a choice by the wrong split shows."""
    distance = abs(math.log10(config.train.lr / BEST_LR))
    return {
        "select/accuracy": 1.0 - distance + config.seed * 1e-9,
        "report/accuracy": distance + config.model.d_model / 1000,
    }
