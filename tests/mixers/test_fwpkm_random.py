"""The implementations of the fast-weight memory on random configurations: equal to the reference in every result."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings

from mixers.errors import UserError
from mixers.fwpkm import sparse_keys
from tests.mixers import fwpkm_random as random_memory
from tests.mixers.fwpkm_random import Configuration, configurations, errors, margin, require_equal, run

USUAL = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
IN_INTERPRETER = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in triton's interpreter, see test_fwpkm_interpreted.py"
)


def test_float64() -> None:
    n_seen, n_left = 0, 0

    @settings(max_examples=300, **USUAL)
    @given(configurations())
    def compare(c: Configuration) -> None:
        nonlocal n_seen, n_left
        n_seen += 1
        if margin(c) < random_memory.SAFE[torch.float64]:
            n_left += 1
            return
        want = run("reference", c, torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            if c.seed % 2:  # the ways of large calls whose queries are far from all keys: in float64 near ones are too
                patch.setattr(sparse_keys, "MANY_DIFFERENCES", 0)
                patch.setattr(sparse_keys, "FAR", -float("inf"))
            require_equal(run("sparse", c, torch.float64), want, torch.float64)
        if c.cuts:
            require_equal(run("sparse", c, torch.float64, c.cuts), want, torch.float64)
            require_equal(run("reference", c, torch.float64, c.cuts), want, torch.float64)

    compare()
    assert n_seen >= 300
    assert n_left <= 0.02 * n_seen


def test_float32() -> None:
    n_seen, n_left = 0, 0

    @settings(max_examples=100, **USUAL)
    @given(configurations())
    def compare(c: Configuration) -> None:
        nonlocal n_seen, n_left
        n_seen += 1
        if margin(c) < random_memory.SAFE[torch.float32]:
            n_left += 1
            return
        want = run("reference", c, torch.float64)
        plain = run("reference", c, torch.float32)
        rounding = errors(plain, want, random_memory.FLOOR[torch.float32])
        # The bound of 20 times this must not become empty.
        assert max(rounding.values(), default=0) <= 1e-3
        require_equal(run("sparse", c, torch.float32, c.cuts), want, torch.float32, rounding)

    compare()
    assert n_seen >= 100
    assert n_left <= 0.25 * n_seen


@IN_INTERPRETER
def test_triton_float64() -> None:
    @settings(max_examples=6, **USUAL)
    @given(configurations(max_tokens=6, refused=random_memory.TRITON_REFUSES))
    def compare(c: Configuration) -> None:
        if margin(c) < random_memory.SAFE[torch.float64]:
            return
        require_equal(run("triton", c, torch.float64, c.cuts), run("reference", c, torch.float64), torch.float64)

    compare()


@IN_INTERPRETER
@pytest.mark.parametrize("name", random_memory.TRITON_REFUSES)
def test_what_triton_refuses_is_refused_by_name(name: str) -> None:
    # An option that gets its kernel leaves the list, and so joins the random configurations.
    c = find(
        configurations(max_tokens=3),
        lambda c: c.T and c.options[name] and sum(c.options[other] for other in random_memory.TRITON_REFUSES) == 1,
    )
    with pytest.raises(UserError, match=name):
        run("triton", c, torch.float64)
