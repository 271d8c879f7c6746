"""``python -m tests.chaos``: every fault, and one table.

Exit code 0: all were survived; 1: one was not; 3: none was seen to fail, but the time did not suffice for all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.faults import FAULTS, SIXTY, Fault, Skipped
from tests.chaos.sandbox import SWEEP, Sandbox
from tests.chaos.truth import Found, judge, read_found

# Two cores are busy with three faults at a time: most wait for something, half a minute long, most of the time.
N_LANES = 3
# The undisturbed sweeps run beside the first faults.
TRUTH_PATIENCE_S = 600.0
NO_TIME_EXIT_CODE = 3


@dataclass
class Row:
    """What came of one fault. ``skipped``: why this machine can't make it; ``no_time``: why nobody knows."""

    fault: str
    injected: int = 0
    lost: int = 0
    doubled: int = 0
    differing: int = 0
    recover_s: list[float] = field(default_factory=list)
    left_behind: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    skipped: str = ""
    no_time: str = ""

    @property
    def bad(self) -> bool:
        found = self.lost or self.doubled or self.differing or self.left_behind or self.problems
        return bool(found) and not self.no_time

    @property
    def state(self) -> str:
        """In a word: ``ok``, ``BAD``, ``no time`` or ``skipped``."""
        if self.no_time:
            return "no time"
        return "BAD" if self.bad else "skipped" if self.skipped else "ok"


def undisturbed(text: str, deadline: float = math.inf) -> Found:
    """The sweep that nothing happens to."""
    if time.monotonic() > deadline:
        raise AssertionError("no time for it")
    sandbox = Sandbox(text=text, deadline=deadline)
    try:
        sandbox.start()
        if sandbox.finish(patience_s=TRUTH_PATIENCE_S) != 0:
            raise RuntimeError(f"the undisturbed sweep failed: {sandbox.errors()}")
        return read_found(sandbox.runs)
    finally:
        sandbox.left_behind()  # of one that was cut short
        sandbox.remove()


def run_fault(
    name: str, fault: Fault, truth: Callable[[], Found], seed: int, keep: bool = False, deadline: float = math.inf
) -> Row:
    """One fault in a sandbox of its own, then judged beside the ``truth``.

    From what the deadline cuts short nothing is concluded: it had no time.
    """
    row, started = Row(name), time.monotonic()
    sandbox = fault.sandbox(seed, deadline)
    try:
        fault.make(sandbox)
    except Skipped as reason:
        row.skipped = str(reason)
    except Exception as error:  # noqa: BLE001  the row says it, and the other faults still have their turn
        if time.monotonic() > deadline:
            row.no_time = f"cut short after {time.monotonic() - started:.0f} s"
        row.problems.append(f"{type(error).__name__}: {error}")
        if not isinstance(error, AssertionError) and not row.no_time:
            traceback.print_exc()
    try:
        n_left = sandbox.left_behind()
        row.left_behind = 0 if row.no_time else n_left
        row.injected, row.recover_s = len(sandbox.faults_at), sandbox.recover_s()
        if not row.skipped and not row.no_time:
            verdict = judge(sandbox, truth())
            row.lost, row.doubled, row.differing = len(verdict.lost), len(verdict.doubled), len(verdict.differing)
            row.problems += verdict.problems
            if row.injected < fault.n:
                row.problems.append(f"injected {row.injected} times, not {fault.n}")
    except Exception as error:  # noqa: BLE001
        if time.monotonic() > deadline:
            row.no_time = "not judged"
        row.problems.append(f"no verdict: {type(error).__name__}: {error}")
        traceback.print_exc()
    row.seconds = time.monotonic() - started
    if keep and row.bad:
        row.problems.append(f"kept: {sandbox.folder}")
    else:
        sandbox.remove()
    return row


def run_all(names: list[str], seconds: float, seed: int, keep: bool) -> list[Row]:
    """All faults, some at a time, as long as the time lasts. One that it does not last for is neither good nor bad."""
    deadline = time.monotonic() + seconds
    console = Console(stderr=True)

    def one(name: str) -> Row:
        if time.monotonic() > deadline:
            row = Row(name, no_time=f"not begun within {seconds:g} s")
        else:
            row = run_fault(name, FAULTS[name], truths[FAULTS[name].sixty].result, seed, keep, deadline)
        console.print(f"{name}: {row.state}, {row.seconds:.0f} s")
        return row

    with ThreadPoolExecutor(N_LANES) as lanes, ThreadPoolExecutor(1) as first:
        wanted = sorted({FAULTS[name].sixty for name in names})
        truths = {sixty: first.submit(undisturbed, SIXTY if sixty else SWEEP, deadline) for sixty in wanted}
        return list(lanes.map(one, names))


def table(rows: list[Row]) -> Table:
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("fault", no_wrap=True)
    for heading in (
        "times",
        "runs\nlost",
        "runs\ndoubled",
        "results\ndiffering",
        "recovered in\nmedian s",
        "longest s",
    ):
        shown.add_column(heading, justify="right")
    shown.add_column("processes\nleft", justify="right")
    shown.add_column("")
    for row in rows:
        took = sorted(row.recover_s)
        times = [f"{took[len(took) // 2]:.1f}", f"{took[-1]:.1f}"] if took else ["-", "-"]
        counts = [str(n) for n in (row.injected, row.lost, row.doubled, row.differing)]
        why = row.no_time or "; ".join(row.problems) or row.skipped
        shown.add_row(row.fault, *counts, *times, str(row.left_behind), f"{row.state}: {why}" if why else row.state)
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.chaos", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=600.0, help="the time for all of them together")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--keep", action="store_true", help="keep the folders of faults that were not survived")
    options = parser.parse_args()
    started = time.monotonic()
    rows = run_all(options.only, options.seconds, options.seed, options.keep)
    Console(width=None if sys.stdout.isatty() else 160).print(table(rows))
    without = [row.fault for row in rows if row.no_time]
    print(f"{sum(row.injected for row in rows)} faults in {time.monotonic() - started:.0f} s")
    if without:
        print(f"no time for {len(without)} of {len(rows)}: python -m tests.chaos --only {' '.join(without)}")
    if options.json:
        Path(options.json).write_text(
            json.dumps([{**asdict(row), "state": row.state} for row in rows], indent=1) + "\n", encoding="utf-8"
        )
    return 1 if any(row.bad for row in rows) else NO_TIME_EXIT_CODE if without else 0


if __name__ == "__main__":
    sys.exit(main())
