"""One driver per sweep: a lock on its folder that the system lets go of when the process ends, however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.errors import UserError

LOCK_FILE = ".lock"
# Whoever only asks whether a driver runs holds the lock for an instant: a driver waits that long before it gives up.
PATIENCE_S = 0.5


@contextmanager
def driver_lock(folder: Path) -> Iterator[bool]:
    """Hold the sweep's lock; :class:`UserError` names the process that holds it already.

    Gives whether the last driver was lost: one that ends in order takes its name out of the file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: records can't be written there: {error.strerror}; choose another place with --runs"
        ) from None
    with open(folder / LOCK_FILE, "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + PATIENCE_S
        while not _try(file.fileno(), fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise UserError(
                    f"sweep {folder.name} is already being run by {_holder(folder)}; stop that one first, or wait"
                )
            time.sleep(0.02)
        was_lost = os.fstat(file.fileno()).st_size > 0
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        yield was_lost
        file.truncate(0)


def driver_runs(folder: Path) -> bool:
    """Whether some process holds the sweep's lock now."""
    try:
        with open(folder / LOCK_FILE, encoding="utf-8") as file:
            return not _try(file.fileno(), fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def driver_process(folder: Path) -> tuple[int, str] | None:
    """Process number and host of the driver that holds the sweep's lock now, None without one."""
    if not driver_runs(folder):
        return None
    try:
        holder = json.loads((folder / LOCK_FILE).read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return None
    return holder["pid"], holder["host"]


def _try(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / LOCK_FILE).read_text(encoding="utf-8"))
    except json.JSONDecodeError:  # the other one has the lock, and has not yet written its name
        return "another process"
    return f"process {holder['pid']} on {holder['host']}"
