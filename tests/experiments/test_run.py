"""Training and its record: resume, divergence, early stop, state protocol, cost."""

from __future__ import annotations

import errno
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from experiments.backbone import build_model
from experiments.config import ExperimentConfig, merged
from experiments.cost import measure_cost
from experiments.device import resolve_compute
from experiments.errors import UserError
from experiments.progress import Interrupted, Progress
from experiments.records import RunIdentity, read_metrics, read_run
from experiments.reevaluate import evaluate_checkpoint
from experiments.run import TrackingTarget, run_experiment
from experiments.tasks import build_task
from experiments.tracking import ensure_experiment, prepare_store
from experiments.train import Trainer

FW = "fwpkm(n_subkeys=4,top_k=2,key_dim=8,chunk_size=4)"
MQAR = {
    "model": {"pattern": f"softmax | {FW}@0", "d_model": 16, "n_layers": 1, "short_conv": 3},
    "task": {"name": "mqar", "vocab_size": 32, "seq_len": 16, "n_pairs": 2, "filler": "zeros",
             "n_train": 96, "n_select": 32, "n_report": 32},
    "train": {"batch_size": 16, "max_steps": 24, "lr": 0.01, "warmup_steps": 3, "eval_every": 8, "log_every": 1,
              "checkpoint_every_s": 0.0},
}  # fmt: skip


def text_config(folder: Path, **changes) -> ExperimentConfig:
    for number in range(12):
        body = f"document {number} says {number * 37} and then {'again ' * (number + 5)}.\n" * 20
        (folder / f"{number}.txt").write_text(body)
    values = {
        "model": {"pattern": FW, "d_model": 16, "n_layers": 1},
        "task": {
            "name": "text",
            "path": str(folder),
            "seq_len": 32,
            "eval_len": 64,
            "n_select": 4,
            "n_report": 4,
            "document_bytes": 512,
            "select_fraction": 0.2,
            "report_fraction": 0.2,
        },
        "train": {"batch_size": 2, "max_steps": 12, "lr": 0.01, "log_every": 1, "checkpoint_every_s": 0.0},
        "state": {"carry": "stream", "scope": "shared"},
    }
    return ExperimentConfig.parse(merged(values, changes), "here")


def mqar_config(**changes) -> ExperimentConfig:
    return ExperimentConfig.parse(merged(MQAR, changes), "here")


def identity(config: ExperimentConfig, sweep: str = "test") -> RunIdentity:
    return RunIdentity(config.key(), sweep, "arm", "all", {}, "replicate", config.seed, config.model.pattern)


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_metrics(folder) if "train/loss" in row}


@pytest.mark.parametrize("log_every", [1, 4])
@pytest.mark.parametrize("kind", ["mqar", "text_stream"])
def test_a_resumed_run_equals_an_uninterrupted_one(kind: str, log_every: int, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    logging = {"train": {"log_every": log_every}}
    config = mqar_config(**logging) if kind == "mqar" else text_config(corpus, **logging)
    who = identity(config)
    whole = run_experiment(config, who, tmp_path / "whole")
    assert whole.outcome == "finished"

    for stop_at in (5, 7, 11):

        def stop(progress: Progress, at: int = stop_at) -> None:
            if progress.step >= at:
                raise Interrupted

        killed = run_experiment(config, who, tmp_path / "cut", on_progress=stop)
        assert (killed.outcome, killed.step) == ("killed", stop_at)
        assert (tmp_path / "cut" / "test" / config.key() / "checkpoint.pt").is_file()
    resumed = run_experiment(config, who, tmp_path / "cut")
    assert resumed.outcome == "finished"
    assert resumed.metrics == whole.metrics
    folders = [tmp_path / name / "test" / config.key() for name in ("whole", "cut")]
    assert losses(folders[0]) == losses(folders[1])
    assert len(losses(folders[1])) == config.train.max_steps // log_every
    assert not (folders[1] / "checkpoint.pt").exists()
    assert resumed.data_hash == whole.data_hash


def test_an_interruption_within_an_evaluation_loses_no_evaluation(tmp_path: Path, monkeypatch) -> None:
    """A worker that must stop at once raises wherever the training is: here in the first evaluation on select."""
    config = mqar_config(train={"stop": {"metric": "select/accuracy", "threshold": 0.0}})
    who = identity(config)
    whole = run_experiment(config, who, tmp_path / "whole")
    evaluate = Trainer._evaluate

    def interrupted(self: Trainer, split: str) -> dict[str, float]:
        raise Interrupted

    monkeypatch.setattr(Trainer, "_evaluate", interrupted)
    assert run_experiment(config, who, tmp_path / "cut").outcome == "killed"
    monkeypatch.setattr(Trainer, "_evaluate", evaluate)
    resumed = run_experiment(config, who, tmp_path / "cut")
    assert (resumed.step, resumed.metrics) == (whole.step, whole.metrics) == (8, whole.metrics)


def test_a_run_that_was_cut_off_before_its_outcome_has_its_last_row_once(tmp_path: Path) -> None:
    config = mqar_config(train={"keep_checkpoint": True})  # of the last step
    who = identity(config)
    whole = run_experiment(config, who, tmp_path)
    folder = tmp_path / "test" / config.key()
    before = [{**row, "time_ms": 0} for row in read_metrics(folder)]
    (folder / "outcome.json").unlink()
    again = run_experiment(config, who, tmp_path)
    assert again.metrics == whole.metrics
    assert [{**row, "time_ms": 0} for row in read_metrics(folder)] == before


def test_a_crash_between_checkpoints_repeats_the_lost_steps(tmp_path: Path) -> None:
    config = mqar_config(train={"checkpoint_every_s": 3600.0})
    who = identity(config)
    whole = run_experiment(config, who, tmp_path / "whole")

    def crash(progress: Progress) -> None:
        if progress.step == 9:
            raise OSError("no space left on device")

    failed = run_experiment(config, who, tmp_path / "cut", on_progress=crash)
    assert (failed.outcome, failed.reason) == ("failed", "OSError: no space left on device")
    folder = tmp_path / "cut" / "test" / config.key()
    (folder / "outcome.json").unlink()
    again = run_experiment(config, who, tmp_path / "cut")
    assert again.metrics == whole.metrics
    steps = [row["step"] for row in read_metrics(folder) if "train/loss" in row]
    assert steps == list(range(1, 25))


def test_torn_metrics_are_all_made_again(tmp_path: Path) -> None:
    config = mqar_config(train={"checkpoint_every_s": 0.0, "log_every": 1})
    who = identity(config)
    run_experiment(config, who, tmp_path / "whole")
    (whole,) = (tmp_path / "whole" / "test").iterdir()

    def interrupt(progress: Progress) -> None:
        if progress.step == 9:
            raise Interrupted

    run_experiment(config, who, tmp_path / "cut", on_progress=interrupt)
    (cut,) = (tmp_path / "cut" / "test").iterdir()
    metrics = cut / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])  # the row of step 9, which the checkpoint has behind it
    run_experiment(config, who, tmp_path / "cut")
    assert losses(cut) == losses(whole)
    assert len(read_metrics(cut)) == len(read_metrics(whole))


def test_a_full_disk_is_raised_and_no_result(tmp_path: Path) -> None:
    config = mqar_config()
    who = identity(config)
    whole = run_experiment(config, who, tmp_path / "whole")

    def full(progress: Progress) -> None:
        if progress.step == 9:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run_experiment(config, who, tmp_path / "cut", on_progress=full)
    (folder,) = (tmp_path / "cut" / "test").iterdir()
    assert not (folder / "outcome.json").exists()
    assert run_experiment(config, who, tmp_path / "cut").metrics == whole.metrics


def test_a_final_outcome_is_returned_not_repeated(tmp_path: Path) -> None:
    config = mqar_config(train={"max_steps": 2})
    first = run_experiment(config, identity(config), tmp_path)

    def never(_: Progress) -> None:
        raise AssertionError("trained again")

    assert run_experiment(config, identity(config), tmp_path, on_progress=never) == first


def test_divergence_is_an_outcome(tmp_path: Path) -> None:
    config = mqar_config(train={"lr": 1e18, "clip_norm": None, "warmup_steps": 0, "weight_decay": 0.0})
    outcome = run_experiment(config, identity(config), tmp_path)
    assert outcome.outcome == "diverged"
    assert "step" in outcome.reason or "finite" in outcome.reason
    record = read_run(tmp_path / "test" / config.key())
    assert record is not None
    assert record.outcome == outcome
    for line in (record.folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl"))


def test_early_stop_reads_select(tmp_path: Path) -> None:
    config = mqar_config(train={"stop": {"metric": "select/accuracy", "threshold": 0.0}})
    outcome = run_experiment(config, identity(config), tmp_path)
    assert (outcome.step, outcome.reason) == (8, "stopped early")
    patient = mqar_config(train={"lr": 1e-12, "stop": {"metric": "select/accuracy", "patience": 1}})
    assert run_experiment(patient, identity(patient), tmp_path).step == 16


def test_the_report_split_is_read_once(tmp_path: Path) -> None:
    config = mqar_config()
    run_experiment(config, identity(config), tmp_path)
    rows = read_metrics(tmp_path / "test" / config.key())
    assert [row["step"] for row in rows if "report/accuracy" in row] == [24]
    assert [row["step"] for row in rows if "select/accuracy" in row] == [8, 16, 24]


def test_the_schedule_is_stepped(tmp_path: Path) -> None:
    config = mqar_config()
    run_experiment(config, identity(config), tmp_path)
    rows = read_metrics(tmp_path / "test" / config.key())
    lrs = [row["train/lr"] for row in rows if "train/lr" in row]
    assert lrs[0] == pytest.approx(0.01 / 3)
    assert max(lrs) == pytest.approx(0.01)
    assert all(a > b for a, b in itertools.pairwise(lrs[3:]))


def test_token_budget_becomes_steps() -> None:
    config = mqar_config(train={"max_steps": None, "max_tokens": 1000})
    config = ExperimentConfig.parse(config.resolved(), "here")
    task = build_task(config.task, 0)
    trainer = Trainer(config, build_model(config, task.vocab_size), task, resolve_compute(config.train))
    assert trainer.n_steps == math.ceil(1000 / (16 * 16))


def test_carry_stream_needs_an_order() -> None:
    config = mqar_config(state={"carry": "stream"})
    task = build_task(config.task, 0)
    with pytest.raises(UserError, match="carry='stream'"):
        Trainer(config, build_model(config, task.vocab_size), task, resolve_compute(config.train))


def test_carried_state_and_reads_change_results(tmp_path: Path) -> None:
    """The protocol does what it says: each of its switches makes a difference to a memory."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    found = {}
    for name, state in {
        "stream": {},
        "fresh": {"carry": "none"},
        "twice": {"reads": 2},
        "kept": {"reset_between_samples": False},
    }.items():
        config = text_config(corpus, state=state, train={"eval_batch_size": 2})
        found[name] = run_experiment(config, identity(config), tmp_path).metrics["report/bits_per_byte"]
    assert len(set(found.values())) == 4
    assert all(math.isfinite(value) for value in found.values())


def test_mlflow_shows_what_the_record_holds(tmp_path: Path) -> None:
    import mlflow

    uri, artifacts = f"sqlite:///{tmp_path / 'mlflow.db'}", (tmp_path / "artifacts").as_uri()
    prepare_store(uri, artifacts)
    experiment_id = ensure_experiment(uri, "test", artifacts, {})
    config = mqar_config()
    outcome = run_experiment(config, identity(config), tmp_path, tracking=TrackingTarget(uri, experiment_id))
    client = mlflow.MlflowClient(uri)
    run = client.get_run(outcome.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mixlab.key"] == config.key()
    assert run.data.tags["mixlab.outcome"] == "finished"
    assert run.data.tags["mixlab.data_hash"] == outcome.data_hash
    assert run.data.params["train.lr"] == "0.01"
    assert run.data.metrics["report/accuracy"] == outcome.metrics["report/accuracy"]
    assert run.data.metrics["cost/state_bytes"] == outcome.cost["state_bytes"]
    history = client.get_metric_history(outcome.mlflow_run_id, "train/loss")
    assert {point.step: point.value for point in history} == losses(tmp_path / "test" / config.key())


def test_evaluate_a_kept_checkpoint(tmp_path: Path) -> None:
    config = mqar_config(train={"keep_checkpoint": True})
    outcome = run_experiment(config, identity(config), tmp_path)
    folder = tmp_path / "test" / config.key()
    assert evaluate_checkpoint(config, config, folder) == outcome.metrics
    longer = ExperimentConfig.parse(merged(config.resolved(), {"task.seq_len": 32}), "here")
    assert evaluate_checkpoint(config, longer, folder) != outcome.metrics


def test_bf16_trains_on_cpu(tmp_path: Path) -> None:
    config = mqar_config(train={"precision": "bf16", "device": "cpu"})
    outcome = run_experiment(config, identity(config), tmp_path)
    assert outcome.outcome == "finished"
    assert losses(tmp_path / "test" / config.key())[24] < losses(tmp_path / "test" / config.key())[1]


def test_costs_against_known_answers() -> None:
    d, t = 16, 32
    config = mqar_config(model={"pattern": "softmax", "short_conv": 0})
    compute = resolve_compute(config.train)
    cost = measure_cost(build_model(config, 32), t, compute)
    position = 8  # bytes of the cache's token counter, one for the batch
    assert cost["state_bytes"] == t * 2 * d * 4 + position
    assert cost["state_bytes_per_token"] == 2 * d * 4
    assert cost["state_bytes_fixed"] == cost["state_bytes_shared"] == position
    assert cost["flops_per_token"] == pytest.approx(2 * 32 * d + 8 * d * d + 4 * d * (t + 1) / 2)

    window = mqar_config(model={"pattern": "softmax(window=5)", "short_conv": 0})
    cost = measure_cost(build_model(window, 32), t, compute)
    assert (cost["state_bytes_fixed"], cost["state_bytes_per_token"]) == (4 * 2 * d * 4 + position, 0)

    n, key_dim, chunk = 4, 8, 4
    for scope, shared in (("sequence", 0), ("shared", 4 * (2 * n * key_dim // 2 + n * n * d))):
        memory = mqar_config(model={"pattern": FW, "short_conv": 0}, state={"scope": scope})
        cost = measure_cost(build_model(memory, 32), t, compute)
        table = 4 * (2 * n * key_dim // 2 + n * n * d)
        queue = 4 * (chunk - 1) * (key_dim + d + 1)
        assert cost["state_bytes"] == cost["state_bytes_fixed"] == table + queue
        assert (cost["state_bytes_per_token"], cost["state_bytes_shared"]) == (0, shared)
    for name in ("prefill_tokens_per_s", "decode_ms_per_token"):
        assert cost[name] > 0


def test_a_missing_device_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"train\.device='cuda': this machine has no usable CUDA device"):
        resolve_compute(mqar_config(train={"device": "cuda"}).train)
