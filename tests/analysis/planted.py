"""A sweep with known numbers, written as run records or into an MLflow store."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from experiments.config import flatten
from experiments.records import RunIdentity, RunOutcome, write_identity, write_outcome
from sweeps.saved import SavedRun, SavedSweep, write_saved

ARMS = {
    "attention": "softmax",
    "window 16": "softmax(window=16)",
    "linear": "linear_attention",
    "gated DeltaNet": "gated_deltanet",
    "FwPKM": "fwpkm",
    "static PKM": "pkm:token",
}
# state that does not grow, state per token, parameters, FLOPs per token, training tokens per second
COSTS = {
    "attention": (0, 1024, 566_000, 1.2e6, 310_000),
    "window 16": (15_360, 0, 566_000, 1.1e6, 330_000),
    "linear": (33_280, 0, 566_000, 1.15e6, 280_000),
    "gated DeltaNet": (36_864, 0, 590_000, 1.4e6, 120_000),
    "FwPKM": (557_056, 0, 720_000, 1.9e6, 61_000),
    "static PKM": (0, 0, 1_090_000, 1.3e6, 210_000),
}
_STRENGTH = {
    "attention": 500,
    "window 16": 6,
    "linear": 14,
    "gated DeltaNet": 34,
    "FwPKM": 90,
    "static PKM": 0,
}


def key(arm: str, n_pairs: int, seed: int) -> str:
    return hashlib.sha256(f"{arm} {n_pairs} {seed}".encode()).hexdigest()[:16]


def plan(name: str = "mqar_state", *, arms: dict[str, str] = ARMS, pairs: tuple[int, ...] = (8, 32, 64)) -> SavedSweep:
    cells = {f"n_pairs={n}": {"task.n_pairs": n} for n in pairs}
    seeds = [0, 1, 2]
    return SavedSweep(
        name=name,
        question="At equal state bytes, which mixer recalls more pairs?",
        metric={"select": "select/accuracy", "report": "report/accuracy", "direction": "maximize"},
        budget={"max_tokens": 20_000_000, "tune_trials": 4},
        arms=dict(arms),
        cells=cells,
        seeds=seeds,
        runs=[SavedRun(key(a, n, s), a, f"n_pairs={n}", "replicate", s) for a in arms for n in pairs for s in seeds],
    )


def config(arm: str, n_pairs: int, seed: int) -> dict[str, Any]:
    return {
        "model": {"pattern": ARMS.get(arm, "softmax"), "d_model": 64, "n_layers": 2},
        "task": {"name": "mqar", "vocab_size": 8192, "n_pairs": n_pairs},
        "train": {"lr": 3e-3 if arm == "linear" else 1e-3, "stop": None, "compile": False},
        "seed": seed,
    }


def outcome(arm: str, n_pairs: int, seed: int) -> RunOutcome:
    """Accuracy falls with pairs; FwPKM diverges at 64 pairs with seed 2."""
    fixed, per_token, n_params, flops, speed = COSTS.get(arm, (4096, 0, 1000, 2000, 3000))
    noise = random.Random(f"{arm} {n_pairs} {seed}").gauss(0, 0.02)
    strength = _STRENGTH.get(arm, 20)
    accuracy = max(2 / 8192, min(1.0, strength / (strength + n_pairs**1.2 / 6) + noise)) if strength else 2 / 8192
    if arm == "attention":
        accuracy = 1.0 - abs(noise) / 10
    context = 256
    cost = {
        "state_bytes": fixed + per_token * context,
        "state_bytes_fixed": fixed,
        "state_bytes_per_token": per_token,
        "params": n_params,
        "flops_per_token": flops,
        "train_tokens_per_s": speed * (1 + noise),
        "state_context_tokens": context,
    }
    if (arm, n_pairs, seed) == ("FwPKM", 64, 2):
        return RunOutcome("diverged", reason="loss is NaN at step 120", cost=cost)
    metrics = {
        "report/accuracy": accuracy,
        "report/loss": 4 * (1 - accuracy) + 0.01,
        "select/accuracy": min(1.0, accuracy + 0.01),
        "train/loss": 0.5,
    }
    return RunOutcome("finished", metrics=metrics, cost=cost, data_hash="abc")


def runs_of(saved: SavedSweep) -> list[tuple[SavedRun, RunIdentity, dict[str, Any], RunOutcome]]:
    """Every planned run but one: gated DeltaNet with 64 pairs and seed 0 has not been run."""
    found = []
    for planned in saved.runs:
        n_pairs = saved.cells[planned.cell]["task.n_pairs"]
        if (planned.arm, n_pairs, planned.seed) == ("gated DeltaNet", 64, 0):
            continue
        identity = RunIdentity(
            key=planned.key,
            sweep=saved.name,
            arm=planned.arm,
            cell=planned.cell,
            factors=saved.cells[planned.cell],
            role="replicate",
            seed=planned.seed,
            pattern=saved.arms[planned.arm],
        )
        settings = config(planned.arm, n_pairs, planned.seed)
        found.append((planned, identity, settings, outcome(planned.arm, n_pairs, planned.seed)))
    return found


def write_records(runs: Path, saved: SavedSweep) -> None:
    write_saved(runs, saved)
    for planned, identity, settings, result in runs_of(saved):
        folder = runs / saved.name / planned.key
        write_identity(folder, identity, settings)
        write_outcome(folder, result)


def write_mlflow(uri: str, saved: SavedSweep, artifacts: str) -> str:
    """The same runs in the tracking schema; gives the experiment's id."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    tags = {"mixlab.question": saved.question} | {f"mixlab.metric.{n}": v for n, v in saved.metric.items()}
    experiment = client.create_experiment(saved.name, artifact_location=artifacts, tags=tags)
    clock = 1_700_000_000_000
    for arm, pattern in saved.arms.items():
        for cell, factors in saved.cells.items():
            clock += 1000
            parent = {"sweep": saved.name, "arm": arm, "cell": cell, "role": "parent", "pattern": pattern}
            named = {f"mixlab.{name}": value for name, value in parent.items()}
            named["mixlab.factors"] = json.dumps(factors)
            client.set_terminated(client.create_run(experiment, start_time=clock, tags=named).info.run_id)
    for _, identity, settings, result in runs_of(saved):
        clock += 1000
        log_run(client, experiment, identity, settings, result, clock)
    return experiment


def log_run(
    client: Any,
    experiment: str,
    identity: RunIdentity,
    settings: dict[str, Any],
    result: RunOutcome,
    clock: int,
) -> str:
    from mlflow.entities import Metric, Param

    names = ("key", "sweep", "arm", "cell", "role", "pattern")
    tags = {f"mixlab.{name}": getattr(identity, name) for name in names}
    tags |= {
        "mixlab.factors": json.dumps(identity.factors),
        "mixlab.seed": str(identity.seed),
        "mixlab.outcome": result.outcome,
        "mixlab.data_hash": result.data_hash,
    }
    run_id = client.create_run(experiment, start_time=clock, tags=tags).info.run_id
    values = {**result.metrics, **{f"cost/{name}": value for name, value in result.cost.items()}}
    client.log_batch(
        run_id,
        metrics=[Metric(name, value, clock, 1) for name, value in values.items()],
        params=[Param(name, str(value)) for name, value in flatten(settings).items()],
    )
    client.set_terminated(run_id)
    return run_id
