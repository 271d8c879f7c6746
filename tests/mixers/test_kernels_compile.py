"""Every kernel compiles to machine code for an H100 (sm_90), without one: at the paper's sizes and at odd ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

COMPILE = Path(__file__).parent / "compile_kernels.py"
REPOSITORY = Path(__file__).parents[2]


def test_kernels_compile_for_sm_90() -> None:
    # Compiled in a process of its own: the interpreter, if another test switched it on, would replace the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(COMPILE)], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 kernels" in done.stdout
