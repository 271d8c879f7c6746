"""The one training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.backbone import Backbone, BackboneState
from experiments.checkpoint import load_checkpoint, save_checkpoint
from experiments.config import ExperimentConfig, StopConfig
from experiments.device import Compute
from experiments.errors import UserError
from experiments.evaluate import evaluate
from experiments.optimizer import build_optimizer, lr_at, set_lr
from experiments.progress import Interrupted, OnProgress, Progress
from experiments.tasks.base import EVAL_SPLITS, IGNORE, Batch, Task
from experiments.turns import Turns
from mixers.base import detach_state, map_state, state_tensors

# Metrics of one moment, to be recorded: step, tokens seen, wall-clock seconds of training, values by full name.
OnMetrics = Callable[[int, int, float, dict[str, float]], None]
# Steps at the start of a process that are left out of the measured speed: allocation, caches, compilation.
N_WARMUP_STEPS = 3


@dataclass
class TrainResult:
    """How a training ended: ``finished`` or ``diverged``, where, and its final metrics."""

    outcome: str
    reason: str
    step: int
    tokens: int
    wall_s: float
    metrics: dict[str, float]
    tokens_per_s: float


@dataclass
class _Progress:
    """What changes from step to step, besides model and optimiser; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    best: float | None = None
    n_since_best: int = 0
    stopped: bool = False
    last_select: dict[str, float] = field(default_factory=dict)


def n_steps_of(config: ExperimentConfig, task: Task) -> int:
    """Steps that the budget allows: ``max_steps``, or ``max_tokens`` over the mean tokens of a batch, rounded up."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    assert config.train.max_tokens is not None
    return math.ceil(config.train.max_tokens / (config.train.batch_size * task.tokens_per_example))


def training_batch(config: ExperimentConfig, task: Task, step: int) -> Batch:
    """What step ``step`` trains on: a function of data, batch size and order seed, whatever the model."""
    contiguous = config.state.carry == "stream"
    return task.train_batch(step, config.train.batch_size, config.seed_for("order"), contiguous=contiguous)


class Trainer:
    """One training of one model on one task: ``resume``, then ``run``."""

    def __init__(
        self,
        config: ExperimentConfig,
        model: Backbone,
        task: Task,
        compute: Compute,
        *,
        checkpoint: Path | None = None,
        on_metrics: OnMetrics | None = None,
        on_progress: OnProgress | None = None,
        turns: Turns | None = None,
    ) -> None:
        self.turns = turns or Turns()
        self.config, self.model, self.task, self.compute = config, model.to(compute.device), task, compute
        self.checkpoint = checkpoint
        self.on_metrics = on_metrics or (lambda *_: None)
        self.on_progress = on_progress or (lambda _: None)
        self.n_steps = n_steps_of(config, task)
        self.optimizer = build_optimizer(model, config.train)
        self.at = _Progress()
        self.state: BackboneState | None = None
        self.forward = torch.compile(model) if config.train.compile else model
        self.in_step = False
        self.losses: list[Tensor] = []  # of the steps since the last row of metrics
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if config.state.carry == "stream" and not task.can_stream:
            raise UserError(
                f"state.carry='stream': task {config.task.name!r} has no order over training steps; "
                "use carry='none' or the text task"
            )

    def run(self) -> TrainResult:
        """Train to the end of the budget, an early stop or divergence; then evaluate select and report."""
        self.model.train()
        self.on_progress(Progress(self.at.step, self.n_steps, note="training"))
        try:
            diverged, tokens_per_s = self._steps()
        except Interrupted:
            # Within a step, its row and evaluation included, things are not whole: then the last checkpoint stands.
            if not self.in_step:
                self.save()
            raise
        if diverged:
            return self._result("diverged", diverged, {}, tokens_per_s)
        metrics = {}
        for split in EVAL_SPLITS:
            self.on_progress(Progress(self.at.step, self.n_steps, self.at.last_select, note=f"evaluating {split}"))
            metrics |= self._evaluate(split)
        self.on_metrics(self.at.step, self.at.tokens, self.at.wall_s, metrics)
        worst = [name for name, value in metrics.items() if not math.isfinite(value)]
        if worst:
            return self._result("diverged", f"{worst[0]} is not finite at the end", {}, tokens_per_s)
        return self._result("finished", "stopped early" if self.at.stopped else "", metrics, tokens_per_s)

    def _result(self, outcome: str, reason: str, metrics: dict[str, float], tokens_per_s: float) -> TrainResult:
        return TrainResult(outcome, reason, self.at.step, self.at.tokens, self.at.wall_s, metrics, tokens_per_s)

    def _steps(self) -> tuple[str, float]:
        """Train; return why it diverged ("" if not) and the median speed in tokens per second."""
        train = self.config.train
        aux: dict[str, Tensor] = {}
        speeds: list[float] = []
        saved_at = time.perf_counter()
        first_step = self.at.step
        while self.at.step < self.n_steps and not self.at.stopped:
            self.in_step = True
            with self.turns.shared():
                started = time.perf_counter()
                batch = self._batch(self.at.step)
                loss, grad_norm, aux = self._step(batch)
                self.losses.append(loss)
                self.compute.synchronize()
                seconds = time.perf_counter() - started
            self.at.step += 1
            self.at.tokens += batch.tokens.size
            self.at.wall_s += seconds
            if self.at.step - first_step > N_WARMUP_STEPS or self.at.step == self.n_steps:
                speeds.append(batch.tokens.size / seconds)
            last = self.at.step == self.n_steps
            due = train.eval_every and self.at.step % train.eval_every == 0
            if self.at.step % train.log_every == 0 or last or due:
                mean_loss = torch.stack(self.losses).mean().item()
                self.losses.clear()
                if not math.isfinite(mean_loss):
                    self.on_metrics(self.at.step, self.at.tokens, self.at.wall_s, {"train/loss": mean_loss})
                    return f"training loss is {mean_loss} at step {self.at.step}", float(np.median(speeds or [0.0]))
                self._log(mean_loss, grad_norm, aux, batch.tokens.size / seconds)
            if due and not last:
                self._select()
            self.in_step = False
            if self.checkpoint and time.perf_counter() - saved_at >= train.checkpoint_every_s:
                self.save()
                saved_at = time.perf_counter()
            evaluated = bool(due and not last)
            self.on_progress(Progress(self.at.step, self.n_steps, self.at.last_select, evaluated=evaluated))
        return "", float(np.median(speeds or [0.0]))

    def _batch(self, step: int) -> Batch:
        return training_batch(self.config, self.task, step)

    def _step(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        train = self.config.train
        set_lr(self.optimizer, lr_at(self.at.step, self.n_steps, train))
        tokens = torch.from_numpy(batch.tokens).to(self.compute.device)
        targets = torch.from_numpy(batch.targets).to(self.compute.device)
        scored = targets != IGNORE
        carry = self.config.state.carry == "stream"
        with self.compute.autocast():
            out = self.forward(tokens, self.state, return_state=carry)
            logits = self.model.logits(out.hidden[scored])
        loss = F.cross_entropy(logits.float(), targets[scored])
        total = loss
        for name, value in out.aux.items():
            if "/loss/" in name:
                total = total + value
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        limit = train.clip_norm if train.clip_norm is not None else math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self.optimizer.step()
        if carry:
            self.state = detach_state(out.state)
        return loss.detach(), grad_norm.detach(), {name: value.detach() for name, value in out.aux.items()}

    def _log(self, loss: float, grad_norm: Tensor, aux: dict[str, Tensor], tokens_per_s: float) -> None:
        values = {
            "train/loss": loss,
            "train/lr": lr_at(self.at.step - 1, self.n_steps, self.config.train),
            "train/grad_norm": float(grad_norm),
            "train/tokens_per_s": tokens_per_s,
        }
        values |= {f"mixer/{name}": float(value) for name, value in aux.items()}
        self.at.last_select = {**self.at.last_select, "train/loss": loss}
        self.on_metrics(self.at.step, self.at.tokens, self.at.wall_s, values)

    def _evaluate(self, split: str) -> dict[str, float]:
        with self.turns.shared():
            return evaluate(
                self.model, self.task, split, self.config.state, self.config.train.eval_batch_size, self.compute
            )

    def _select(self) -> None:
        """Evaluate on select, log it, and decide whether to stop early."""
        metrics = self._evaluate("select")
        self.at.last_select = {**self.at.last_select, **metrics}
        self.on_metrics(self.at.step, self.at.tokens, self.at.wall_s, metrics)
        stop = self.config.train.stop
        if stop is not None:
            self.at.stopped = self._should_stop(stop, metrics)

    def _should_stop(self, stop: StopConfig, metrics: dict[str, float]) -> bool:
        if stop.metric not in metrics:
            raise UserError(f"train.stop.metric={stop.metric!r}: the task reports {', '.join(sorted(metrics))}")
        sign = 1.0 if stop.metric.split("/")[1] in self.task.higher_is_better else -1.0
        value = metrics[stop.metric]
        if stop.threshold is not None and sign * value >= sign * stop.threshold:
            return True
        if self.at.best is None or sign * value > sign * self.at.best:
            self.at.best, self.at.n_since_best = value, 0
        else:
            self.at.n_since_best += 1
        return stop.patience is not None and self.at.n_since_best >= stop.patience

    def save(self) -> None:
        if self.checkpoint is None:
            return
        values: dict[str, Any] = {
            "key": self.config.key(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": vars(self.at).copy(),
            "rng": torch.get_rng_state(),
            "losses": self.losses,
            "state": None if self.state is None else state_tensors(self.state),
        }
        if self.compute.device.type == "cuda":
            values["cuda_rng"] = torch.cuda.get_rng_state(self.compute.device)
        save_checkpoint(self.checkpoint, values)

    def resume(self) -> int:
        """Continue from the checkpoint, if there is one; otherwise fix the random state. Return the step reached."""
        values = None if self.checkpoint is None else load_checkpoint(self.checkpoint)
        if values is None:
            torch.manual_seed(self.config.seed_for("weights"))
            return 0
        if values["key"] != self.config.key():
            raise UserError(f"{self.checkpoint}: belongs to another config; delete it to start the run afresh")
        self.model.load_state_dict(values["model"])
        self.optimizer.load_state_dict(values["optimizer"])
        self.at = _Progress(**values["progress"])
        self.losses = [loss.to(self.compute.device) for loss in values["losses"]]
        torch.set_rng_state(values["rng"])
        if "cuda_rng" in values and self.compute.device.type == "cuda":
            torch.cuda.set_rng_state(values["cuda_rng"], self.compute.device)
        if values["state"] is not None:
            self.state = self._state_from(values["state"])
        return self.at.step

    def _state_from(self, tensors: list[Tensor]) -> BackboneState:
        """Put saved tensors back into a state's structure, which one token of the batch's width shows."""
        batch = self._batch(0)
        with torch.no_grad(), self.compute.autocast():
            tokens = torch.from_numpy(batch.tokens[:, :1]).to(self.compute.device)
            shape_of = self.model(tokens, return_state=True).state
        saved = iter(tensors)
        return map_state(lambda _: next(saved).to(self.compute.device), shape_of)
