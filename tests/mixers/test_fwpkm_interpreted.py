"""The Triton implementation on random configurations, in triton's interpreter: a pytest process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

REPOSITORY = Path(__file__).parents[2]


def test_random_configurations() -> None:
    # Whether kernels are interpreted is decided when triton is first imported.
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-k", "triton or key_step or versions", "tests/mixers/test_fwpkm_random.py",
         "tests/mixers/test_key_step_kernels.py", "tests/mixers/test_fwpkm_versions.py"],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\b20 passed", done.stdout), done.stdout[-2000:]
    assert "skipped" not in done.stdout
