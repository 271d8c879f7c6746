"""One quick fault of ``make chaos``, and the eye of its judge."""

from __future__ import annotations

import os

import pytest

from experiments.records import read_json, write_json
from tests.chaos.__main__ import run_fault
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

        row = run_fault("torn_records", Fault(torn_records, n=3, text=ONE_ARM, n_workers=1), truth, seed=1)
        assert not row.bad, row
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


def test_every_fault_says_what_it_does():
    assert all(fault.make.__doc__ for fault in FAULTS.values())
