"""Evaluate a kept checkpoint, possibly on other data or under another state protocol."""

from __future__ import annotations

from pathlib import Path

from experiments.backbone import build_model
from experiments.checkpoint import load_checkpoint
from experiments.config import ExperimentConfig
from experiments.device import resolve_compute
from experiments.errors import UserError
from experiments.evaluate import evaluate
from experiments.tasks import build_task
from experiments.tasks.base import EVAL_SPLITS


def evaluate_checkpoint(trained: ExperimentConfig, config: ExperimentConfig, folder: Path) -> dict[str, float]:
    """Metrics on select and report of the model in ``folder``, trained as ``trained``, evaluated as ``config`` says."""
    values = load_checkpoint(folder / "checkpoint.pt")
    if values is None:
        raise UserError(f"{folder}: no checkpoint.pt; train with train.keep_checkpoint=true to evaluate later")
    if values["key"] != trained.key():
        raise UserError(f"{folder}: checkpoint.pt belongs to another config")
    task = build_task(config.task, config.seed_for("data"))
    compute = resolve_compute(config.train)
    model = build_model(config, task.vocab_size).to(compute.device)
    want = values["model"]["embedding.weight"].shape[0]
    if task.vocab_size != want:
        raise UserError(f"the task's vocabulary has {task.vocab_size} symbols, the model was trained with {want}")
    model.load_state_dict(values["model"])
    metrics: dict[str, float] = {}
    for split in EVAL_SPLITS:
        metrics |= evaluate(model, task, split, config.state, config.train.eval_batch_size, compute)
    return metrics
