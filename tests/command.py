"""``mixlab ARGS`` in a process of its own, without paying at each call for the imports.

A server process imports what the commands import, once; each command then runs in a fork of it, in the folder, with
the environment and to the exit that a user would see. That the command also starts by itself is tested apart.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.stores import die_with_parent

ROOT = Path(__file__).parent.parent
# Not mlflow: it starts a thread on import, which a fork would lose.
IMPORTED_BY_COMMANDS = (
    "mixlab",
    "optuna",
    "rich.live",
    "torch._dynamo",
    "mixers.registry",
    "mixers.contract",
    "experiments.cost",
    "sweeps.driver",
    "analysis.comparison",
)
_server: subprocess.Popen[str] | None = None


def mixlab(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command; its exit code and what it printed."""
    with tempfile.TemporaryDirectory(prefix="mixlab-command-") as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        values = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        job = {"words": words, "cwd": str(cwd), "environment": values, "out": str(out), "err": str(err)}
        server = _started()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the server of commands has died"
        return subprocess.CompletedProcess(words, int(answer), out.read_text(), err.read_text())


def _started() -> subprocess.Popen[str]:
    global _server
    if _server is None or _server.poll() is not None:
        _server = subprocess.Popen(
            [sys.executable, "-m", "tests.command"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,
        )
        atexit.register(_end)
    return _server


def _end() -> None:
    if _server is not None:
        _server.kill()
        _server.communicate()


def serve() -> None:
    for module in IMPORTED_BY_COMMANDS:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose the other threads"
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_run(job))  # the interpreter's own end would copy every page
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(job: Mapping[str, Any]) -> int:
    for target, stream in ((os.open(os.devnull, os.O_RDONLY), 0), (_new(job["out"]), 1), (_new(job["err"]), 2)):
        os.dup2(target, stream)
        os.close(target)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    sys.argv = ["mixlab", *job["words"]]
    try:
        sys.modules["mixlab"].main()
    except SystemExit as ended:
        status = ended.code
    except BaseException:  # noqa: BLE001 (what the interpreter does with an error that nobody caught)
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    return status if isinstance(status, int) else 0


def _new(path: str) -> int:
    return os.open(path, os.O_CREAT | os.O_WRONLY)


if __name__ == "__main__":
    serve()
