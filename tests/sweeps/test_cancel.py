"""Ending a sweep from another process."""

import json

import pytest

from experiments.errors import UserError
from sweeps.cancel import cancel
from tests.sweeps.helpers import completions, drive, start_driver, tiny, write_sweep


def test_cancel_ends_the_driver_with_all_states_saved(tmp_path):
    runs = tmp_path / "runs"
    driver = start_driver(write_sweep(tmp_path), runs, behaviour={"n_steps": 400, "step_s": 0.05})
    for line in driver.stdout:
        if json.loads(line)["event"] == "run_progress":
            break
    assert cancel(runs, "tiny", wait_s=60) == driver.pid
    driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert list(runs.glob("tiny/*/checkpoint.json"))
    with pytest.raises(UserError, match="sweep tiny: no driver is running it; mixlab sweep status tiny"):
        cancel(runs, "tiny", wait_s=1)
    result, _ = drive(tiny(tmp_path), runs)
    assert result.outcomes == {"finished": 4}
    assert set(completions(runs).values()) == {1}


def test_cancel_of_an_unknown_sweep(tmp_path):
    with pytest.raises(UserError, match="nothing"):
        cancel(tmp_path, "nothing", wait_s=1)
