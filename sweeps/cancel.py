"""Ending a sweep from another terminal."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

from experiments.errors import UserError
from sweeps.lock import driver_process, driver_runs
from sweeps.saved import read_saved

POLL_S = 0.05


def cancel(runs: Path, name: str, wait_s: float) -> int:
    """Ask the driver of the sweep ``name`` to end as Ctrl-C does, and wait until it has; return its process number.

    Raises:
        UserError: the sweep is unknown, no driver runs it, it runs on another machine, or it has not ended in time.
    """
    read_saved(runs, name)
    found = driver_process(runs / name)
    if found is None:
        raise UserError(f"sweep {name}: no driver is running it; mixlab sweep status {name} shows where it stands")
    process, host = found
    if host != socket.gethostname():
        raise UserError(f"sweep {name}: it is run by process {process} on {host}; cancel it there")
    os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + wait_s
    while driver_runs(runs / name):
        if time.monotonic() > deadline:
            raise UserError(
                f"sweep {name}: process {process} has not ended after {wait_s:g} s; kill -9 {process} ends it"
            )
        time.sleep(POLL_S)
    return process
