"""The mirror of one training while it runs: a small buffer, and a bound on the time that a bad store can cost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.records import RunIdentity, RunOutcome
from experiments.tracking import mirror, schema
from experiments.tracking.client import client_of, one_line
from experiments.tracking.schema import Point
from experiments.tracking.store import sqlite_path

FLUSH_POINTS = schema.MAX_METRICS_PER_CALL
FLUSH_EVERY_S = 2.0
# The longest that a call may keep a training waiting.
START_BUDGET_S = 20.0
FLUSH_BUDGET_S = 2.0
FINISH_BUDGET_S = 10.0
FIRST_RETRY_S = 0.1  # within a call; doubles
FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 300.0  # between calls to a store that failed; doubles


class RunTracker:
    """Mirrors one run to MLflow. No method raises, and none waits longer than its budget.

    Calls are made in order and waited for, never in the background: nothing is lost at the end of a process. A call
    that fails is repeated within its budget; one that hangs is left behind when the budget is spent. What it carried
    is dropped then, ``behind`` is set, ``problem`` says why, and the store is left alone for a growing while.
    ``finish`` fills the gaps from the record on disk if it can, ``sync`` does otherwise.

    run_id: the MLflow run, "" as long as the store was out of reach.
    behind: MLflow lacks something that the record has.
    seconds: time spent here so far, waiting included.
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
        self._last_flush_s = time.monotonic()
        self._last_time_ms = 0
        self._seen_steps: dict[str, int] = {}  # last step in MLflow by metric, of an earlier try
        self._latest: dict[str, Point] = {}  # last point given, by metric
        self._pause_s = FIRST_PAUSE_S
        self._resting_until_s = 0.0
        self._resumed = False  # whether there may be gaps of an earlier try
        self._caller: threading.Thread | None = None

    def start(self, run_id: str = "") -> str:
        """Open the run ``run_id``, or the one of the same key, or a new one. Returns its id, "" if out of reach."""
        with self._timed():
            self._attempt(lambda: self._open(run_id), START_BUDGET_S)
            return self.run_id

    def log(self, metrics: dict[str, float], step: int, time_ms: int) -> None:
        """Take the metrics of a step; ``time_ms`` since the epoch, as in the record."""
        with self._timed():
            self._last_time_ms = max(self._last_time_ms, time_ms)
            points = schema.points(metrics, step, time_ms)
            self._latest.update((p.name, p) for p in points)
            self._buffer += [p for p in points if p.step > self._seen_steps.get(p.name, -1)]
            now = time.monotonic()
            if len(self._buffer) >= FLUSH_POINTS or now - self._last_flush_s >= FLUSH_EVERY_S:
                self._last_flush_s = now
                self._flush()

    def finish(self, outcome: RunOutcome, folder: Path) -> None:
        """Write what is buffered, the final metrics and how the run ended; ``folder`` holds its record."""
        with self._timed():
            buffered, self._buffer = self._buffer, []
            self._attempt(lambda: self._close(outcome, folder, buffered), FINISH_BUDGET_S)

    def _flush(self) -> None:
        points, self._buffer = self._buffer, []
        if time.monotonic() < self._resting_until_s:
            self.behind = True
            return
        self._attempt(lambda: self._write(points), FLUSH_BUDGET_S)

    def _open(self, run_id: str = "") -> None:
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
            self._resumed = True
        self.run_id = run.info.run_id

    def _write(self, points: list[Point]) -> None:
        if not self.run_id:
            self._open()
        mirror.log_points(client_of(self.uri), self.run_id, points)

    def _close(self, outcome: RunOutcome, folder: Path, buffered: list[Point]) -> None:
        if not self.run_id:
            self._open()
        client = client_of(self.uri)
        if self.behind or self._resumed:
            mirror.mirror_record(client, client.get_run(self.run_id), folder, outcome)
        else:
            final_time_ms = self._last_time_ms + 1 if self._last_time_ms else mirror.final_time_ms([])
            given = {mirror.without_time(p) for p in self._latest.values()}
            final = [p for p in schema.final_points(outcome, final_time_ms) if mirror.without_time(p) not in given]
            mirror.log_points(client, self.run_id, buffered + final)
            mirror.close_run(client, self.run_id, folder, outcome)
        self.behind = False

    def _attempt(self, call: Callable[[], None], budget_s: float) -> None:
        """Make a call within its budget. A thread of its own, since MLflow may wait for a lock or a server for
        minutes; a daemon, since the process must be able to end all the same."""
        deadline_s = time.monotonic() + budget_s
        if self._caller is not None:
            self._caller.join(budget_s)
            if self._caller.is_alive():
                self._fall_behind("an earlier call to the store still waits")
                return
        problems: list[str] = []
        succeeded = threading.Event()

        def work() -> None:
            pause_s = FIRST_RETRY_S
            while True:
                try:
                    self._check_store()
                    call()
                    succeeded.set()
                    return
                except Exception as error:  # noqa: BLE001 - boundary: MLflow, SQLAlchemy and HTTP raise anything
                    problems.append(one_line(error))
                    if isinstance(error, FileNotFoundError) or time.monotonic() + pause_s > deadline_s:
                        return
                time.sleep(pause_s)
                pause_s *= 2

        self._caller = threading.Thread(target=work, name="mixlab-tracking", daemon=True)
        self._caller.start()
        self._caller.join(max(0.0, deadline_s - time.monotonic()))
        if not self._caller.is_alive():
            self._caller = None
        if succeeded.is_set():
            self._pause_s, self._resting_until_s = FIRST_PAUSE_S, 0.0
            return
        self._fall_behind(problems[-1] if problems else f"no answer within {budget_s:g} s")

    def _check_store(self) -> None:
        """A store that isn't there is not created here: processes that do so at once spoil it."""
        path = sqlite_path(self.uri)
        if path is not None and not path.exists():
            raise FileNotFoundError(f"there is no store {path}")

    def _fall_behind(self, problem: str) -> None:
        self.behind, self.problem = True, problem
        self._resting_until_s = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started_s = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - started_s
