"""Showing a sweep while it runs: a live display on a terminal, lines elsewhere, JSON for programs, or nothing."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sweeps.events import Chosen, Event, Note, RunEnded, RunProgress, RunRetried, RunStarted, SweepEnded, SweepStarted
from sweeps.keys import Keys

REFRESH_EVERY_S = 0.25
BAR_WIDTH = 24
# Lines of the display beside workers and table, and the fewest table rows that are worth showing.
N_FRAME_LINES = 9
MIN_ROWS = 4
# Orders of the table: as begun, by name, or the best value first.
SORTS = ("begun", "arm", "cell", "best", "mean")


class View:
    """Takes events. This one shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def show(self, event: Event) -> None:
        """Something has happened."""

    def tick(self) -> None:
        """Called several times a second."""


@dataclass
class JsonView(View):
    """Every event as one JSON line."""

    write: Callable[[str], Any]

    def show(self, event: Event) -> None:
        self.write(json.dumps(event.to_json(), allow_nan=False))


@dataclass
class LineView(View):
    """A line per finished run: for logs, and terminals that can't redraw."""

    write: Callable[[str], Any]

    def show(self, event: Event) -> None:
        if (text := line_of(event)) is not None:
            self.write(text)


@dataclass
class WorkerRow:
    """What a worker is doing."""

    arm: str
    cell: str
    role: str
    step: int = 0
    n_steps: int = 0
    metrics: str = ""


@dataclass
class ArmCellRow:
    """What is known of an arm-cell so far."""

    n_tuned: int = 0
    n_replicates: int = 0
    n_bad: int = 0
    values: list[float] = field(default_factory=list)
    best: float | None = None
    note: str = ""

    @property
    def mean(self) -> float | None:
        return sum(self.values) / len(self.values) if self.values else None


@dataclass
class LiveView(View):
    """Overall bar with time left, a bar per worker, and a table of arms and cells; redrawn at most 4 times a second.

    ``sort``: one of ``SORTS``; the key ``s`` takes the next.
    """

    console: Console
    sort: str = SORTS[0]
    clock: Callable[[], float] = time.monotonic
    started: SweepStarted | None = None
    n_done: int = 0
    n_runs: int = 0
    n_ended_here: int = 0
    workers: dict[int, WorkerRow] = field(default_factory=dict)
    arm_cells: dict[tuple[str, str], ArmCellRow] = field(default_factory=dict)
    _keys: Keys = field(default_factory=Keys)
    _live: Live | None = None
    _started_at: float = 0.0
    _drawn_at: float = -math.inf

    def __enter__(self) -> Self:
        self._live = Live(console=self.console, auto_refresh=False, transient=False, redirect_stdout=False)
        self._live.start()
        self._keys.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._keys.__exit__()
        self.draw()
        self._live.stop()

    def show(self, event: Event) -> None:
        self.take(event)
        # Failures and notes scroll by above the display; everything else shows within it.
        bad = isinstance(event, RunEnded) and event.worker is not None and event.outcome not in ("finished", "pruned")
        if bad or isinstance(event, (SweepStarted, Note, RunRetried, SweepEnded)):
            self.console.print(Text(line_of(event) or ""))

    def tick(self) -> None:
        n_pressed = self._keys.pressed().count("s")
        self.sort = SORTS[(SORTS.index(self.sort) + n_pressed) % len(SORTS)]
        if n_pressed or self.clock() - self._drawn_at >= REFRESH_EVERY_S:
            self.draw()

    def draw(self) -> None:
        self._drawn_at = self.clock()
        self._live.update(self.render(), refresh=True)

    def take(self, event: Event) -> None:
        """Remember what the display needs of an event."""
        if isinstance(event, SweepStarted):
            self.started, self._started_at = event, self.clock()
            self.n_done, self.n_runs = event.n_done, event.n_runs
        elif isinstance(event, RunStarted):
            role = f"trial {event.trial}" if event.trial is not None else f"seed {event.seed}"
            self.workers[event.worker] = WorkerRow(event.arm, event.cell, role)
            self.arm_cells.setdefault((event.arm, event.cell), ArmCellRow())
        elif isinstance(event, RunProgress) and event.worker in self.workers:
            row = self.workers[event.worker]
            row.step, row.n_steps = event.step, event.n_steps
            row.metrics = metrics_text(event.metrics) or event.note
        elif isinstance(event, RunRetried):
            self.workers.pop(event.worker, None)
        elif isinstance(event, Chosen):
            row = self.arm_cells.setdefault((event.arm, event.cell), ArmCellRow())
            row.note = event.reason if event.settings is None else settings_text(event.settings)
        elif isinstance(event, RunEnded):
            self._take_end(event)

    def _take_end(self, event: RunEnded) -> None:
        self.n_done, self.n_runs = event.n_done, event.n_runs
        if event.worker is not None:
            self.n_ended_here += 1
            self.workers.pop(event.worker, None)
        row = self.arm_cells.setdefault((event.arm, event.cell), ArmCellRow())
        row.n_bad += event.outcome in ("failed", "diverged")
        if event.role == "replicate":
            row.n_replicates += 1
            row.values += [event.value] if event.value is not None else []
            return
        row.n_tuned += 1
        if event.outcome == "finished" and event.value is not None:
            better = max if self.started.direction == "maximize" else min
            row.best = event.value if row.best is None else better(row.best, event.value)

    def render(self) -> RenderableType:
        if self.started is None:
            return Text("")
        return Group(self._overall(), self._worker_table(), self._arm_cell_table())

    def _overall(self) -> RenderableType:
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(self.n_runs, 1), completed=self.n_done, width=2 * BAR_WIDTH)
        head.add_row(
            Text(self.started.sweep, style="bold"), bar, Text(f"{self.n_done}/{self.n_runs} runs"), self._left()
        )
        return head

    def _left(self) -> Text:
        """Time left, from what this start has finished so far."""
        if not self.n_ended_here or self.n_done >= self.n_runs:
            return Text("")
        spent_s = self.clock() - self._started_at
        return Text(f"about {duration(spent_s / self.n_ended_here * (self.n_runs - self.n_done))} left")

    def _worker_table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for number, row in sorted(self.workers.items()):
            bar = ProgressBar(total=max(row.n_steps, 1), completed=row.step, width=BAR_WIDTH)
            steps = Text(f"{row.step}/{row.n_steps}" if row.n_steps else "starting")
            where = Text(f"{row.arm} | {row.cell} | {row.role}")
            table.add_row(Text(str(number), style="dim"), bar, steps, where, Text(row.metrics, style="dim"))
        return table

    def _arm_cell_table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for heading in ("arm", "cell"):
            table.add_column(heading)
        for heading in ("tuned", "seeds", "bad", f"best {self.started.select}", f"mean {self.started.report}"):
            table.add_column(heading, justify="right")
        table.add_column("chosen")
        rows = self._sorted()
        room = max(MIN_ROWS, self.console.height - N_FRAME_LINES - len(self.workers))
        is_cut = len(rows) > room
        words = [f"sorted by {self.sort}"] if self.sort != SORTS[0] else []
        words += ["s: sort by another"] if self._keys.listens else []
        words += [f"{room} of {len(rows)}; all: mixlab sweep status {self.started.sweep}"] if is_cut else []
        table.caption = ", ".join(words) or None
        for (arm, cell), row in rows[-room:] if self.sort == SORTS[0] else rows[:room]:
            counts = (str(row.n_tuned or "-"), str(row.n_replicates or "-"), str(row.n_bad or "-"))
            cells = (arm, cell, *counts, number_text(row.best), number_text(row.mean), row.note)
            table.add_row(*(Text(text) for text in cells))
        return table

    def _sorted(self) -> list[tuple[tuple[str, str], ArmCellRow]]:
        rows = list(self.arm_cells.items())
        if self.sort in ("arm", "cell"):
            return sorted(rows, key=lambda item: item[0][self.sort == "cell"])
        if self.sort == SORTS[0]:
            return rows
        sign = -1 if self.started.direction == "maximize" else 1
        values = [row.best if self.sort == "best" else row.mean for _, row in rows]
        keys = [(value is None, 0.0 if value is None else sign * value) for value in values]
        return [rows[i] for i in sorted(range(len(rows)), key=keys.__getitem__)]


def view_for(*, as_json: bool, quiet: bool, sort: str = SORTS[0], stream: TextIO | None = None) -> View:
    """JSON lines or results on stdout; the live display where that is a terminal."""
    stream = stream or sys.stdout

    def write(line: str) -> None:
        print(line, file=stream, flush=True)

    if as_json:
        return JsonView(write)
    if quiet:
        return View()
    console = Console(file=stream)
    return LiveView(console, sort) if console.is_terminal and not console.is_dumb_terminal else LineView(write)


def line_of(event: Event) -> str | None:
    """An event in one line; None for those that are only progress, and for runs that were done before."""
    if isinstance(event, SweepStarted):
        workers = f"{event.n_workers} worker" + ("s" if event.n_workers != 1 else "")
        return f"{event.sweep}: {event.count}; {event.n_done} of {event.n_runs} done; {workers}"
    if isinstance(event, Note):
        return event.message
    if isinstance(event, RunRetried):
        return f"{event.arm} | {event.cell} | {event.key}: {event.reason}; it is tried again"
    if isinstance(event, Chosen):
        if event.settings is None:
            return f"{event.arm} | {event.cell}: {event.reason}"
        return f"{event.arm} | {event.cell}: chosen {settings_text(event.settings)} ({number_text(event.value)})"
    if isinstance(event, RunEnded) and event.worker is not None:
        role = f"trial {event.trial}" if event.trial is not None else f"seed {event.seed}"
        result = f": {event.reason}" if event.outcome != "finished" else f" {number_text(event.value)}"
        where = f"[{event.n_done}/{event.n_runs}] {event.arm} | {event.cell} | {role}"
        return f"{where}: {event.outcome}{result} ({duration(event.wall_s)})"
    if isinstance(event, SweepEnded):
        counts = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in event.outcomes.items()) or "nothing to run"
        ending = "interrupted; the same command continues" if event.interrupted else "done"
        return f"{event.sweep}: {ending}: {counts} ({duration(event.wall_s)})"
    return None


def metrics_text(metrics: dict[str, float | None]) -> str:
    """The newest metrics of a whole run; those of single layers have more than one slash."""
    shown = [(name, value) for name, value in metrics.items() if name.count("/") == 1 and value is not None]
    return "  ".join(f"{name} {number_text(value)}" for name, value in shown[:3])


def settings_text(settings: dict[str, Any]) -> str:
    parts = (f"{path.rpartition('.')[2]}={number_text(value)}" for path, value in settings.items())
    return ", ".join(parts)


def number_text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """``3.2 s``, ``4 min 05 s``, ``2 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
