"""Start MLflow's server with our pages, wait until it answers, and leave nothing behind at the end."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import ipaddress
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO

from analysis.dashboard.login import Login
from experiments.errors import UserError

_START_S = 90.0  # importing MLflow's server on a busy machine
_STOP_S = 5.0


class _Stopped(BaseException):
    """A signal asked the dashboard to end."""


def serve(
    *,
    store: str,
    runs: Path,
    host: str = "127.0.0.1",
    port: int = 5000,
    static_prefix: str = "",
    allow_public: bool = False,
    allowed_hosts: str = "",
    artifacts: str = "",
    login: Login | None = None,
    say: Callable[[str], object] = print,
) -> None:
    """Serve ``store`` on ``host``:``port`` until SIGINT, SIGTERM or SIGHUP; ``say`` gets the address once it answers.

    Runs one server process without background jobs. ``allowed_hosts`` are the names, comma-separated, by which a
    browser may call it; ``artifacts`` the URI under which it keeps the files of runs, RUNS/artifacts by default.

    Raises UserError for an address others can reach without ``login`` or ``allow_public``, a port that is taken, a
    store that does not exist or can't be opened, a login that can't work, and a server that ends.
    """
    prefix = _checked_prefix(static_prefix)
    is_public = _check_host(host, allow_public or login is not None)
    _check_port(host, port)
    check_store(store)
    _check_plugin()
    if login is not None:
        login.check()
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{port}{prefix}"
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", host, "--port", str(port)]
    command += ["--app-name", "mixlab" if login is None else "mixlab-auth"]
    command += ["--artifacts-destination", artifacts or (runs / "artifacts").resolve().as_uri()]
    # else uvicorn imports from the user's folder first, and a package `analysis` there is taken for ours
    command += ["--uvicorn-opts", shlex.join(["--app-dir", str(Path(__file__).parents[2])])]
    command += ["--static-prefix", prefix] if prefix else []
    command += ["--allowed-hosts", allowed_hosts] if allowed_hosts else []
    environment = {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": store,  # not an argument: it may hold a password, and arguments are public
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MIXLAB_RUNS": str(runs.resolve()),
        "PYTHONSAFEPATH": "1",  # nor does Python itself
    }
    if is_public and login is not None:
        say("dashboard: passwords travel as plain text to this address: put a proxy with TLS before it")
    with tempfile.TemporaryFile() as log, login.environment() if login else contextlib.nullcontext({}) as secrets:
        handlers = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        server = None
        try:
            server = _start(command, environment | secrets, log)
            _wait_until_healthy(server, f"{address}/health", log)
            say(f"mixlab dashboard: {address}/sweeps   (MLflow: {address}/)   Ctrl-C ends it")
            server.wait()
            raise UserError(f"dashboard: the server ended by itself (exit code {server.returncode}): {_last_line(log)}")
        except _Stopped:
            say("dashboard: stopped")
        finally:
            if server is not None:
                _end(server)
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped


def _checked_prefix(prefix: str) -> str:
    if prefix and (not prefix.startswith("/") or any(letter in prefix for letter in "{}?#<>\"' ")):
        raise UserError(f"--static-prefix {prefix!r}: a path that starts with '/', for example /mixlab")
    return prefix.rstrip("/")


def _check_host(host: str, allow_public: bool) -> bool:
    """Whether others can reach ``host``."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not allow_public:
        raise UserError(
            f"--host {host}: others could reach this address and there is no login; "
            "use 127.0.0.1 (and a tunnel), --auth for a login, or say --allow-public"
        )
    return not loopback


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except socket.gaierror as error:
        raise UserError(f"--host {host}: no such address: {error.strerror}") from None
    except PermissionError:
        raise UserError(f"--port {port}: this user may not listen on it; choose one above 1023") from None
    except OSError as error:
        raise UserError(
            f"--port {port}: can't listen on {host}: {error.strerror}; choose another with --port"
        ) from None


def check_store(store: str) -> None:
    """Raise UserError unless ``store`` is a database that MLflow has set up and that can be read."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    if store.startswith(("http://", "https://")):
        raise UserError(f"--store {store}: is a server already, open {store.rstrip('/')}/ or give its database URL")
    try:
        url = make_url(store)
    except ArgumentError:
        raise UserError(
            f"--store {store}: not a database URL; write for example sqlite:///{Path('runs/mlflow.db').resolve()}"
        ) from None
    shown = url.render_as_string(hide_password=True)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        raise UserError(f"--store {shown}: no such file; run a sweep first, or name the store with --runs or --store")
    try:
        engine = create_engine(url)
        try:
            with engine.connect() as connection:
                connection.execute(text("SELECT version_num FROM alembic_version")).one()
                connection.execute(text("SELECT experiment_id FROM experiments LIMIT 1")).first()
        finally:
            engine.dispose()
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise UserError(f"--store {shown}: no driver for this kind of database: {error}") from None
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise UserError(f"--store {shown}: can't be opened as an MLflow store: {cause}") from None


def _check_plugin() -> None:
    if "mixlab" not in importlib.metadata.entry_points(group="mlflow.app").names:
        raise UserError("dashboard: MLflow does not know the plugin `mixlab`; install this package: pip install -e .")


def _start(command: list[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    # a session of its own: Ctrl-C reaches only us, and the whole group can be ended
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )


def _end_with_parent() -> None:
    """Even when we are killed outright the server gets SIGTERM (prctl option 1, PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    # a proxy from the environment must not be asked for our own address
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise UserError(f"dashboard: the server did not start: {_last_line(log)}")
        try:
            with opener.open(url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:"), timeout=2):
                return
        except urllib.error.HTTPError:
            return  # it answers, be it that it does not know itself by this name
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise UserError(f"dashboard: the server did not answer within {_START_S:.0f} s: {_last_line(log)}")


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _end(server: subprocess.Popen[bytes]) -> None:
    """SIGTERM first, then SIGKILL, to the whole group; it is gone when this returns."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            break
        if _group_ended(server, _STOP_S):
            break


def _group_ended(server: subprocess.Popen[bytes], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        server.poll()  # reaps it, else the group would never be empty
        try:
            os.killpg(server.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
