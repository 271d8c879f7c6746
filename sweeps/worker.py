"""The worker process: trains one job after another, in a Python that has imported torch once.

stdin         jobs, one JSON object a line; its end means that there are no more
event pipe    {"event": "ready" | "started" | "progress" | "ended", ...}, one a line, each under 4 KB
log.txt       in the run's folder: stdout and stderr while it trains
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import importlib
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from experiments.config import ExperimentConfig
from experiments.progress import Interrupted, Progress, Pruned
from experiments.records import (
    RunIdentity,
    RunOutcome,
    is_full,
    read_json,
    read_outcome,
    run_folder,
    write_attempt,
    write_identity,
    write_outcome,
)
from mixers.cli import load_plugins
from sweeps.die_with import die_with
from sweeps.executor import TARGET
from sweeps.lean_torch import spare_compiler
from sweeps.pruning import prune_reason

# A write of at most PIPE_BUF bytes arrives whole or not at all, however full the pipe is.
MAX_EVENT_BYTES = 4000
PROGRESS_EVERY_S = 0.25
# A training looks for an interrupt after every step. One whose step takes longer than this is interrupted within it.
STEP_PATIENCE_S = 1.5


@dataclass
class Interrupt:
    """SIGTERM becomes :class:`Interrupted`, raised between two steps where possible.

    A signal can come in the middle of an optimiser's step, where no consistent checkpoint could be saved.
    """

    asked: bool = False
    training: bool = False

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGALRM, self._on_alarm)

    def check(self) -> None:
        if self.asked and self.training:
            self.training = False  # raise once: what follows is the saving of the checkpoint
            raise Interrupted

    @contextlib.contextmanager
    def around_training(self) -> Iterator[None]:
        self.training = True
        try:
            yield
        finally:
            self.training = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            return  # once: a second signal must not cut the saving short
        self.asked = True
        if self.training:
            signal.setitimer(signal.ITIMER_REAL, STEP_PATIENCE_S)
        else:
            raise SystemExit(0)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        self.check()


@dataclass
class EventPipe:
    """The worker's end of its event pipe."""

    descriptor: int
    _sent_at: float = field(default=-math.inf)

    def send(self, event: str, **values: Any) -> None:
        """Send for certain: waits while the pipe is full."""
        os.set_blocking(self.descriptor, True)
        os.write(self.descriptor, _line({"event": event, **values}))

    def progress(self, progress: Progress) -> None:
        """Send at most every ``PROGRESS_EVERY_S``, and never wait: a suspended driver must not stop a training."""
        now = time.monotonic()
        soon = now - self._sent_at < PROGRESS_EVERY_S
        if soon and progress.step < progress.n_steps and not progress.evaluated:
            return
        self._sent_at = now
        event = {"event": "progress", "step": progress.step, "n_steps": progress.n_steps, "note": progress.note[:200]}
        event["evaluated"] = progress.evaluated
        metrics: dict[str, float | None] = {}
        for name, value in progress.metrics.items():
            if not isinstance(value, (int, float)):
                continue
            shown = {**metrics, name: value if math.isfinite(value) else None}
            if len(_line({**event, "metrics": shown})) > MAX_EVENT_BYTES:
                break
            metrics = shown
        os.set_blocking(self.descriptor, False)
        with contextlib.suppress(BlockingIOError):  # the pipe is full of older progress
            os.write(self.descriptor, _line({**event, "metrics": metrics}))


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    die_with(options.driver)
    faulthandler.enable()
    interrupt = Interrupt()
    interrupt.install()
    jobs = _private_stdin()
    from mixers import registry  # with torch

    target = load_target(options.target)
    if "torch" in sys.modules:
        spare_compiler()
    _set_threads(options.threads)
    load_plugins(tuple(options.plugin))
    registry.load_all()
    pipe = EventPipe(options.events)
    pipe.send("ready")
    for line in jobs:
        try:
            outcome = run_job(json.loads(line), target, pipe, interrupt)
        except OtherCode as error:
            pipe.send("ended", leaving=True, halt=str(error))
            os._exit(1)
        except OSError as error:
            if not is_full(error):
                raise
            pipe.send(
                "ended", leaving=True, halt=f"{str(error)[:1000]}; free some space and start it again: it goes on"
            )
            os._exit(1)
        # After an error this process may be unusable (a CUDA context after an assertion, memory that nobody frees).
        leaving = interrupt.asked or outcome is None or outcome.outcome == "failed"
        if not leaving:
            release_gpu_memory()
        pipe.send("ended", leaving=leaving)
        if leaving:
            os._exit(0)  # all is saved; to take torch down in order would keep the replacement waiting


class OtherCode(Exception):
    """The driver has planned with other code than runs here: its key would stand for results of this one."""


def run_job(
    job: dict[str, Any], target: Callable[..., RunOutcome], pipe: EventPipe, interrupt: Interrupt
) -> RunOutcome | None:
    """Train one job with stdout and stderr in its log. Its folder holds an outcome afterwards.

    Whatever happens, but for a full disk, which raises its ``OSError``, and :class:`OtherCode`.
    """
    runs = Path(job["runs"])
    identity = RunIdentity(**job["identity"])
    folder = run_folder(runs, identity.sweep, identity.key)
    folder.mkdir(parents=True, exist_ok=True)

    def on_progress(progress: Progress) -> None:
        interrupt.check()
        pipe.progress(progress)
        if identity.role == "tuning" and (reason := prune_reason(folder)):
            raise Pruned(reason)

    with output_to(folder / "log.txt"):
        pipe.send("started")
        write_attempt(folder)
        try:
            config = ExperimentConfig.parse(job["config"], f"job {identity.key}")
            if config.key() != identity.key:
                raise OtherCode(
                    "its code has been edited since it was started, or is another on this machine; start it again"
                )
            tracking = _tracking(job["tracking"])
            with interrupt.around_training():
                target(config, identity, runs, tracking=tracking, on_progress=on_progress)
        except OtherCode:
            raise
        except Interrupted:
            _leave(folder, identity, job, RunOutcome("killed", "interrupted before it could save its state"))
        except Exception as error:
            if isinstance(error, OSError) and is_full(error):
                raise
            traceback.print_exc()
            _leave(folder, identity, job, RunOutcome("failed", f"{type(error).__name__}: {error}"))
    return read_outcome(folder)


def load_target(text: str) -> Callable[..., RunOutcome]:
    module, _, name = text.partition(":")
    return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send stdout and stderr, also those of C code and child processes, to the end of a file."""
    kept = [os.dup(1), os.dup(2)]
    with open(path, "ab") as file:
        _redirect([file.fileno(), file.fileno()])
        try:
            yield
        finally:
            _redirect(kept)
            for descriptor in kept:
                os.close(descriptor)


def _redirect(descriptors: list[int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for standard, descriptor in zip((1, 2), descriptors, strict=True):
        os.dup2(descriptor, standard)


def _private_stdin() -> TextIO:
    """The stream of jobs, moved away from descriptor 0: a training that reads stdin must not eat jobs."""
    jobs = os.dup(0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    return open(jobs, encoding="utf-8")


def _set_threads(n_threads: int) -> None:
    torch = sys.modules.get("torch")  # imported by the target; one without torch needs none here
    if torch is not None:
        torch.set_num_threads(n_threads)


def release_gpu_memory() -> None:
    """Give back what the last run had of the GPU: its neighbours there have none of what torch keeps for this process.

    The collection comes first, since a trainer and its callbacks hold each other.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def _tracking(values: dict[str, str] | None) -> Any:
    if values is None:
        return None
    from experiments.run import TrackingTarget

    return TrackingTarget(**values)


def _leave(folder: Path, identity: RunIdentity, job: dict[str, Any], outcome: RunOutcome) -> None:
    """Record an outcome that the training could not record itself."""
    if read_json(folder / "run.json") is None:
        write_identity(folder, identity, job["config"])
    if read_outcome(folder) is None:
        write_outcome(folder, outcome)


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, allow_nan=False).encode() + b"\n"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sweeps.worker", description="Started by the driver of a sweep.")
    parser.add_argument("--events", type=int, required=True, help="descriptor of the event pipe")
    parser.add_argument("--driver", type=int, required=True, help="process to die with")
    parser.add_argument("--threads", type=int, required=True, help="torch threads")
    parser.add_argument("--target", default=TARGET, help="module:function that runs one experiment")
    parser.add_argument("--plugin", action="append", default=[], help="file that registers mixers")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
