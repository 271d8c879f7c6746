"""Planning in a process of its own, so that the driver, which lives as long as the sweep, never loads torch.

To check a model takes torch and all layers: several hundred megabytes, and more with CUDA. The plan itself is small.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
import warnings
from dataclasses import dataclass
from typing import Any

from experiments.errors import UserError
from mixers.cli import load_plugins
from sweeps.definition import SweepConfig
from sweeps.die_with import die_with
from sweeps.plan import Plan, plan
from sweeps.resources import visible_gpus


@dataclass(frozen=True)
class Planned:
    """A plan, and the GPUs of this machine as CUDA_VISIBLE_DEVICES takes them; none for runs on the CPU."""

    plan: Plan
    gpus: tuple[str, ...]


def planned(sweep: SweepConfig, plugins: tuple[str, ...] = ()) -> Planned:
    """What :func:`sweeps.plan.plan` makes of ``sweep``, with mixers of ``plugins``.

    Where torch is loaded already, or processes can't fork, it is made here.
    """
    if "torch" in sys.modules or not hasattr(os, "fork"):
        return _planned(sweep, plugins)
    reading, writing = os.pipe()
    driver = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy has threads, which take no part in this
        child = os.fork()
    if child == 0:
        os.close(reading)
        _answer(sweep, plugins, driver, writing)
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
        raise UserError(f"sweep {sweep.name}: planning ended without a word; the system may have had no memory for it")
    found = pickle.loads(content)  # noqa: S301  written by this very code, a moment ago
    if isinstance(found, BaseException):
        raise found
    return found


def _planned(sweep: SweepConfig, plugins: tuple[str, ...]) -> Planned:
    load_plugins(plugins)
    made = plan(sweep)
    return Planned(made, () if made.devices == {"cpu"} else visible_gpus())


def _answer(sweep: SweepConfig, plugins: tuple[str, ...], driver: int, writing: int) -> None:
    """The child's whole life."""
    die_with(driver)
    found: Any
    try:
        found = _planned(sweep, plugins)
        found.plan.code  # noqa: B018  computed here, where the layers are loaded
    except UserError as error:
        found = error
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException:  # noqa: BLE001  whatever it is, the driver has to know that there is no plan
        found = RuntimeError(f"planning failed:\n{traceback.format_exc()}")
    with open(writing, "wb") as answer:
        pickle.dump(found, answer)
    os._exit(0)
