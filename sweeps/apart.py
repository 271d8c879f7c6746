"""A call in a process of its own, so that the driver, which lives as long as the sweep, never loads what it takes.

torch, the layers and MLflow take hundreds of megabytes, more with CUDA; what the driver wants of them is small.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from experiments.errors import UserError
from sweeps.die_with import die_with

T = TypeVar("T")
# Whoever has one of these loaded gains nothing; torch and Ray also have threads, which a fork would leave behind.
_LARGE = ("torch", "mlflow", "ray")


def apart(call: Callable[[], T], what: str) -> T:
    """What ``call`` returns, in a child of this process; a :class:`UserError` that it raises is raised here.

    Where one of the large packages is loaded already, or processes can't fork, it is called here. ``what`` names it in
    errors. The child ends with this process, however that ends.
    """
    if any(name in sys.modules for name in _LARGE) or not hasattr(os, "fork"):
        return call()
    reading, writing = os.pipe()
    driver = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy has threads, which take no part in this
        child = os.fork()
    if child == 0:
        os.close(reading)
        _answer(call, what, driver, writing)
    os.close(writing)
    try:
        with open(reading, "rb") as answer:
            content = answer.read()
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.waitpid(child, 0)
    if not content:
        raise UserError(f"{what} ended without a word; the system may have had no memory for it")
    found = pickle.loads(content)  # noqa: S301  from our own child, through a pipe that nobody else has
    if isinstance(found, BaseException):
        raise found
    return found


def _answer(call: Callable[[], Any], what: str, driver: int, writing: int) -> None:
    """The child's whole life."""
    die_with(driver)
    found: Any
    try:
        found = call()
    except UserError as error:
        found = error
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException:  # noqa: BLE001  whatever it is, the driver has to know that there is no answer
        found = RuntimeError(f"{what} failed:\n{traceback.format_exc()}")
    try:
        content = pickle.dumps(found)
        with open(writing, "wb") as answer:
            answer.write(content)
    finally:
        os._exit(0)  # whatever happens, the child never goes on with what its parent does next
