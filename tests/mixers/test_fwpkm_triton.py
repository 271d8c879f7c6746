"""The Triton implementation against the readable one: in triton's interpreter in float64, on a GPU in float32."""

from __future__ import annotations

import json

import pytest
import torch

from tests.mixers.interpreter import interpreted

pytest.importorskip("triton", reason="triton is not installed")


def test_equals_the_reference_in_the_interpreter() -> None:
    done = interpreted("mixers.fwpkm.gpu_check", "--json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bound"] <= 1e-10
    assert len(found["checks"]) == 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("case", range(6))
def test_equals_the_reference_on_a_gpu(case: int) -> None:
    from mixers.fwpkm.gpu_check import CASES, compare

    sizes = {"B": 3, "T": 300, "K": 64, "n": 45, "V": 96, "k": 5, "C": 64}
    errors = compare(CASES[case], sizes, torch.float32, "cuda")
    assert max(errors.values()) <= 2e-5, errors


def test_unsupported_options_are_named() -> None:
    from mixers.fwpkm.gpu_check import options_of
    from mixers.fwpkm.triton_chunks import unsupported

    assert "cuda" in unsupported(torch.device("cpu"), torch.float32, 4, 3, options_of(top_k=2))
