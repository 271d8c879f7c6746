"""Run the checks on a mixer, apply excuses, and turn whatever it raises into one line."""

from __future__ import annotations

import re
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mixers.base import Mixer
from mixers.contract.checks import CHECKS
from mixers.contract.errors import ContractError, NotApplicable
from mixers.contract.report import CheckResult, Report
from mixers.contract.subject import LIMITS, Subject
from mixers.errors import UserError, nearest

NO_EXCUSES: Mapping[str, str] = MappingProxyType({})
# Frames in here are not where a user looks for a fault.
LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def check_mixer(
    build: Callable[[], Mixer],
    *,
    excuses: Mapping[str, str] = NO_EXCUSES,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Report:
    """Run every check on the mixers that ``build`` returns.

    ``build`` is called many times and must return a new mixer of the same options each time, drawing its
    initial values from torch's global generator. Keep it small: width 16 and T of some dozens suffice. The global
    generator is left as it was.

    Args:
        excuses: check name -> why this mixer is allowed to fail it. A reason that isn't needed fails.
        seed: of weights and inputs.
        device: where the mixer runs: ``cpu`` or ``cuda``.
        dtype: what it computes in. Float64, where every limit is rounding; kernels that don't have it are
            measured in ``float32`` or ``bfloat16``, with the wider limits of mixers.contract.subject.

    Raises:
        UserError: an excuse names no check or gives no reason; this machine has no such device; or no such dtype.
    """
    require_excuses(excuses)
    results = (run_check(name, build, excuses=excuses, seed=seed, device=device, dtype=dtype) for name in CHECKS)
    return Report(tuple(results))


def run_check(
    name: str,
    build: Callable[[], Mixer],
    *,
    excuses: Mapping[str, str] = NO_EXCUSES,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> CheckResult:
    """Run one check. Nothing that the mixer raises escapes: it becomes the message of a failed check."""
    if name not in CHECKS:
        raise UserError(f"contract: unknown check {name!r}{nearest(name, CHECKS)}")
    require_excuses(excuses)
    device = require_device(device)
    if dtype not in LIMITS:
        raise UserError(f"contract: dtype {dtype} has no limits; use one of {', '.join(map(str, LIMITS))}")
    began = time.perf_counter()
    status, message = "passed", ""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
        # A warning is no finding, and a pytest that turns warnings into errors must not make it one.
        warnings.simplefilter("ignore")
        try:
            CHECKS[name](Subject(build, seed, device, dtype))
        except NotApplicable as reason:
            status, message = "not_applicable", str(reason)
        except ContractError as error:
            error.check = name
            status, message = "failed", str(error)
        except Exception as error:  # noqa: BLE001  a stranger's mixer may raise anything; it's a finding, named below
            status, message = "failed", f"{name}: {raised(error)}"
    if name in excuses:
        if status == "failed":
            status, message = "excused", f"{excuses[name]} ({message})"
        else:
            found = "it passes" if status == "passed" else message
            status, message = "stale_excuse", f"{name}: excused as {excuses[name]!r}, but {found}; remove the excuse"
    return CheckResult(name, status, message, time.perf_counter() - began)


def require_device(device: torch.device | str) -> torch.device:
    """Raise :class:`UserError` unless the suite can run there; a CUDA device comes back with its number."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(device)):
        raise UserError(f"check: device {str(device)!r} is neither cpu nor cuda")
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"check: device {str(device)!r}: this machine has no usable CUDA device; use cpu")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return device


def require_excuses(excuses: Mapping[str, str]) -> None:
    """Raise :class:`UserError` unless every excuse names a check and gives a reason."""
    for name, reason in excuses.items():
        if name not in CHECKS:
            raise UserError(f"contract: excuse for unknown check {name!r}{nearest(name, CHECKS)}")
        if not reason.strip():
            raise UserError(f"contract: the excuse for {name!r} gives no reason; say why the mixer may fail it")


def raised(error: BaseException) -> str:
    """``TypeError: what (layer.py:12)``: the innermost line outside torch and this package."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)]
    frame = (own or frames)[-1]
    text = " ".join(str(error).split())
    return f"raised {type(error).__name__}{': ' if text else ''}{text} ({frame.filename}:{frame.lineno})"


def parametrize(build: Callable[[], Mixer], **options: Any) -> Any:
    """For a pytest of your own: one test per check, which calls the argument ``check``.

        @contract.parametrize(lambda: registry.build("my_mixer", {"d_model": 16}))
        def test_contract(check):
            check()

    What doesn't apply, or is excused, is skipped with its reason. ``options`` are those of :func:`check_mixer`.
    """
    import pytest

    require_excuses(options.get("excuses", NO_EXCUSES))
    return pytest.mark.parametrize(
        "check", [pytest.param(partial(require, name, build, **options), id=name) for name in CHECKS]
    )


def require(name: str, build: Callable[[], Mixer], **options: Any) -> None:
    """Inside pytest: fail unless the check passes; skip what doesn't apply or is excused."""
    import pytest

    result = run_check(name, build, **options)
    if not result.ok:
        pytest.fail(result.message, pytrace=False)
    if result.status != "passed":
        pytest.skip(f"{result.status}: {result.message}")
