"""The mirror of one training while it runs: a thread, a bounded buffer, and a bound on what a bad store can cost."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.records import RunIdentity, RunOutcome, RunRecord
from experiments.tracking import mirror, schema, unsynced
from experiments.tracking.client import client_of, load_mlflow, one_line
from experiments.tracking.schema import Point
from experiments.tracking.store import sqlite_path

FLUSH_POINTS = schema.MAX_METRICS_PER_CALL
FLUSH_EVERY_S = 2.0
MAX_BUFFERED_POINTS = 50_000
# The longest that the end of a run waits for the store: one that has answered so far, and one whose last call failed.
FINISH_BUDGET_S = 5.0
AILING_BUDGET_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0  # after a call that failed; doubles
CLOSING_PAUSE_S = 0.2  # between tries to close a run

# Of this process, by URI: stores whose last call failed, and a lock, so that threads that were left behind with a
# store that hangs do not add up.
_ailing: set[str] = set()
_calls: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


class RunTracker:
    """Mirrors one run to MLflow. No method raises, and only ``finish`` waits for the store, within a budget.

    Calls are made by one thread, in order. Points of a call that failed are kept and sent again, up to
    ``MAX_BUFFERED_POINTS``; MLflow keeps a point that arrives twice single. Beyond that they are dropped, and
    ``finish`` fills the gaps from the record on disk. Where the budget of ``finish`` does not suffice, the record is
    marked as unsynced, and ``sync`` does the rest.

    run_id: the MLflow run, "" as long as the store has not answered.
    behind: MLflow lacks something that the record has.
    problem: what the store answered last, when it failed.
    seconds: time that the training has spent here so far, waiting included.
    """

    def __init__(
        self,
        uri: str,
        experiment_id: str,
        identity: RunIdentity,
        config: dict[str, Any],
        *,
        parent_id: str | None,
        tags: dict[str, str],
    ) -> None:
        self.uri, self.experiment_id = uri, experiment_id
        self.identity, self.config, self.parent_id, self.tags = identity, config, parent_id, tags
        self.run_id = ""
        self.behind = False
        self.problem = ""
        self.seconds = 0.0
        self._buffer: list[Point] = []
        self._buffer_lock = threading.Lock()
        self._last_time_ms = 0
        self._seen_steps: dict[str, int] = {}  # last step in MLflow by metric, of an earlier try
        self._latest: dict[str, Point] = {}  # last point given, by metric
        self._has_gaps = False  # of an earlier try, or of points dropped
        self._pause_s = FLUSH_EVERY_S
        self._ending: tuple[RunOutcome, Path] | None = None
        self._due, self._done, self._left_behind = threading.Event(), threading.Event(), threading.Event()

    def start(self, run_id: str = "") -> None:
        """Begin to open the run ``run_id``, or the one of the same key, or a new one."""
        with self._timed():
            load_mlflow(self.uri)  # here, since two threads that import at once may see half of a module
            # A daemon: the process must be able to end while a call hangs.
            threading.Thread(target=self._work, args=(run_id,), name="mixlab-tracking", daemon=True).start()

    def log(self, metrics: dict[str, float], step: int, time_ms: int) -> None:
        """Take the metrics of a step; ``time_ms`` since the epoch, as in the record."""
        with self._timed():
            self._last_time_ms = max(self._last_time_ms, time_ms)
            points = schema.points(metrics, step, time_ms)
            self._latest.update((p.name, p) for p in points)
            with self._buffer_lock:
                self._buffer += points
                if len(self._buffer) > MAX_BUFFERED_POINTS:
                    self._buffer.clear()
                    self._has_gaps = True
                is_full = len(self._buffer) >= FLUSH_POINTS
            if is_full and not self.problem:
                self._due.set()

    def finish(self, outcome: RunOutcome, folder: Path) -> None:
        """Write what is buffered, the final metrics and how the run ended; ``folder`` holds its record."""
        with self._timed():
            self._ending = outcome, folder
            self._due.set()
            budget_s = AILING_BUDGET_S if self.uri in _ailing else FINISH_BUDGET_S
            if self._done.wait(budget_s):
                unsynced.unmark(folder)
                return
            self.abandon()
            _ailing.add(self.uri)
            self.behind = True
            self.problem = self.problem or f"no answer within {budget_s:g} s"
            unsynced.mark(folder, self.problem)

    def abandon(self) -> None:
        """End the thread after the call that it is in; what is buffered is lost, as at the end of the process."""
        self._left_behind.set()
        self._due.set()

    def _work(self, run_id: str) -> None:
        self._call(lambda: self._open(run_id))
        while self._ending is None:
            self._due.wait(self._pause_s)
            self._due.clear()
            if self._left_behind.is_set():
                return
            if self._ending is None and self._buffer:
                self._call(self._write)
        outcome, folder = self._ending
        while not self._left_behind.is_set():
            if self._call(lambda: self._close(outcome, folder)):
                self._done.set()
                return
            self._left_behind.wait(CLOSING_PAUSE_S)

    def _call(self, call: Callable[[], None]) -> bool:
        """Make a call, unless another one of this process still hangs. Whether it succeeded."""
        while not _calls[self.uri].acquire(timeout=0.1):
            if self._left_behind.is_set():
                return False
        try:
            self._check_store()
            call()
        except Exception as error:  # noqa: BLE001 - boundary: MLflow, SQLAlchemy and HTTP raise anything
            self.behind, self.problem = True, one_line(error)
            self._pause_s = FIRST_PAUSE_S if self.uri not in _ailing else min(2 * self._pause_s, LONGEST_PAUSE_S)
            _ailing.add(self.uri)
            return False
        finally:
            _calls[self.uri].release()
        self._pause_s, self.behind, self.problem = FLUSH_EVERY_S, False, ""
        _ailing.discard(self.uri)
        return True

    def _open(self, run_id: str = "") -> None:
        self._stop_if_left_behind()
        client = client_of(self.uri)
        run, was_there = mirror.open_run(
            client,
            self.experiment_id,
            self.identity,
            self.config,
            parent_id=self.parent_id,
            tags=self.tags,
            run_id=run_id,
        )
        if was_there:
            self._seen_steps = mirror.last_steps(client, run)
            self._has_gaps = True
        self.run_id = run.info.run_id

    def _write(self) -> None:
        if not self.run_id:
            self._open()
        with self._buffer_lock:
            taken, self._buffer = self._buffer, []
        try:
            new = [p for p in taken if p.step > self._seen_steps.get(p.name, -1)]
            mirror.log_points(client_of(self.uri), self.run_id, new)
        except BaseException:
            with self._buffer_lock:
                self._buffer = taken + self._buffer
            raise

    def _close(self, outcome: RunOutcome, folder: Path) -> None:
        if not self.run_id:
            self._open()
        client = client_of(self.uri)
        if self._has_gaps:
            record = RunRecord(folder, self.identity, self.config, outcome)
            run = client.get_run(self.run_id)
            run = mirror.bring_up_to_date(
                client, self.experiment_id, record, run, parent_id=self.parent_id, tags=self.tags
            )
            self.run_id = run.info.run_id
            return
        self._write()
        final_time_ms = self._last_time_ms + 1 if self._last_time_ms else mirror.final_time_ms([])
        given = {mirror.without_time(p) for p in self._latest.values()}
        final = [p for p in schema.final_points(outcome, final_time_ms) if mirror.without_time(p) not in given]
        mirror.log_points(client, self.run_id, final)
        self._stop_if_left_behind()
        mirror.close_run(client, self.run_id, folder, outcome)

    def _stop_if_left_behind(self) -> None:
        """From then on ``sync`` may be at work on this run."""
        if self._left_behind.is_set():
            raise TimeoutError("the run has ended")

    def _check_store(self) -> None:
        """A store that isn't there is not created here: processes that do so at once spoil it."""
        path = sqlite_path(self.uri)
        if path is not None and not path.exists():
            raise FileNotFoundError(f"there is no store {path}")

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started_s = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - started_s
