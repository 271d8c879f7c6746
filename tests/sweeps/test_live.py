"""What a sweep shows while it runs."""

from __future__ import annotations

import io
import json
import os
import termios
import time
from dataclasses import replace

import pytest
from rich.console import Console

from sweeps.cli import SORTS as commands_sorts
from sweeps.events import Chosen, Note, RunEnded, RunProgress, RunRetried, RunStarted, SweepEnded, SweepStarted
from sweeps.keys import Keys
from sweeps.live import SORTS, JsonView, LineView, LiveView, View, duration, view_for

STARTED = SweepStarted("s", "why?", "2 arms x 1 cell", 8, 2, 2, "minimize", "select/loss", "report/loss")
PROGRESS = RunProgress("k1", "gdn", "all", 0, 5, 20, {"train/loss": 0.25, "mixer/0/gate": 1.0})


def run_ended(value: float | None, role: str = "tuning", outcome: str = "finished", worker: int | None = 0) -> RunEnded:
    trial = 3 if role == "tuning" else None
    return RunEnded("k1", "gdn", "all", role, 0, trial, outcome, "why it ended", value, 1.5, 3, 8, worker)


def shown(events, *, height: int = 40, seconds: float = 0.0) -> str:
    """The text of the display after these events, of which the first came ``seconds`` ago."""
    console = Console(file=io.StringIO(), width=160, height=height, force_terminal=False)
    times = iter([0.0])
    view = LiveView(console, clock=lambda: next(times, seconds))
    for event in events:
        view.take(event)
    console.print(view.render())
    return console.file.getvalue()


def test_the_display_has_total_workers_and_arm_cells():
    started = RunStarted("k1", "gdn", "all", "tuning", 0, 3, 0)
    text = shown([STARTED, started, PROGRESS])
    assert "2/8 runs" in text
    assert "5/20 gdn | all | trial 3 train/loss 0.25" in " ".join(text.split())
    assert "mixer/0/gate" not in text


def test_time_left_is_from_the_runs_of_this_start():
    assert "about 10.0 s left" in shown([STARTED, run_ended(1.0)], seconds=2.0)
    assert "left" not in shown([STARTED, run_ended(1.0, worker=None)], seconds=2.0)


def test_best_follows_the_direction_and_diverged_trials_are_counted_apart():
    events = [STARTED, run_ended(0.5), run_ended(0.25), run_ended(0.01, outcome="diverged")]
    events += [run_ended(0.3, role="replicate"), run_ended(0.5, role="replicate")]
    row = next(
        line
        for line in shown([*events, Chosen("gdn", "all", {"train.lr": 0.001}, 0.25, "")]).splitlines()
        if "gdn" in line
    )
    assert row.split() == ["gdn", "all", "3", "2", "1", "0.25", "0.4", "lr=0.001"]


def test_the_table_is_sorted_as_asked_and_by_the_key_s():
    ends = [("b", 0.5), ("a", 0.25), ("c", None)]
    events = [STARTED] + [replace(run_ended(value), arm=arm, worker=None) for arm, value in ends]
    main, terminal = os.openpty()
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    view = LiveView(console, _keys=OursKeys(terminal))
    try:
        with view:
            for event in events:
                view.take(event)
            orders = []
            for _ in SORTS:
                lines = [line.split() for line in console_text(view.render()).splitlines()]
                orders.append("".join(line[0] for line in lines if line[:1] and line[0] in ("a", "b", "c")))
                os.write(main, b"s")
                deadline = time.monotonic() + 60
                before = view.sort
                while view.sort == before and time.monotonic() < deadline:
                    view.tick()
        assert orders == ["bac", "abc", "bac", "abc", "bac"]  # begun, arm, cell, best (lower is better), mean
        assert termios.tcgetattr(terminal)[3] & termios.ECHO  # as it was
    finally:
        os.close(main)
        os.close(terminal)
    assert commands_sorts == SORTS


class OursKeys(Keys):
    """The test's terminal is nobody's foreground."""

    def _is_ours(self):
        return True


def console_text(renderable):
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()


def test_a_long_table_fits_the_terminal():
    events = [STARTED, *(RunStarted(f"k{i}", f"arm{i}", "all", "replicate", 0, None, 0) for i in range(50))]
    text = shown(events, height=20)
    assert len(text.splitlines()) <= 20
    assert "arm49" in text
    assert "arm1 " not in text
    assert "10 of 50; all: mixlab sweep status s" in text


def test_lines_without_a_terminal():
    lines: list[str] = []
    view = LineView(lines.append)
    events = [STARTED, PROGRESS, run_ended(0.5), run_ended(0.5, worker=None), run_ended(None, "replicate", "failed")]
    events += [
        RunRetried("k1", "gdn", "all", 0, "gone"),
        Chosen("gdn", "all", None, None, "not run: none"),
        Note("hear"),
    ]
    events += [SweepEnded("s", True, 3.0, {"finished": 2, "not_run": 1})]
    with view:
        for event in events:
            view.show(event)
            view.tick()
    assert lines == [
        "s: 2 arms x 1 cell; 2 of 8 done; 2 workers",
        "[3/8] gdn | all | trial 3: finished 0.5 (1.5 s)",
        "[3/8] gdn | all | seed 0: failed: why it ended (1.5 s)",
        "gdn | all | k1: gone; it is tried again",
        "gdn | all: not run: none",
        "hear",
        "s: interrupted; the same command continues: 2 finished, 1 not run (3.0 s)",
    ]


def test_json_lines_have_no_nan():
    lines: list[str] = []
    JsonView(lines.append).show(run_ended(float("nan")))
    assert json.loads(lines[0])["value"] is None
    assert json.loads(lines[0])["event"] == "run_ended"


def test_the_view_follows_flags_and_terminal():
    assert isinstance(view_for(as_json=True, quiet=False), JsonView)
    assert type(view_for(as_json=False, quiet=True)) is View
    assert isinstance(view_for(as_json=False, quiet=False, stream=io.StringIO()), LineView)


def test_the_live_display_is_drawn_at_most_four_times_a_second():
    now = [0.0]
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    view = LiveView(console, clock=lambda: now[0])
    n_drawn = 0

    def draw() -> None:
        nonlocal n_drawn
        n_drawn += 1
        LiveView.draw(view)

    view.draw = draw
    with view:
        view.show(STARTED)
        for i in range(1000):
            now[0] = i / 500
            view.tick()
        view.show(run_ended(None, outcome="diverged"))
    assert n_drawn <= 2 * 4 + 1
    assert "diverged: why it ended" in console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (245, "4 min 05 s"), (7620, "2 h 07 min"), (3599.9, "1 h 00 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
