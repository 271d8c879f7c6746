"""Sweeps on a real Ray cluster of this machine; only the training itself is a stand-in."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from experiments.errors import UserError
from experiments.records import n_attempts, read_sweep_runs
from sweeps.definition import load_sweep
from sweeps.plan import plan
from sweeps.resources import RayShare, ray_share
from tests.sweeps.helpers import completions, drive, tiny, write_sweep


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    signal.signal(signal.SIGTERM, handler)
    yield ray
    ray.shutdown()


@pytest.fixture
def behave(monkeypatch):
    def set_behaviour(**behaviour):
        monkeypatch.setenv("MIXLAB_FAKE_TARGET", json.dumps(behaviour))

    set_behaviour()
    return set_behaviour


def on_ray(sweep, runs, **options):
    return drive(sweep, runs, ray="auto", **options)


ONE_ARM = {'[arms.wide]\nmixer = "softmax"\nmodel.d_model = 32\n': ""}


def one_arm(folder, **overrides):
    """A worker's start costs seconds: no more of them than it takes."""
    return load_sweep(write_sweep(folder, **ONE_ARM), {key.replace("__", "."): v for key, v in overrides.items()})


def test_every_end_of_a_worker_is_accounted_for_as_on_one_machine(tmp_path, behave, cluster):
    behave(outcome={"0": "die_once", "1": "memory_beside_others", "2": "raise"})
    sweep = one_arm(tmp_path, seeds=[0, 1, 2, 3])
    result, events = on_ray(sweep, tmp_path / "runs")
    assert result.outcomes == {"finished": 3, "failed": 1}
    assert set(completions(tmp_path / "runs").values()) == {1}
    attempts = {run.identity.seed: n_attempts(run.folder) for run in read_sweep_runs(tmp_path / "runs", "tiny")}
    assert attempts == {0: 2, 1: 2, 2: 1, 3: 1}
    assert {event["worker"] for event in events if event["event"] == "run_started"} == {0, 1}


def test_a_killed_station_takes_its_worker_along_and_its_run_is_tried_again(tmp_path, behave, cluster):
    behave(n_steps=20, step_s=0.1)
    sweep, runs = one_arm(tmp_path, seeds=[0]), tmp_path / "runs"
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            started = sorted(runs.glob("tiny/*/attempts.jsonl"))
            if started:
                worker = json.loads(started[0].read_text().splitlines()[0])["pid"]
                station = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
                os.kill(station, signal.SIGKILL)
                killed.append(worker)
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    result, events = on_ray(sweep, runs, n_workers=1)
    killer.join()
    assert result.outcomes == {"finished": 1}
    assert [e["reason"] for e in events if e["event"] == "run_retried"] == ["its Ray worker was lost"]
    assert not Path(f"/proc/{killed[0]}").exists()
    assert set(completions(runs).values()) == {1}


def test_an_interrupted_sweep_saves_and_goes_on_elsewhere(tmp_path, behave, cluster):
    behave(n_steps=30, step_s=0.1)
    sweep, runs = one_arm(tmp_path, seeds=[0]), tmp_path / "runs"

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while not list(runs.glob("tiny/*/starts.log")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    result, _ = on_ray(sweep, runs, n_workers=1)
    assert (result.interrupted, result.exit_code) == (True, 130)
    assert {r.outcome.outcome for r in read_sweep_runs(runs, "tiny")} == {"killed"}
    behave(n_steps=30)
    assert drive(sweep, runs, n_workers=1)[0].outcomes == {"finished": 1}  # without Ray: the records are the same
    starts = [int((r.folder / "starts.log").read_text().split()[-1]) for r in read_sweep_runs(runs, "tiny")]
    assert max(starts) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": ("0",)}, "--gpus names those of this machine; with --ray, Ray deals them out: leave it out"),
        ({"per_gpu": 2, "n_workers": None}, "--ray: the cluster has no GPU, and runs of this sweep are to use one"),
        (
            {"target": "no_such_module:run"},
            "workers can't start: ModuleNotFoundError: No module named 'no_such_module'",
        ),
    ],
)
def test_what_can_not_be_is_one_clear_line(tmp_path, behave, cluster, options, message):
    with pytest.raises(UserError) as caught:
        on_ray(tiny(tmp_path), tmp_path / "runs", **options)
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


def test_runs_that_name_their_gpu_are_not_dealt_out(tmp_path):
    planned = plan(tiny(tmp_path, base__train__device="cuda:1"))
    with pytest.raises(UserError, match=r"--ray: runs of this sweep have train\.device='cuda:1'; Ray deals GPUs out"):
        ray_share(planned, [NODE], None, 100)
