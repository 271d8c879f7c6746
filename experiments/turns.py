"""Whose turn it is on a device: trainings share it, and whoever times something has it alone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self

FOLDER = ".turns"


class Turns:
    """Two locked files per device of this machine, under the runs folder; the system lets go when a process ends.

    The machine's name is part of theirs: several may share the folder.

    A training takes a shared turn for each step, about 5 microseconds. A timing first closes the gate, so that no new
    step begins, then waits for the steps under way, and opens the gate when it is done: it waits for one step, not for
    the others' trainings, and no stream of steps can keep it out. Without a runs folder every turn is free.
    """

    def __init__(self, runs: Path | None = None, device: str = "cpu") -> None:
        self._gate: IO[bytes] | None = None
        self._work: IO[bytes] | None = None
        if runs is None:
            return
        # Processes may number the GPUs that they see differently.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all") if device.startswith("cuda") else ""
        name = (
            f"{socket.gethostname()}-{device}-{visible}".replace(":", "-")
            .replace(",", "-")
            .replace("/", "-")
            .strip("-")
        )
        folder = runs / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._gate = open(folder / f"{name}.gate", "wb")  # noqa: SIM115  open as long as this object
        self._work = open(folder / f"{name}.work", "wb")  # noqa: SIM115

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Held during one step of a training."""
        with contextlib.ExitStack() as held:
            with _locked(self._gate, fcntl.LOCK_SH):
                held.enter_context(_locked(self._work, fcntl.LOCK_SH))
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Held while something is timed."""
        with _locked(self._gate, fcntl.LOCK_EX), _locked(self._work, fcntl.LOCK_EX):
            yield

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        for file in (self._gate, self._work):
            if file is not None:
                file.close()


@contextlib.contextmanager
def _locked(file: IO[bytes] | None, how: int) -> Iterator[None]:
    if file is None:
        yield
        return
    fcntl.flock(file, how)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
