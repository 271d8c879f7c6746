"""Workers of a driver in this process, as forks of it: torch is imported here already, which takes each seconds.

What runs in them is ``sweeps.worker``, with the descriptors, the session and the environment that the executor gives.
That workers also start by themselves is tested by the drivers that are processes of their own.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import IO, Any, BinaryIO

import pytest

from sweeps import local_executor, worker


class ForkedWorker:
    """What the executor uses of ``subprocess.Popen``."""

    def __init__(
        self,
        command: Sequence[str],
        stdin: int,
        stdout: IO[bytes],
        stderr: IO[bytes],
        env: dict[str, str],
        pass_fds: tuple[int, ...],
        start_new_session: bool,
    ) -> None:
        assert (stdin, stdout, start_new_session) == (subprocess.PIPE, stderr, True)
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, since Python 3.12; none holds a lock here
            self.pid = os.fork()
        if self.pid == 0:
            _become(command, reading, stdout.fileno(), env, pass_fds)
        os.close(reading)
        self.stdin: BinaryIO = open(writing, "wb")  # noqa: SIM115
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, 0 if deadline is None else os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("sweeps.worker", timeout)
            else:
                time.sleep(0.005)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(
    command: Sequence[str], stdin: int, output: int, environment: dict[str, str], pass_fds: tuple[int, ...]
) -> None:
    """The rest of a fork's life: the module that ``command`` names, with its arguments."""
    status = 1
    try:
        gc.freeze()  # what the parent has is not to be finalised here
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        for descriptor, standard in ((stdin, 0), (output, 1), (output, 2)):
            os.dup2(descriptor, standard)
        for descriptor in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *pass_fds}:
            with contextlib.suppress(OSError):  # the folder's own
                os.close(descriptor)
        streams = [open(number, mode, closefd=False) for number, mode in enumerate("rww")]  # noqa: SIM115
        sys.stdin, sys.stdout, sys.stderr = streams
        warnings.resetwarnings()
        os.environ.clear()
        os.environ.update(environment)
        at = command.index("sweeps.worker")
        sys.argv = list(command[at:])
        worker.main(sys.argv[1:])
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:  # noqa: BLE001 (what the interpreter does with an error that nobody caught)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def forked_workers() -> Iterator[None]:
    shown: Any = SimpleNamespace(Popen=ForkedWorker, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_executor, "subprocess", shown)
        yield
