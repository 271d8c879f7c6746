"""``python -m sweeps.ray_reaper DRIVER SESSION``: ends what is left of a Ray when the driver that started it ends.

Ray's servers die with a driver that is killed; its agents (2.60) wait for the end of a pipe that each keeps open for
the other, and stay for ever. Waits for the end of stdin, of which only the driver has the other end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path


def main() -> None:
    driver, session = int(sys.argv[1]), sys.argv[2]
    sys.stdin.buffer.read()
    for pid in of_session(session) - {driver}:  # which may be about to end in order, with its logs still open
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def of_session(session: str) -> set[int]:
    """Processes of Ray that have a file of its session open: logs and sockets have its folder in their path."""
    return {
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if _is_of_ray(folder) and any(_target(link).startswith(session) for link in _links(folder))
    }


def _is_of_ray(folder: Path) -> bool:
    try:
        command = (folder / "cmdline").read_bytes()
    except OSError:  # it has just ended
        return False
    return command.startswith(b"ray::") or b"/site-packages/ray/" in command


def _links(folder: Path) -> list[Path]:
    try:
        return list((folder / "fd").iterdir())
    except OSError:  # it has just ended, or is somebody else's
        return []


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


if __name__ == "__main__":
    main()
