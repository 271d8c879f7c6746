"""The Triton implementation on random configurations, in triton's interpreter: a pytest process of its own."""

from __future__ import annotations

import re

import pytest

from tests.mixers.interpreter import interpreted

pytest.importorskip("triton", reason="triton is not installed")


def test_random_configurations() -> None:
    files = ("test_fwpkm_random.py", "test_key_step_kernels.py", "test_fwpkm_versions.py")
    done = interpreted("pytest", "-k", "triton or key_step or versions", *(f"tests/mixers/{name}" for name in files))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\b24 passed", done.stdout), done.stdout[-2000:]
    assert "skipped" not in done.stdout
