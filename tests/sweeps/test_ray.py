"""Sweeps on a real Ray cluster of this machine; only the training itself is a stand-in."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from experiments.errors import UserError
from experiments.records import n_attempts, read_sweep_runs
from sweeps.plan import plan
from sweeps.resources import RayShare, ray_share
from tests.sweeps.helpers import completions, drive, one_arm, steps, tiny, until

# A process of its own: what is started in a driver's ends with its first sweep.
HEAD = """
import sys
from ray.cluster_utils import Cluster
head = {"num_cpus": 2, "num_gpus": 1, "include_dashboard": False, "include_log_monitor": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def address():
    """Of a cluster that asks for its token, with two cores and a GPU that nobody uses; drivers come from outside."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex, "RAY_USAGE_STATS_ENABLED": "0"}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():  # Ray reads them when it is imported
            environment.setenv(name, value)
        command = [sys.executable, "-c", HEAD]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as head:
            yield head.stdout.readline().strip()
            head.communicate()


@pytest.fixture
def behave(monkeypatch):
    def set_behaviour(**behaviour):
        monkeypatch.setenv("MIXLAB_FAKE_TARGET", json.dumps(behaviour))

    set_behaviour()
    return set_behaviour


def test_every_end_of_a_worker_is_accounted_for_as_on_one_machine(tmp_path, behave, address):
    behave(outcome={"0": "die_once", "1": "memory_beside_others"})
    sweep = one_arm(tmp_path, seeds=[0, 1, 2], base__train__device="cpu")
    result, events = drive(sweep, tmp_path / "runs", n_workers=None, ray=address)
    assert result.outcomes == {"finished": 3}
    assert set(completions(tmp_path / "runs").values()) == {1}
    attempts = {run.identity.seed: n_attempts(run.folder) for run in read_sweep_runs(tmp_path / "runs", "tiny")}
    assert attempts == {0: 2, 1: 2, 2: 1}
    assert {event["worker"] for event in events if event["event"] == "run_started"} == {0, 1}


def test_a_killed_station_takes_its_worker_along_and_its_run_goes_on_after_ctrl_c_elsewhere(tmp_path, behave, address):
    behave(n_steps=600, step_s=0.1)
    # Half of a GPU is for the run, whether it uses it or not.
    sweep, runs = one_arm(tmp_path, seeds=[0], base__train__device="auto"), tmp_path / "runs"
    attempts: list[int] = []

    def disturb() -> None:
        until(lambda: steps(runs) > 1)
        attempts.append(json.loads(next(runs.glob("tiny/*/attempts.jsonl")).read_text().splitlines()[0])["pid"])
        station = int(Path(f"/proc/{attempts[0]}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(station, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{attempts[0]}").exists())
        next(runs.glob("tiny/*/step.txt")).unlink()
        until(lambda: steps(runs) > 1)
        os.kill(os.getpid(), signal.SIGINT)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    result, events = drive(sweep, runs, n_workers=None, per_gpu=2, ray=address)
    disturber.join()
    assert [e["reason"] for e in events if e["event"] == "run_retried"] == ["its Ray worker was lost"]
    assert (result.interrupted, result.exit_code) == (True, 130)
    assert [r.outcome.outcome for r in read_sweep_runs(runs, "tiny")] == ["killed"]
    behave()
    assert drive(sweep, runs)[0].outcomes == {"finished": 1}  # without Ray: the records are the same
    first, second, third = map(int, next(runs.glob("tiny/*/starts.log")).read_text().split())
    assert (first, second) == (0, 0)
    assert third > 1


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
def test_what_can_not_be_is_one_clear_line(tmp_path, behave, address, options, message):
    with pytest.raises(UserError) as caught:
        drive(tiny(tmp_path), tmp_path / "runs", **{"ray": address, **options})
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
