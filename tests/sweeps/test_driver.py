"""Whole sweeps with real worker processes; only the training itself is a stand-in."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest
import torch

from experiments.errors import UserError
from experiments.records import n_attempts, read_json, read_outcome, read_sweep_runs, write_json
from sweeps.local_executor import memory_kills
from sweeps.lock import driver_lock, driver_runs
from sweeps.plan import plan
from sweeps.saved import read_saved
from tests.sweeps.fake_target import TARGET
from tests.sweeps.helpers import TOP, completions, drive, one_arm, tiny, tuned, write_sweep

PLUGIN = """
import sys
from mixers.registry import register
from mixers.softmax import SoftmaxAttention

@register("of_the_plugin")
class OfThePlugin(SoftmaxAttention):
    pass

if "sweeps.worker" in sys.orig_argv:
    raise RuntimeError("loaded in the worker")
"""


@pytest.fixture
def behave(monkeypatch):
    def set_behaviour(**behaviour):
        monkeypatch.setenv("MIXLAB_FAKE_TARGET", json.dumps(behaviour))

    set_behaviour()
    return set_behaviour


def test_a_sweep_without_tuning_runs_every_seed_once_and_then_no_more(tmp_path, behave):
    sweep = tiny(tmp_path, '[vary]\n"task.n_pairs" = [2, 4]\n')
    result, events = drive(sweep, tmp_path / "runs", n_workers=2)
    assert result.outcomes == {"finished": 8}
    assert result.exit_code == 0
    expected = {run.key for arm_cell in plan(sweep).arm_cells for run in arm_cell.replicates({})}
    assert dict(completions(tmp_path / "runs")) == dict.fromkeys(expected, 1)
    assert [event["event"] for event in events].count("run_ended") == 8
    assert {record.identity.key for record in read_sweep_runs(tmp_path / "runs", "tiny")} == expected

    again, events = drive(sweep, tmp_path / "runs")
    assert again == result
    assert sum(completions(tmp_path / "runs").values()) == 8
    assert not [event for event in events if event["event"] == "run_started"]


def test_settings_are_chosen_on_select_only_and_replicates_use_them(tmp_path, behave):
    sweep = tuned(tmp_path, 4, tune__train__lr={"choice": [3e-4, 3e-3, 3e-2, 3e-1]})
    result, events = drive(sweep, tmp_path / "runs")
    assert result.outcomes == {"finished": 2 * (4 + 2)}
    saved = read_saved(tmp_path / "runs", "tiny")
    assert {name: choice["settings"] for name, choice in saved.chosen.items()} == {
        "narrow | all": {"train.lr": 3e-3},
        "wide | all": {"train.lr": 3e-3},
    }
    assert saved.chosen["narrow | all"]["value"] == pytest.approx(1.0, abs=0.01)
    replicates = [r for r in read_sweep_runs(tmp_path / "runs", "tiny") if r.identity.role == "replicate"]
    assert {(r.identity.arm, r.identity.seed, r.config["train"]["lr"]) for r in replicates} == {
        (arm, seed, 3e-3) for arm in ("narrow", "wide") for seed in (0, 1)
    }
    assert {run.key for run in saved.runs} == set(completions(tmp_path / "runs"))
    # No barrier: the first arm's replicates start before the second arm's last trial, with one worker for certain.
    started = [(e["arm"], e["role"]) for e in events if e["event"] == "run_started"]
    last_trial = max(i for i, run in enumerate(started) if run == ("wide", "tuning"))
    assert started.index(("narrow", "replicate")) < last_trial


def test_an_adaptive_search_runs_to_its_end(tmp_path, behave):
    sweep = tuned(tmp_path, 5, search__sampler="tpe")
    result, events = drive(sweep, tmp_path / "runs", n_workers=2)
    assert result.outcomes == {"finished": 2 * (5 + 2)}
    # As many replicates as there are workers wait for the last search, so that none idles while it ends.
    roles = [event["role"] for event in events if event["event"] == "run_started"]
    assert roles[:9] == ["tuning"] * 9  # the next two are started at once, in whatever order their workers say so
    assert max(completions(tmp_path / "runs").values()) == 1
    assert drive(sweep, tmp_path / "runs")[0] == result
    assert sum(completions(tmp_path / "runs").values()) == 14


def test_a_training_that_raises_is_a_failed_run_and_the_sweep_goes_on(tmp_path, behave):
    behave(outcome={"0": "raise"})
    sweep = one_arm(tmp_path)
    result, events = drive(sweep, tmp_path / "runs")
    assert result.outcomes == {"finished": 1, "failed": 1}
    assert result.exit_code == 1
    failed = [event for event in events if event.get("outcome") == "failed"]
    assert [event["reason"] for event in failed] == ["ValueError: this seed is bad"]
    log = (tmp_path / "runs" / "tiny" / failed[0]["key"] / "log.txt").read_text()
    assert f"training {failed[0]['key']}" in log
    assert "Traceback" in log

    assert drive(sweep, tmp_path / "runs")[0].outcomes == {"finished": 1, "failed": 1}
    behave()
    assert drive(sweep, tmp_path / "runs", retry_failed=True)[0].outcomes == {"finished": 2}
    assert set(completions(tmp_path / "runs").values()) == {1}


def test_a_killed_worker_is_replaced_and_its_run_tried_once_more(tmp_path, behave):
    behave(outcome={"0": "die_once", "1": "die"})
    result, events = drive(one_arm(tmp_path), tmp_path / "runs", n_workers=2)
    assert result.outcomes == {"finished": 1, "failed": 1}
    retried = [event for event in events if event["event"] == "run_retried"]
    assert len(retried) == 2
    assert "SIGSEGV" in retried[0]["reason"]
    for record in read_sweep_runs(tmp_path / "runs", "tiny"):
        starts = (record.folder / "starts.log").read_text().split()
        assert len(starts) == 2
        if record.identity.seed == 1:
            assert record.outcome.reason.startswith("the worker was ended by signal SIGSEGV")
            assert "in each of 2 attempts" in record.outcome.reason


@pytest.mark.skipif(memory_kills() is None, reason="this system doesn't say how many processes it has ended")
def test_a_run_whose_worker_somebody_kills_is_not_to_blame(tmp_path, behave):
    behave(outcome={"0": "killed_thrice"})
    result, events = drive(one_arm(tmp_path), tmp_path / "runs")
    assert result.outcomes == {"finished": 2}
    retried = [event["reason"] for event in events if event["event"] == "run_retried"]
    assert retried == ["the worker was ended by signal SIGKILL"] * 3


def test_a_full_disk_is_one_clear_line_and_no_result(tmp_path, behave):
    behave(outcome={"0": "disk_full"})
    with pytest.raises(UserError, match=r"sweep tiny: .*No space left on device; free some space and start it again"):
        drive(tiny(tmp_path), tmp_path / "runs")
    assert not any(
        record.outcome is not None and record.outcome.outcome == "failed"
        for record in read_sweep_runs(tmp_path / "runs", "tiny")
    )
    behave()
    assert drive(tiny(tmp_path), tmp_path / "runs")[0].outcomes == {"finished": 4}


def test_a_driver_tidies_up_after_a_lost_one(tmp_path, behave):
    sweep = tiny(tmp_path)
    drive(sweep, tmp_path / "runs")
    folder = tmp_path / "runs" / "tiny"
    run = next(path for path in folder.iterdir() if path.is_dir())
    left = [folder / ".sweep.json.1.tmp", run / ".outcome.json.1.tmp", run / "checkpoint.pt"]
    for path in left:
        path.write_text("half of it")
    drive(sweep, tmp_path / "runs")
    assert not any(path.exists() for path in left)


def test_a_lock_says_whether_its_last_holder_was_lost(tmp_path):
    for expected in (False, False):
        with driver_lock(tmp_path) as was_lost:
            assert was_lost is expected
    with pytest.raises(ValueError, match="lost"), driver_lock(tmp_path):
        raise ValueError("lost")
    with driver_lock(tmp_path) as was_lost:
        assert was_lost is True


def test_a_silent_worker_is_ended_and_its_run_tried_once_more(tmp_path, behave):
    behave(outcome={"0": "hang_once"})
    # Long enough for the healthy run of a fresh worker on a busy machine.
    result, events = drive(one_arm(tmp_path), tmp_path / "runs", stall_s=4.0)
    assert result.outcomes == {"finished": 2}
    retried = [event for event in events if event["event"] == "run_retried"]
    assert [event["reason"] for event in retried] == ["no sign of life for 4 s"]
    assert set(completions(tmp_path / "runs").values()) == {1}


def test_a_run_without_memory_is_tried_once_more_and_alone(tmp_path, behave):
    behave(outcome={"0": "memory_beside_others"}, n_steps=3, step_s=0.05)
    result, events = drive(one_arm(tmp_path, seeds=[0, 1, 2, 3]), tmp_path / "runs", n_workers=2)
    assert result.outcomes == {"finished": 4}
    retried = [event["key"] for event in events if event["event"] == "run_retried"]
    assert len(retried) == 1
    spans = {}
    for record in read_sweep_runs(tmp_path / "runs", "tiny"):
        spans[record.identity.key] = tuple(map(float, (record.folder / "spans.log").read_text().split()))
        assert n_attempts(record.folder) == (2 if record.identity.key in retried else 1)
    for key in retried:
        start, end = spans.pop(key)
        assert all(end <= other_start or start >= other_end for other_start, other_end in spans.values())


def test_without_memory_alone_either_it_is_a_failure(tmp_path, behave):
    behave(outcome={"0": "memory"})
    result, _ = drive(one_arm(tmp_path), tmp_path / "runs", n_workers=2)
    assert result.outcomes == {"finished": 1, "failed": 1}
    failed = [r for r in read_sweep_runs(tmp_path / "runs", "tiny") if r.outcome.outcome == "failed"]
    assert [record.outcome.reason for record in failed] == ["out of memory: 3 GB asked for"]
    assert [n_attempts(record.folder) for record in failed] == [2]


def test_with_one_worker_every_run_is_alone_already(tmp_path, behave):
    behave(outcome={"0": "memory"})
    result, events = drive(one_arm(tmp_path), tmp_path / "runs")
    assert result.outcomes == {"finished": 1, "failed": 1}
    assert not [event for event in events if event["event"] == "run_retried"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_gpu": 0}, "--per-gpu: at least 1 is needed, got 0"),
        ({"per_gpu": 2}, "--workers and --per-gpu both set the number of workers; leave one out"),
        ({"gpus": ("0",)}, "--gpus: this machine has no usable CUDA device; mixlab doctor says why"),
        ({"stall_s": -1.0}, "--stall-after: seconds of silence, or 0 for no limit, got -1"),
    ],
)
def test_slots_that_can_not_be(tmp_path, behave, options, message):
    with pytest.raises(UserError) as caught:
        drive(tiny(tmp_path), tmp_path / "runs", **{"n_workers": 2, **options})
    assert str(caught.value) == message
    assert not (tmp_path / "runs").exists()


def test_runs_on_the_cpu_take_no_gpus(tmp_path, behave):
    with pytest.raises(UserError, match=r"--gpus: runs of this sweep have train\.device='cpu'; set it to 'auto' or"):
        drive(tiny(tmp_path, base__train__device="cpu"), tmp_path / "runs", gpus=("0",))


def test_diverged_trials_never_win_though_their_metric_is_the_best(tmp_path, behave):
    behave(outcome={"0.1": "diverged"})
    result, _ = drive(tuned(tmp_path, 4), tmp_path / "runs")
    assert result.outcomes == {"finished": 2 * (3 + 2), "diverged": 2}
    chosen = read_saved(tmp_path / "runs", "tiny").chosen
    assert chosen["wide | all"]["settings"] == {"train.lr": 1e-3}


def test_an_arm_of_which_all_trials_diverge_has_no_replicates_and_the_sweep_goes_on(tmp_path, behave):
    behave(outcome={"0.1": "diverged", "0.2": "diverged"})
    text = "[tune]\n'train.lr' = { choice = [0.1, 0.2] }\n"
    result, events = drive(tiny(tmp_path, text, budget__tune_trials=2), tmp_path / "runs")
    assert result.outcomes == {"diverged": 4, "not_run": 4}
    assert result.exit_code == 0
    reason = "not run: none of 2 tuning trials can be chosen (2 diverged)"
    assert [event["reason"] for event in events if event["event"] == "chosen"] == [reason] * 2
    saved = read_saved(tmp_path / "runs", "tiny")
    assert saved.chosen["narrow | all"]["reason"] == reason
    assert {run.role for run in saved.runs} == {"tuning"}


@pytest.mark.parametrize("split", ["select", "report"])
def test_a_metric_that_no_run_has_ends_the_sweep_with_the_names_there_are(tmp_path, behave, split):
    sweep = tuned(tmp_path, 2, **{f"metric__{split}": f"{split}/acuracy"})
    expected = f"sweep tiny: metric.{split}: runs have no '{split}/acuracy'; of this split they have: {split}/accuracy"
    for _ in range(2):  # the second time from the records
        with pytest.raises(UserError) as caught:
            drive(sweep, tmp_path / "runs")
        assert str(caught.value) == expected
    assert not driver_runs(tmp_path / "runs" / "tiny")


def test_an_edited_sweep_keeps_what_it_has_and_counts_what_it_plans(tmp_path, behave):
    drive(tiny(tmp_path), tmp_path / "runs")
    result, events = drive(tiny(tmp_path, seeds=[1, 2], threads=3), tmp_path / "runs", n_workers=2)
    assert result.outcomes == {"finished": 4}
    assert sum(completions(tmp_path / "runs").values()) == 6
    assert len(read_saved(tmp_path / "runs", "tiny").runs) == 4
    # One thread in each run, whatever the number of workers and cores, until the file says otherwise.
    records = read_sweep_runs(tmp_path / "runs", "tiny")
    threads = {(r.identity.seed, read_json(r.folder / "environment.json")["n_threads"]) for r in records}
    assert threads == {(0, 1), (1, 1), (2, 3)}
    notes = [event["message"] for event in events if event["event"] == "note"]
    assert [note.partition(":")[0] for note in notes] == ["its runs have had threads=1 so far, those to come have 3"]


def test_a_bad_plan_creates_nothing(tmp_path, behave):
    with pytest.raises(UserError):
        drive(tiny(tmp_path, base__task__n_pair=3), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_second_driver_names_the_first(tmp_path, behave):
    folder = tmp_path / "runs" / "tiny"
    with driver_lock(folder):
        assert driver_runs(folder)
        with pytest.raises(UserError, match=f"sweep tiny is already being run by process {os.getpid()} on "):
            drive(tiny(tmp_path), tmp_path / "runs")
    assert not driver_runs(folder)
    assert drive(tiny(tmp_path), tmp_path / "runs")[0].exit_code == 0


def test_workers_that_can_not_start_are_one_clear_line(tmp_path, behave):
    with pytest.raises(UserError, match="workers can't start: ModuleNotFoundError: No module named 'no_such_module'"):
        drive(tiny(tmp_path), tmp_path / "runs", target="no_such_module:run")


def test_a_driver_of_its_own_needs_no_torch_and_says_what_has_been_edited(tmp_path, behave):
    path, runs = write_sweep(tmp_path), tmp_path / "runs"
    words = {"sweep": str(path), "overrides": {"seeds": [0]}, "runs": str(runs), "target": TARGET, "tracked": False}
    code = "import sys; from sweeps.bench_driver import main; main(); sys.exit('torch' in sys.modules)"
    run = functools.partial(subprocess.run, cwd=TOP, capture_output=True, text=True)
    done = run([sys.executable, "-c", code, json.dumps(words)])
    assert (done.returncode, done.stderr) == (0, "")
    taken = json.loads(done.stdout)
    assert taken["outcomes"] == {"finished": 2}
    assert taken["peak_bytes"] < 200 << 20

    unplanned = f"import sweeps.planning; sweeps.planning.plan = None; {code}"
    again = subprocess.run(
        [sys.executable, "-c", unplanned, json.dumps(words)], cwd=TOP, capture_output=True, text=True
    )
    assert json.loads(again.stdout)["outcomes"] == taken["outcomes"], "the plan that was kept stands"
    words["overrides"] = {"seeds": [1]}
    edited = subprocess.run(
        [sys.executable, "-c", unplanned, json.dumps(words)], cwd=TOP, capture_output=True, text=True
    )
    assert "sweep tiny: planning failed" in edited.stderr
    saved = read_json(runs / "tiny" / "sweep.json")
    assert "experiments/train.py" in saved["code"]
    write_json(runs / "tiny" / "sweep.json", {**saved, "code": {**saved["code"], "experiments/train.py": "other"}})
    result, events = drive(tiny(tmp_path, seeds=[0]), runs)
    assert result.outcomes == {"finished": 2}  # by the same keys: the plan was made in a process of its own, and here
    notes = [event["message"] for event in events if event["event"] == "note"]
    assert notes == ["edited since the last start: experiments/train.py; runs that depend on it are run again"]
    assert not [event for event in events if event["event"] == "run_started"]


def test_workers_load_the_plugins(tmp_path, behave):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN, encoding="utf-8")
    with pytest.raises(UserError, match="loaded in the worker"):
        drive(tiny(tmp_path), tmp_path / "runs", plugins=(str(plugin),))


def test_code_that_is_edited_while_the_sweep_runs_ends_it_and_spoils_no_record(tmp_path, behave):
    plugin = tmp_path / "plugin.py"
    edits_itself = PLUGIN.replace("raise RuntimeError(", "open(__file__, 'a').write('X = 1\\n') or print(")
    plugin.write_text(edits_itself.replace("of_the_plugin", "edits_itself"), encoding="utf-8")
    sweep = tiny(tmp_path, arms__wide__mixer="edits_itself", seeds=[0])
    with pytest.raises(UserError, match="sweep tiny: its code has been edited since it was started, or is another on"):
        drive(sweep, tmp_path / "runs", plugins=(str(plugin),))
    assert [run.identity.arm for run in read_sweep_runs(tmp_path / "runs", "tiny")] == ["narrow"]


def test_zero_workers(tmp_path, behave):
    with pytest.raises(UserError, match="--workers: at least 1 is needed, got 0"):
        drive(tiny(tmp_path), tmp_path / "runs", n_workers=0)
    assert not (tmp_path / "runs").exists()


def test_progress_is_told_with_numbers_only(tmp_path, behave):
    _, events = drive(tiny(tmp_path, seeds=[0]), tmp_path / "runs")
    progress = [event for event in events if event["event"] == "run_progress"]
    assert {event["arm"] for event in progress} == {"narrow", "wide"}
    assert progress[-1]["step"] == progress[-1]["n_steps"] == 2
    assert set(progress[-1]["metrics"]) == {"train/loss"}


def test_a_killed_record_is_run_again(tmp_path, behave):
    sweep = tiny(tmp_path)
    drive(sweep, tmp_path / "runs")
    record = read_sweep_runs(tmp_path / "runs", "tiny")[0]
    values = json.loads((record.folder / "outcome.json").read_text())
    (record.folder / "outcome.json").write_text(json.dumps({**values, "outcome": "killed"}))
    drive(sweep, tmp_path / "runs")
    assert read_outcome(record.folder).outcome == "finished"
    assert completions(tmp_path / "runs")[record.identity.key] == 2
