"""One quick fault of ``make chaos``, and the eye of its judge."""

from __future__ import annotations

import os
import sys
import time

import pytest

from experiments.records import read_json, write_json
from tests.chaos.__main__ import main, run_all, run_fault
from tests.chaos.faults import FAULTS, Fault, torn_records
from tests.chaos.sandbox import NAME, SWEEP, Sandbox
from tests.chaos.truth import Verdict, judge, read_found

ONE_ARM = SWEEP.replace('[arms.linear]\nmixer = "linear_attention"\n', "")

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds processes in /proc")


def test_killed_and_torn_a_sweep_comes_back_complete_and_the_judge_sees_what_does_not():
    calm = Sandbox(text=ONE_ARM, n_workers=1)
    try:
        calm.start()
        assert calm.finish() == 0, calm.errors()
        truth = read_found(calm.runs)
        assert len(truth.planned) == 4
        verdict = judge(calm, truth)
        assert verdict == Verdict()

        row = run_fault("torn_records", Fault(torn_records, n=3, text=ONE_ARM, n_workers=1), lambda: truth, seed=1)
        assert row.state == "ok", row
        assert row.injected >= 3

        folders = sorted(path for path in (calm.runs / NAME).iterdir() if path.is_dir())
        (folders[0] / "outcome.json").unlink()
        write_json(folders[1] / "outcome.json", {**read_json(folders[1] / "outcome.json"), "step": 39})
        (folders[2] / "metrics.jsonl").write_text("", encoding="utf-8")
        (folders[3] / ".outcome.json.1.tmp").touch()
        saved = read_json(calm.runs / NAME / "sweep.json")
        write_json(calm.runs / NAME / "sweep.json", {**saved, "runs": [*saved["runs"], saved["runs"][0]], "chosen": {}})
        verdict = judge(calm, truth)
        assert verdict.lost == {folders[0].name}
        assert verdict.differing == {folders[1].name, folders[2].name}
        assert verdict.doubled == {saved["runs"][0]["key"]}
        assert len(verdict.problems) == 2
    finally:
        calm.remove()


def test_what_the_time_does_not_last_for_is_neither_survived_nor_bad(capsys, monkeypatch):
    rows = run_all(["sigterm", "hang"], seconds=0, seed=0, keep=False)
    assert [row.state for row in rows] == ["no time"] * 2
    cut_short = run_fault("sigterm", FAULTS["sigterm"], read_found, seed=0, deadline=time.monotonic() + 1)
    assert (cut_short.state, cut_short.left_behind) == ("no time", 0)
    monkeypatch.setattr(sys, "argv", ["chaos", "--only", "sigterm", "hang", "--seconds", "0"])
    assert main() == 3
    said = capsys.readouterr().out
    assert said.count("no time: not begun within 0 s") == 2
    assert said.endswith("no time for 2 of 2: python -m tests.chaos --only sigterm hang\n")


def test_every_fault_says_what_it_does():
    assert all(fault.make.__doc__ for fault in FAULTS.values())
