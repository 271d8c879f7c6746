"""Sweeps on a real Ray cluster of this machine; only the training itself is a stand-in."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest

from experiments.errors import UserError
from experiments.records import n_attempts, read_sweep_runs
from sweeps.plan import plan
from sweeps.resources import RayShare, ray_share
from tests.ray_cluster import RayCluster
from tests.sweeps.helpers import completions, drive, one_arm, tiny


@pytest.fixture(scope="module")
def cluster():
    """Two machines with a core each, and a GPU in the second that nobody uses, reached by the first one's address."""
    pytest.importorskip("ray")
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, pytest.MonkeyPatch.context() as environment:
        found = RayCluster(Path(folder))
        for name, value in found.environment.items():
            environment.setenv(name, value)
        try:
            found.start_head("--num-gpus=0")
            found.add_machine("--num-gpus=1")
            yield found
        finally:
            found.stop()


@pytest.fixture
def behave(monkeypatch):
    def set_behaviour(**behaviour):
        monkeypatch.setenv("MIXLAB_FAKE_TARGET", json.dumps(behaviour))

    set_behaviour()
    return set_behaviour


def until(condition, patience_s=120.0):
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps(runs):
    """How far the only run has come."""
    return max((int(path.read_text() or 0) for path in runs.glob("tiny/*/step.txt")), default=0)


def test_every_end_of_a_worker_is_accounted_for_as_on_one_machine(tmp_path, behave, cluster):
    behave(outcome={"0": "die_once", "1": "memory_beside_others", "2": "raise"})
    sweep = one_arm(tmp_path, seeds=[0, 1, 2, 3], base__train__device="cpu")
    result, events = drive(sweep, tmp_path / "runs", n_workers=None, ray=cluster.address)
    assert result.outcomes == {"finished": 3, "failed": 1}
    assert set(completions(tmp_path / "runs").values()) == {1}
    attempts = {run.identity.seed: n_attempts(run.folder) for run in read_sweep_runs(tmp_path / "runs", "tiny")}
    assert attempts == {0: 2, 1: 2, 2: 1, 3: 1}
    assert {event["worker"] for event in events if event["event"] == "run_started"} == {0, 1}


def test_a_lost_machine_takes_its_worker_along_and_the_run_goes_on_where_another_joins(tmp_path, behave, cluster):
    behave(n_steps=60, step_s=0.1)
    # Of the machines only the second has a GPU, whatever that is: half of it is for the run.
    sweep, runs = one_arm(tmp_path, seeds=[0], base__train__device="auto"), tmp_path / "runs"
    killed: list[int] = []

    def kill() -> None:
        until(lambda: steps(runs) > 1)
        killed.append(json.loads(next(runs.glob("tiny/*/attempts.jsonl")).read_text().splitlines()[0])["pid"])
        behave()
        cluster.kill_machine(1)
        cluster.add_machine("--num-gpus=1")

    killer = threading.Thread(target=kill)
    killer.start()
    result, events = drive(sweep, runs, n_workers=None, per_gpu=2, ray=cluster.address)
    killer.join()
    assert result.outcomes == {"finished": 1}
    assert [e["reason"] for e in events if e["event"] == "run_retried"] == ["its Ray worker was lost"]
    until(lambda: not Path(f"/proc/{killed[0]}").exists())
    assert set(completions(runs).values()) == {1}


def test_an_interrupted_sweep_saves_and_goes_on_elsewhere(tmp_path, behave, cluster):
    behave(n_steps=600, step_s=0.1)
    sweep, runs = one_arm(tmp_path, seeds=[0]), tmp_path / "runs"

    def interrupt() -> None:
        until(lambda: steps(runs) > 1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    result, _ = drive(sweep, runs, ray=cluster.address)
    assert (result.interrupted, result.exit_code) == (True, 130)
    assert {r.outcome.outcome for r in read_sweep_runs(runs, "tiny")} == {"killed"}
    behave()
    assert drive(sweep, runs)[0].outcomes == {"finished": 1}  # without Ray: the records are the same
    starts = [int((r.folder / "starts.log").read_text().split()[-1]) for r in read_sweep_runs(runs, "tiny")]
    assert max(starts) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": ("0",)}, "--gpus names those of this machine; with --ray, Ray deals them out: leave it out"),
        (
            {"target": "no_such_module:run"},
            "workers can't start: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ({"ray": "127.0.0.1:9"}, "--ray 127.0.0.1:9: no cluster can be reached there: "),
        (
            {"ray": "ray://127.0.0.1:9"},
            "--ray ray://127.0.0.1:9: give auto or HOST:PORT, as `ray start` has printed it",
        ),
    ],
)
def test_what_can_not_be_is_one_clear_line(tmp_path, behave, cluster, options, message):
    with pytest.raises(UserError) as caught:
        drive(tiny(tmp_path), tmp_path / "runs", **{"ray": cluster.address, **options})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


LAPTOP, NODE = {"CPU": 2.0}, {"CPU": 16.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("device", "threads", "machines", "n_workers", "per_gpu", "expected"),
    [
        ("auto", 1, [LAPTOP], None, None, RayShare(2, 1.0)),
        ("auto", 1, [LAPTOP], 8, None, RayShare(8, 0.25)),
        ("cpu", 1, [NODE, LAPTOP], 4, None, RayShare(4, 1.0)),
        ("cpu", 4, [NODE, LAPTOP], None, None, RayShare(4, 4.0)),
        ("cpu", 4, [LAPTOP], None, None, RayShare(1, 2.0)),
        ("auto", 1, [NODE, LAPTOP], None, None, RayShare(2, 1.0, 1.0)),
        ("cuda", 1, [NODE, NODE, LAPTOP], None, 8, RayShare(32, 1.0, 0.125)),
        ("cuda", 8, [NODE], 3, None, RayShare(3, 5.0, 0.5)),
        ("cpu", 3, [{"CPU": 3.0}, {"CPU": 3.0}], 3, None, RayShare(3, 1.0)),
        ("cpu", 1, [{"CPU": 1.0}, {"CPU": 1.0}], 3, None, RayShare(3, 0.5)),
        ("cpu", 1, [{"CPU": 2.0}, {"CPU": 1.0}], 4, None, RayShare(4, 0.6666)),
    ],
)
def test_what_each_worker_gets_of_a_cluster(tmp_path, device, threads, machines, n_workers, per_gpu, expected):
    planned = plan(tiny(tmp_path, base__train__device=device, threads=threads))
    assert ray_share(planned, machines, n_workers, 100, per_gpu) == expected


def test_a_cluster_without_the_gpus_that_runs_need_is_refused(tmp_path):
    planned = plan(tiny(tmp_path, base__train__device="auto"))
    with pytest.raises(UserError, match="--ray: the cluster has no GPU, and runs of this sweep are to use one"):
        ray_share(planned, [LAPTOP], None, 100, per_gpu=2)


def test_runs_that_name_their_gpu_are_not_dealt_out(tmp_path):
    planned = plan(tiny(tmp_path, base__train__device="cuda:1"))
    with pytest.raises(UserError, match=r"--ray: runs of this sweep have train\.device='cuda:1'; Ray deals GPUs out"):
        ray_share(planned, [NODE], None, 100)
