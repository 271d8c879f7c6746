"""A Ray cluster of several machines on this one, started as its users do: with ``ray start``."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE_S = 120.0
# The smallest that Ray allows; the sweep sends nothing but short messages.
OBJECT_STORE_BYTES = 80_000_000


@dataclass
class RayCluster:
    """A head and the machines that joined it, each a group of processes. ``folder``: a short path, for sockets."""

    folder: Path
    n_cpus: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    address: str = ""
    machines: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Whoever reaches the ports of a cluster runs code on it: without its token nobody does.
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
        self.environment = {**token, "RAY_USAGE_STATS_ENABLED": "0", **self.environment}
        self.folder.mkdir(parents=True, exist_ok=True)

    def start_head(self, *options: str) -> None:
        said = self._start("--head", "--port=0", "--include-dashboard=false", f"--temp-dir={self.folder}", *options)
        self.address = re.search(r"ray start --address='([^']+)'", said).group(1)

    def add_machine(self, *options: str) -> int:
        """One more; its number."""
        self._start(f"--address={self.address}", *options)
        return len(self.machines) - 1

    def kill_machine(self, number: int) -> None:
        """All processes that belong to it at once, as when its power fails; those of its jobs follow."""
        for pid in _of_session(self.machines[number].pid):
            _kill(pid)
        self.machines[number].wait()

    def stop(self) -> None:
        for number in reversed(range(len(self.machines))):
            self.kill_machine(number)

    def _start(self, *options: str) -> str:
        log = self.folder / f"start-{len(self.machines)}.log"
        command = [Path(sys.executable).parent / "ray", "start", *options, f"--num-cpus={self.n_cpus}"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats", "--block"]
        with open(log, "wb") as output:
            machine = subprocess.Popen(
                command,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.machines.append(machine)
        deadline = time.monotonic() + PATIENCE_S
        while "Ray runtime started" not in (said := log.read_text(encoding="utf-8", errors="replace")):
            if machine.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"ray start ended or did not come: {said[-500:]}")
            time.sleep(0.05)
        return said


def _of_session(leader: int) -> list[int]:
    """Processes of a session, whoever their parents are; workers of a sweep have sessions of their own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[3]) == leader:
                found.append(int(stat.parent.name))
        except OSError:  # it has just ended
            continue
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
