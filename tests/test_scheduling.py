"""Tests are dealt out as meant: nobody renames a file and leaves its old name in the order."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("xdist")

from tests.scheduling import BROWSER, LONG, ONE_BY_ONE, Scheduling

ROOT = Path(__file__).parent.parent


def test_files_with_a_place_in_the_order_exist_and_have_one() -> None:
    named = [*LONG, *ONE_BY_ONE]
    assert [name for name in named if not (ROOT / name).is_file()] == []
    assert len(set(named)) == len(named)


def test_a_file_stays_together_unless_its_tests_share_nothing() -> None:
    scope = Scheduling.__new__(Scheduling)._split_scope
    assert {scope(f"{name}::test[a/b::c]") for name in BROWSER} == {"browser"}
    assert scope("tests/test_docs.py::test_a") == scope("tests/test_docs.py::test_b[::]") == "tests/test_docs.py"
    assert scope(f"{ONE_BY_ONE[0]}::test_a") != scope(f"{ONE_BY_ONE[0]}::test_b")
