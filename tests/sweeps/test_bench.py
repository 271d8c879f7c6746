"""``mixlab sweep bench`` at small sizes: what it measures is really run; its goals are for larger ones."""

from __future__ import annotations

import json

from click.testing import CliRunner

from sweeps.cli import commands


def test_the_engine_is_measured_on_a_sweep_that_runs_and_is_resumed():
    words = ["bench", "plan", "engine", "--planned", "200", "--trials", "100", "--json"]
    result = CliRunner().invoke(commands[0], words)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["part"] for row in rows] == ["plan"] * 2 + ["engine"] * 4
    assert rows[0]["what"] == "planning 200 runs"
    assert "100 trials, " in rows[2]["what"]
    assert all(0 < row["value"] < 5000 for row in rows)
    assert {row["ok"] for row in rows} == {None}


def test_an_unknown_part_names_those_there_are():
    result = CliRunner().invoke(commands[0], ["bench", "planing"])
    assert result.exit_code == 2
    assert "no part 'planing'; there are plan, engine, tracked, ray, logging, workers" in result.output
