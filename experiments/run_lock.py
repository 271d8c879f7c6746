"""One process at a time in a run's folder: a lock that the system lets go of when the process ends, however it ends."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.errors import UserError

LOCK_FILE = ".lock"
# A worker that was just killed may take a moment to die: the next one waits that long.
PATIENCE_S = 10.0


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run's lock; :class:`UserError` where another process keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, "a", encoding="utf-8") as file:
        deadline_s = time.monotonic() + PATIENCE_S
        while not _try(file.fileno(), fcntl.LOCK_EX):
            if time.monotonic() > deadline_s:
                raise UserError(f"{folder}: another process is training this run; stop that one first, or wait")
            time.sleep(0.05)
        yield


def is_running(folder: Path) -> bool:
    """Whether some process trains the run in ``folder`` now."""
    try:
        with open(folder / LOCK_FILE, encoding="utf-8") as file:
            return not _try(file.fileno(), fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _try(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
