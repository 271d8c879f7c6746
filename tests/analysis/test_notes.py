from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from analysis import notes
from analysis.comparison import compare
from analysis.patterns import mixer_names
from analysis.runs import rows_from_records
from tests.analysis import planted


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("softmax", ["softmax"]),
        (
            "gated_deltanet*3,softmax(window=512) | pkm:channel@6 + fwpkm(scope='shared')@2,10",
            ["gated_deltanet", "softmax", "pkm", "fwpkm"],
        ),
        ("pkm:token", ["pkm"]),
        ("", []),
    ],
)
def test_mixer_names(pattern: str, names: list[str]) -> None:
    assert mixer_names(pattern) == names


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("pkm", [notes.STATIC_MEMORY]),
        ("pkm:token(n_subkeys=64)", [notes.STATIC_MEMORY]),
        ("softmax", [notes.GROWING_STATE]),
        ("softmax(window=16)", [notes.WINDOW]),
        ("softmax(n_heads=2, window = 16)*3,softmax", [notes.WINDOW, notes.GROWING_STATE]),
        ("linear_attention", [notes.FIXED_STATE]),
        ("gated_deltanet | pkm@1", [notes.STATIC_MEMORY_HELPED, notes.FIXED_STATE]),
        ("fwpkm", [notes.FIXED_STATE, notes.CHUNKED_MEMORY]),
        ("fwpkm(scope=shared)", [notes.FIXED_STATE, notes.CHUNKED_MEMORY, notes.SHARED_STATE]),
        ('fwpkm(scope = "shared")', [notes.FIXED_STATE, notes.CHUNKED_MEMORY, notes.SHARED_STATE]),
        ("softmax | fwpkm@1", [notes.CHUNKED_MEMORY, notes.GROWING_STATE]),
        ("my_mixer", []),
    ],
)
def test_notes_follow_from_the_pattern(pattern: str, expected: list[str]) -> None:
    assert notes.pattern_notes(pattern) == expected


def test_a_state_protocol_that_shares_is_noted_for_its_arm_only(tmp_path: Path) -> None:
    saved = planted.plan(arms={"one": "fwpkm", "other": "fwpkm"}, pairs=(8,))
    planted.write_records(tmp_path, saved)
    _, rows = rows_from_records(tmp_path, saved.name)
    rows = [dataclasses.replace(row, settings={"state.scope": "shared"}) if row.arm == "one" else row for row in rows]
    titles = {note.text: note.title for note in notes.arm_notes(saved, rows)}
    assert next(title for text, title in titles.items() if text.startswith("All sequences of a batch")) == "one"
    assert next(title for text, title in titles.items() if text.startswith("Its state has")) == "one, other"


def test_what_is_held_equal_is_measured(tmp_path: Path) -> None:
    saved = planted.plan()
    planted.write_records(tmp_path, saved)
    _, rows = rows_from_records(tmp_path, saved.name)
    text = notes.held_equal(saved, rows, compare(saved, rows)).text
    assert "20,000,000 training tokens at most" in text
    assert "4 tuning trials" in text
    assert "width 64, layers 2" in text
    assert "state per sequence NOT equal (0 B to 544 KiB within a cell)" in text
    assert "parameters NOT equal (566 k to 1.09 M within a cell)" in text
    two = dataclasses.replace(saved, arms={arm: saved.arms[arm] for arm in ("attention", "window 16")})
    own = [row for row in rows if row.arm in two.arms]
    assert "parameters equal within 2 %" in notes.held_equal(two, own, compare(two, own)).text
    assert "parameters unknown" in notes.held_equal(two, [], compare(two, [])).text
