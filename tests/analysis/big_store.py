"""A SQLite store of many MLflow runs, written by bulk through MLflow's own tables: for tests and timings.

python -m tests.analysis.big_store FOLDER [--sweeps 10] [--arms 10] [--cells 10] [--seeds 5] [--trials 5]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.tracking import prepare_store
from experiments.tracking.schema import identity_tags, parent_tags
from sweeps.mirror import experiment_tags

MIXERS = ("softmax", "linear_attention", "gated_deltanet", "fwpkm", "pkm", "mamba2", "gla", "rwkv7", "ttt", "hgrn2")
METRIC = {"select": "select/accuracy", "report": "report/accuracy", "direction": "maximize"}
_CLOCK_MS = 1_700_000_000_000
# settings that all runs share; as many as a real run has
_SAME = {f"train.option_{i}": str(i) for i in range(40)} | {
    "task.name": "mqar",
    "task.vocab_size": "128",
    "model.d_model": "64",
    "model.n_layers": "2",
}


def write_big_store(
    folder: Path, *, n_sweeps: int, n_arms: int, n_cells: int, n_seeds: int, n_trials: int, first: int = 0
) -> str:
    """Make (or add to) ``folder/mlflow.db``; sweeps are called ``big_00``, ``big_01``, ...; gives the store's URI.

    n_sweeps * n_arms * n_cells * (n_seeds + n_trials) runs and a parent for every arm and cell.
    """
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    prepare_store(uri, (folder / "artifacts").as_uri())
    for number in range(first, first + n_sweeps):
        write_sweep(uri, folder, f"big_{number:02}", n_arms=n_arms, n_cells=n_cells, n_seeds=n_seeds, n_trials=n_trials)
    return uri


def write_sweep(uri: str, folder: Path, name: str, *, n_arms: int, n_cells: int, n_seeds: int, n_trials: int) -> str:
    """One sweep; gives the id of its experiment."""
    from mlflow.store.tracking.dbmodels import models
    from mlflow.tracking import MlflowClient
    from sqlalchemy import create_engine, insert

    experiment = MlflowClient(tracking_uri=uri).create_experiment(
        name,
        artifact_location=(folder / "artifacts" / name).as_uri(),
        tags=experiment_tags("How large is large?", METRIC),
    )
    tables: dict[Any, list[dict[str, Any]]] = {
        models.SqlRun: [],
        models.SqlTag: [],
        models.SqlParam: [],
        models.SqlLatestMetric: [],
        models.SqlMetric: [],
    }
    for run in _runs(name, experiment, n_arms, n_cells, n_seeds, n_trials):
        run_id = run["run_uuid"]
        tables[models.SqlRun].append({n: v for n, v in run.items() if n not in ("tags", "params", "metrics")})
        tables[models.SqlTag] += [{"run_uuid": run_id, "key": n, "value": v} for n, v in run["tags"].items()]
        tables[models.SqlParam] += [{"run_uuid": run_id, "key": n, "value": v} for n, v in run["params"].items()]
        metrics = [
            {"run_uuid": run_id, "key": n, "value": v, "step": 100, "timestamp": run["end_time"], "is_nan": False}
            for n, v in run["metrics"].items()
        ]
        tables[models.SqlLatestMetric] += metrics
        tables[models.SqlMetric] += metrics
    engine = create_engine(uri)
    with engine.begin() as connection:
        for table, rows in tables.items():
            connection.execute(insert(table.__table__), rows)
    engine.dispose()
    return experiment


def _runs(
    sweep: str, experiment: str, n_arms: int, n_cells: int, n_seeds: int, n_trials: int
) -> Iterator[dict[str, Any]]:
    noise = random.Random(sweep)
    clock = _CLOCK_MS
    for a in range(n_arms):
        mixer = MIXERS[a % len(MIXERS)]
        arm, pattern = f"{mixer}_{a}", f"{mixer}(head_dim={16 * (a + 1)})"
        state_bytes = 1024 * (a + 1) * (4 if mixer == "softmax" else 1)
        for c in range(n_cells):
            n_pairs = 2 ** (c % 8 + 2)
            cell, factors = f"n_pairs={n_pairs},width={c // 8}", {"task.n_pairs": n_pairs, "width": c // 8}
            clock += 1000
            yield _run(experiment, clock, parent_tags(sweep, arm, cell, factors, pattern), {}, {})
            for i in range(n_seeds + n_trials):
                clock += 1000
                key = hashlib.sha256(f"{sweep} {arm} {cell} {i}".encode()).hexdigest()[:16]
                role, seed = ("replicate", i) if i < n_seeds else ("tuning", 1000)
                tags = identity_tags(_identity(key, sweep, arm, cell, factors, role, seed, pattern))
                tags |= {"mixlab.outcome": "finished", "mixlab.data_hash": f"data {seed}", "mixlab.git": "abcdef"}
                tags |= {"mixlab.impl": '{"0": "reference"}', "device": "H100" if i % 2 else "cpu"}
                accuracy = min(1.0, max(0.0, (a + 4) / (a + 4 + n_pairs / 8) + noise.gauss(0, 0.03)))
                params = _SAME | {
                    "seed": str(seed),
                    "model.pattern": pattern,
                    "task.n_pairs": str(n_pairs),
                    "train.lr": str(0.001 * (1 + i % 3)),
                }
                yield _run(experiment, clock, tags, params, _metrics(accuracy, state_bytes, a, noise, role))


def _identity(*values: Any) -> Any:
    from experiments.records import RunIdentity

    return RunIdentity(*values)


def _metrics(accuracy: float, state_bytes: int, a: int, noise: random.Random, role: str) -> dict[str, float]:
    found = {"select/accuracy": accuracy, "select/loss": 4 * (1 - accuracy), "train/loss": 3 * (1 - accuracy)}
    if role == "replicate":
        found |= {"report/accuracy": accuracy - 0.01, "report/loss": 4 * (1 - accuracy) + 0.01}
    costs = {
        "state_bytes": state_bytes,
        "state_bytes_fixed": state_bytes / 2,
        "state_bytes_per_token": 0.0,
        "params": 20_000 + 500 * a,
        "flops_per_token": 40_000 + 900 * a,
        "train_tokens_per_s": 2e5 / (1 + a) * noise.uniform(0.9, 1.1),
        "prefill_tokens_per_s": 4e5 / (1 + a) * noise.uniform(0.9, 1.1),
        "decode_ms_per_token": 0.3 * noise.uniform(0.9, 1.1),
        "peak_bytes": 4e8,
        "state_context_tokens": 256,
    }
    return found | {f"cost/{name}": float(value) for name, value in costs.items()}


def _run(
    experiment: str, clock: int, tags: dict[str, str], params: dict[str, str], metrics: dict[str, float]
) -> dict[str, Any]:
    run_id = hashlib.md5(f"{experiment} {clock}".encode(), usedforsecurity=False).hexdigest()
    return {
        "run_uuid": run_id,
        "name": tags["mlflow.runName"],
        "source_type": "LOCAL",
        "user_id": "somebody",
        "status": "FINISHED",
        "start_time": clock,
        "end_time": clock + 900,
        "lifecycle_stage": "active",
        "artifact_uri": f"file:///nowhere/{experiment}/{run_id}/artifacts",
        "experiment_id": int(experiment),
        "tags": tags,
        "params": params,
        "metrics": metrics,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, otherwise in (("sweeps", 10), ("arms", 10), ("cells", 10), ("seeds", 5), ("trials", 5)):
        parser.add_argument(f"--{name}", type=int, default=otherwise)
    parser.add_argument("--first", type=int, default=0, help="number of the first sweep")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    uri = write_big_store(
        given.folder,
        n_sweeps=given.sweeps,
        n_arms=given.arms,
        n_cells=given.cells,
        n_seeds=given.seeds,
        n_trials=given.trials,
        first=given.first,
    )
    print(json.dumps({"uri": uri, "seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
