"""Ending a sweep from another process."""

import json
import os
import threading

import pytest

from experiments.errors import UserError
from sweeps.cancel import cancel
from tests.sweeps.helpers import completions, drive, one_arm, steps, until


def test_cancel_ends_the_driver_with_all_states_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLAB_FAKE_TARGET", json.dumps({"n_steps": 4000, "step_s": 0.05}))
    sweep, runs = one_arm(tmp_path), tmp_path / "runs"
    ended: list[int] = []

    def from_elsewhere() -> None:
        until(lambda: steps(runs) > 1)
        ended.append(cancel(runs, "tiny", wait_s=60))

    elsewhere = threading.Thread(target=from_elsewhere)
    elsewhere.start()
    result, _ = drive(sweep, runs)
    elsewhere.join()
    assert ended == [os.getpid()]
    assert result.exit_code == 130
    assert list(runs.glob("tiny/*/checkpoint.json"))
    with pytest.raises(UserError, match="sweep tiny: no driver is running it; mixlab sweep status tiny"):
        cancel(runs, "tiny", wait_s=1)
    monkeypatch.setenv("MIXLAB_FAKE_TARGET", "{}")
    assert drive(sweep, runs)[0].outcomes == {"finished": 2}
    assert set(completions(runs).values()) == {1}


def test_cancel_of_an_unknown_sweep(tmp_path):
    with pytest.raises(UserError, match="nothing"):
        cancel(tmp_path, "nothing", wait_s=1)
