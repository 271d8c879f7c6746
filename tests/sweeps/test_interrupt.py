"""Drivers that are stopped, killed or started twice: nothing is lost, and nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from experiments.errors import UserError
from experiments.records import read_sweep_runs
from sweeps.driver import SAVE_PATIENCE_S
from sweeps.plan import plan
from tests.sweeps.helpers import completions, drive, start_driver, tiny, write_sweep

LONG = {"n_steps": 400, "step_s": 0.05}
# Long enough that a test process that has to wait for a core does not find the sweep at its end.
SHORT = {"n_steps": 6, "step_s": 0.2}
SEEDS = [0, 1, 2, 3]
# The promise is 5 s from Ctrl-C to the end; test processes share the cores, so the bound leaves them air. What does not
# end by itself would take a minute.
BOUND_S = 20


def wait_for(driver: subprocess.Popen[str], event: str, n: int = 1) -> None:
    """Read the driver's events until ``n`` of a kind have come."""
    for line in driver.stdout:
        n -= json.loads(line)["event"] == event
        if n == 0:
            return
    pytest.fail(f"the driver ended before its {event}: {driver.stderr.read()}")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_gone(pids: list[int], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def ended(driver: subprocess.Popen[str]) -> tuple[float, list[dict]]:
    """Seconds until the driver has ended, and its last events."""
    started = time.monotonic()
    output, _ = driver.communicate(timeout=60)
    return time.monotonic() - started, [json.loads(line) for line in output.splitlines()]


def test_a_worker_and_then_the_driver_killed_in_the_middle_leave_a_sweep_that_goes_on(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    driver = start_driver(write_sweep(tmp_path), runs, f"seeds={SEEDS}", behaviour=SHORT)
    wait_for(driver, "run_progress", 2)
    os.kill(children(driver.pid)[0], signal.SIGKILL)
    wait_for(driver, "run_retried")
    wait_for(driver, "run_ended", 3)
    workers = children(driver.pid)
    assert len(workers) == 2, "the killed worker was not replaced"
    driver.kill()
    driver.communicate()
    assert all_gone(workers, within_s=20), "workers outlive their driver"
    n_before = sum(record.outcome is not None for record in read_sweep_runs(runs, "tiny"))
    assert 3 <= n_before < 8

    monkeypatch.setenv("MIXLAB_FAKE_TARGET", "{}")
    sweep = tiny(tmp_path, seeds=SEEDS)
    result, events = drive(sweep, runs)
    assert result.outcomes == {"finished": 8}
    assert [event["event"] for event in events].count("run_started") == 8 - n_before
    assert max(completions(runs).values()) == 1
    planned = {run.key for arm_cell in plan(sweep).arm_cells for run in arm_cell.replicates({})}
    assert {record.identity.key for record in read_sweep_runs(runs, "tiny")} == planned


def test_a_second_driver_is_refused_and_ctrl_c_saves_and_ends_within_five_seconds_and_the_same_command_continues(
    tmp_path, monkeypatch
):
    runs = tmp_path / "runs"
    driver = start_driver(write_sweep(tmp_path), runs, behaviour=LONG)
    wait_for(driver, "run_progress", 4)
    workers = children(driver.pid)
    with pytest.raises(UserError) as caught:
        drive(tiny(tmp_path), runs)
    assert f"sweep tiny is already being run by process {driver.pid} on {os.uname().nodename}" in str(caught.value)
    driver.send_signal(signal.SIGINT)
    seconds, events = ended(driver)
    assert seconds < BOUND_S
    assert driver.returncode == 130
    assert events[-1]["event"] == "sweep_ended"
    assert events[-1]["interrupted"] is True
    assert all_gone(workers, within_s=0)
    killed = read_sweep_runs(runs, "tiny")
    assert [record.outcome.outcome for record in killed] == ["killed", "killed"]

    monkeypatch.setenv("MIXLAB_FAKE_TARGET", "{}")
    result, _ = drive(tiny(tmp_path), runs)
    assert result.outcomes == {"finished": 4}
    for record in killed:
        first, second = (record.folder / "starts.log").read_text().split()
        assert (first, int(second) > 0) == ("0", True), "it did not resume from its checkpoint"


def test_a_run_that_does_not_stop_is_killed_in_time(tmp_path):
    runs = tmp_path / "runs"
    driver = start_driver(write_sweep(tmp_path), runs, behaviour={"stuck_s": 60})
    wait_for(driver, "run_started", 2)
    while len(list(runs.glob("tiny/*/spans.log"))) < 2:  # before that, there is nothing to save and to wait for
        time.sleep(0.02)
    workers = children(driver.pid)
    driver.send_signal(signal.SIGTERM)
    seconds, _ = ended(driver)
    assert SAVE_PATIENCE_S < seconds < BOUND_S
    assert driver.returncode == 130
    assert all_gone(workers, within_s=0)
    assert {record.outcome.outcome for record in read_sweep_runs(runs, "tiny")} == {"killed"}
