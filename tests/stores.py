"""Real tracking stores on loopback, ended with the test session: MLflow's server, PostgreSQL, a full disk."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import os
import pwd
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die_with_parent() -> None:
    """Even when pytest is killed outright (prctl option 1, PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class MlflowServer:
    """``mlflow server`` over a SQLite store, always at the same address."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", (self.folder / "artifacts").as_uri()]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,  # so that its children can be ended with it
                preexec_fn=die_with_parent,
            )
        deadline_s = time.monotonic() + 60
        while not self._answers():
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline_s, "the server does not start"
            time.sleep(0.1)

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{self.uri}/health", timeout=2):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URI of a fresh PostgreSQL; skips where it can't be had."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("needs the PostgreSQL server's programs under /usr/lib/postgresql")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("needs psycopg: pip install 'mixlab[postgres]'")
    bin_folder = programs[-1].parent
    # PostgreSQL refuses to run as root, and pytest's own folders are closed to others.
    user = next((name for name in ("postgres", "nobody") if _exists(name)), None) if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="mixlab-pg-") as folder:
        if user is not None:
            os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
        port, data = free_port(), Path(folder, "data")
        subprocess.run(
            [bin_folder / "initdb", "-D", data, "-U", "mixlab", "--auth=trust", "--no-sync", "--no-instructions"],
            user=user,
            cwd=folder,
            check=True,
            capture_output=True,
        )
        settings = ["-h", "127.0.0.1", "-p", str(port), "-k", folder, "-F"]
        server = subprocess.Popen(
            [bin_folder / "postgres", "-D", data, *settings],
            user=user,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        try:
            ready = [bin_folder / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
            deadline_s = time.monotonic() + 30
            while subprocess.run(ready, check=False).returncode != 0:
                assert server.poll() is None, "PostgreSQL does not start"
                assert time.monotonic() < deadline_s, "PostgreSQL does not answer"
                time.sleep(0.1)
            yield f"postgresql://mixlab@127.0.0.1:{port}/postgres"
        finally:
            close_connections("postgresql")
            server.send_signal(signal.SIGINT)  # what PostgreSQL calls a fast shutdown
            server.wait(timeout=30)


def close_connections(dialect: str) -> None:
    """Close what pools of this process keep open: MLflow holds on to the engines of its stores."""
    from sqlalchemy import Engine

    gc.collect()  # what a test left open is found here, in its own teardown, and not wherever memory is next collected
    for engine in [each for each in gc.get_objects() if type(each) is Engine and each.dialect.name == dialect]:
        engine.dispose()


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of ``size`` at ``folder``; skips where nobody may mount one."""
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False, capture_output=True
    )
    if mount.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
