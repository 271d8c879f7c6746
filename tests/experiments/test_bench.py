"""The benchmark: its baseline is right, every scene runs, what goes wrong in a case is a row. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import os
import signal
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from experiments.bench import equality, fwpkm, model
from experiments.bench.case import Case
from experiments.bench.dense import write_densely
from experiments.bench.goals import goals, worst_auto
from experiments.bench.isolated import Arm, FirstCalls, alone
from experiments.bench_cli import bench
from experiments.errors import UserError
from mixers import table_rows
from mixers.fwpkm import fast_weight_pkm

TINY = [
    "--n",
    "9",
    "--tokens",
    "37",
    "--batch",
    "2",
    "--chunk",
    "8",
    "--width",
    "6",
    "--repeats",
    "2",
    "--threads",
    "1",
]


@pytest.fixture(autouse=True)
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments: str) -> dict:
    done = CliRunner(catch_exceptions=False).invoke(bench, ["fwpkm", *TINY, "--json", *arguments])
    assert done.exit_code == 0
    return json.loads(done.stdout)


@pytest.mark.parametrize("scope", ["shared", "sequence"])
@pytest.mark.parametrize(("n_tokens", "lookahead"), [(23, 1), (12, 2), (5, 0)])
def test_dense_baseline_equals_the_reference(scope: str, n_tokens: int, lookahead: int) -> None:
    torch.manual_seed(0)
    shapes = [(3, n_tokens, 2, 6), (3, n_tokens, 5), (3, n_tokens), (2, 2, 7, 3), (49, 5)]
    drawn = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    options = {"chunk_size": 6, "top_k": 3, "scope": scope, "lookahead": lookahead, "lr": 0.7, "address_weight": 0.4}
    results = []
    for impl in ("reference", "dense"):
        inputs = [part.clone().requires_grad_() for part in drawn]

        def outputs(parts: list, impl: str = impl) -> list:
            if impl == "dense":
                return list(write_densely(*parts, **options))
            out = fast_weight_pkm(*parts, **options, impl="reference")
            return [out.read, out.keys, out.values]

        found = outputs(inputs)
        loss = sum(part.flatten() @ torch.arange(1.0, 1 + part.numel(), dtype=part.dtype).sin() for part in found)
        gradients = torch.autograd.grad(loss, inputs)
        with torch.no_grad():
            results.append([*found, *gradients, outputs(drawn)[0]])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-10, atol=1e-12)


def test_every_scene_runs_end_to_end() -> None:
    scenes = ("prefill", "train", "scopes", "decode", "static")
    found = run(*(word for scene in scenes for word in ("--scene", scene)), "--no-memory")
    rows = found["rows"]
    measured = {(row["scene"], row["impl"]) for row in rows if row["status"] == "measured"}
    for scene in ("prefill", "train"):
        assert {(scene, impl) for impl in ("dense", "reference", "sparse", "floor")} <= measured
    assert {row["scope"] for row in rows if row["scene"] == "scopes" and row["impl"] == "sparse"} == {
        "shared",
        "sequence",
    }
    assert {("decode", "sparse"), ("decode_write", "sparse"), ("decode", "reference")} <= measured
    assert {("static", "sparse"), ("static", "reference")} <= measured
    for row in rows:
        if row["status"] == "measured":
            assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
            assert row["n_repeats"] == 2
    dense = next(row for row in rows if row["impl"] == "dense")
    assert dense["times_dense"] == 1
    assert not found["interrupted"]
    assert "a process for every row" in found["isolation"]
    assert found["machine"]["n_threads"] == 1
    assert found["machine"]["versions"]["torch"]
    # At other sizes than the goals' nothing is claimed.
    assert all(goal["met"] is None for goal in found["goals"])


def test_a_static_read_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert equality.why_static_wrong("sparse", "cpu", 0) is None
    right = table_rows.sum_rows

    def one_row_late(table: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, impl: str) -> torch.Tensor:
        return right(table.roll(int(impl == "sparse"), 0), slots, weights, impl)

    monkeypatch.setattr(table_rows, "sum_rows", one_row_late)
    assert "differs from the float64 reference" in equality.why_static_wrong("sparse", "cpu", 0)


def test_the_model_with_and_without_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.SIZES, "small", model.ModelSize(16, 16, 32, 1, 8, 6, 8, 2, 24))
    rows = run("--scene", "model")["rows"]
    assert {(row["impl"], row["scope"]) for row in rows if row["status"] == "measured"} == {
        ("without", "-"),
        ("sparse", "shared"),
        ("sparse", "sequence"),
    }
    assert all(row["times_without"] > 0 for row in rows)


def test_the_bound_is_that_of_the_paper_setting() -> None:
    """38 and 130 KiB per token at K = V = 512, k = 8."""
    case = Case("prefill", "sparse", "shared", 512, 1, 1, 512, 512, 512, 8, "cpu", 0)
    assert case.bound_bytes() == 38 * 1024
    assert Case(**(case.as_dict() | {"scene": "train", "backward": True})).bound_bytes() == 130 * 1024
    # A static read of few tokens: their rows each way, a dense gradient, the tokens' rows.
    static = Case("static", "sparse", "-", 512, 1, 3, 512, 512, 512, 32, "cpu", 0, True)
    assert static.bound_bytes() == 2048 * (2 * 96 + 512**2 + 2 * 3)


def test_memory_is_measured_in_a_fresh_process() -> None:
    """The dense prefill holds at least a gradient and a new table of 37 MB."""
    arm = Arm(Case("prefill", "dense", "shared", 96, 1, 64, 32, 64, 1024, 8, "cpu", 0), 1, True, model.SIZES["small"])
    peak = arm.start().peak_bytes
    arm.close()
    if peak is None:
        pytest.skip("this system does not tell a process's memory")
    table = 96**2 * 1024 * 4
    assert 2 * table * 0.8 < peak < 12 * table


def test_a_case_too_large_is_a_row() -> None:
    """A table of 240 GB, and beside it one that fits."""
    rows = run("--n", "100000", "--scene", "prefill", "--impl", "sparse", "--memory")["rows"]
    assert [(row["n"], row["status"], row["seconds"] is None) for row in rows] == [
        (9, "measured", False),
        (100_000, "out of memory", True),
    ]
    assert rows[0]["peak_bytes"] is not None


@pytest.mark.skipif(importlib.util.find_spec("fast_weight_product_key_memory") is not None, reason="installed here")
def test_a_missing_package_is_a_row_that_says_how_to_install_it() -> None:
    rows = run("--scene", "layer", "--impl", "package", "--no-memory")["rows"]
    assert {row["status"] for row in rows} == {"not installed"}
    assert all("pip install" in row["note"] for row in rows)


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a first call of training is waited for."""
    start = Arm.start

    def until_training(self: Arm) -> FirstCalls:
        if len(multiprocessing.active_children()) == 2 and file.exists():
            raise KeyboardInterrupt
        return start(self)

    monkeypatch.setattr(Arm, "start", until_training)
    file = tmp_path / "bench.json"
    arguments = ["fwpkm", *TINY, "--no-memory", "--scene", "prefill", "--scene", "train", "--json", str(file)]
    # What mixlab's main turns into exit code 130.
    with pytest.raises(click.Abort):
        bench.main(arguments, standalone_mode=False)
    found = json.loads(file.read_text())
    assert found["interrupted"]
    assert {row["scene"] for row in found["rows"]} == {"prefill"}
    assert {row["impl"] for row in found["rows"]} >= {"dense", "sparse", "floor"}
    assert multiprocessing.active_children() == []


def test_an_interrupt_of_a_terminal_is_left_to_the_command() -> None:
    arm = Arm(Case("prefill", "sparse", "shared", 9, 1, 24, 8, 6, 6, 4, "cpu", 0), 1, False, model.SIZES["small"])
    arm.start()
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGINT)
    assert arm.turn() > 0
    arm.close()


def test_a_wrong_implementation_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = equality.reads
    monkeypatch.setattr(
        equality, "reads", lambda case, inputs: reads(case, inputs) * (1.01 if case.impl == "sparse" else 1)
    )
    monkeypatch.setattr(fwpkm, "alone", lambda function, *arguments: function(*arguments))  # where the fault is planted
    arguments = ["fwpkm", *TINY, "--json", "--no-memory", "--scene", "prefill", "--impl", "sparse"]
    done = CliRunner().invoke(bench, arguments)
    assert done.exit_code == 1
    (row,) = json.loads(done.stdout)["rows"]
    assert row["status"] == "wrong"
    assert row["seconds"] is None
    assert "float64 reference" in row["note"]


def test_nan_is_within_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equality, "largest_error", lambda *_: float("nan"))
    assert equality.why_wrong("sparse", "cpu", 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--n", "4"], "--n must be at least the 8 slots"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--tokens", "-3"], "--tokens must be at least 1, got -3"),
        (["--width", "7"], "--width must be even"),
        (["--chunk", "1"], "--chunk must be at least 2"),
        (["--impl", "triton"], "--impl triton runs on CUDA only"),
        (["--json", "/no/such/folder/file.json"], "there is no folder"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        bench.main(["fwpkm", *arguments], standalone_mode=False)
    assert "\n" not in str(raised.value)


def test_goals_are_judged_at_their_sizes_only() -> None:
    def row(impl: str, seconds: float, tokens: int) -> dict:
        case = Case("prefill", impl, "shared", 512, 1, tokens, 512, 512, 512, 8, "cpu", 0)
        times = {"seconds": seconds, "seconds_min": seconds, "peak_bytes": 10}
        return case.as_dict() | times | {"status": "measured"}

    for tokens, met in ((4096, [True, False]), (512, [None, None])):
        found = goals([row("dense", 20.0, tokens), row("sparse", 0.1, tokens), row("floor", 0.02, tokens)], "cpu")
        assert [goal["measured"] for goal in found[:2]] == pytest.approx([200, 5])
        assert [goal["met"] for goal in found[:2]] == met
    assert goals([], "cpu")[0]["met"] is None


def test_auto_is_judged_against_the_other_implementation() -> None:
    def worst(auto: float, sparse: float, reference: float) -> float | None:
        sizes = {"n": 32, "value_dim": 64, "chunk": 16, "batch": 2, "scope": "shared", "backward": False}
        times = {"auto": auto, "sparse": sparse, "reference": reference}
        return worst_auto([{"scene": "small", "impl": impl, "seconds": times[impl]} | sizes for impl in times])

    # ``sparse`` is what it stands for: two rows of one code.
    assert worst(12.0, 8.0, 11.0) == 1.0
    assert worst(13.0, 11.0, 10.0) == pytest.approx(1.2)
    assert worst_auto([]) is None


def test_goals_of_cuda_without_rows() -> None:
    assert goals([], "cuda")[0]["met"] is None


@pytest.mark.parametrize(
    ("planted", "status", "why"),
    [(signal.SIGSEGV, "failed", "its process ended with -11"), (signal.SIGKILL, "out of memory", "was killed")],
)
def test_a_process_that_dies_is_a_row(monkeypatch: pytest.MonkeyPatch, planted: int, status: str, why: str) -> None:
    """In its second turn; the other row is finished."""
    turn, n_turns = Arm.turn, []

    def dying(self: Arm) -> float:
        n_turns.append(self)
        if n_turns.count(self) == 2 and self is n_turns[0]:
            os.kill(self._process.pid, planted)
        return turn(self)

    monkeypatch.setattr(Arm, "turn", dying)
    rows = run("--scene", "prefill", "--impl", "reference", "--impl", "floor", "--no-memory")["rows"]
    assert {row["impl"]: row["status"] for row in rows} == {"reference": status, "floor": "measured"}
    assert why in rows[0]["note"]
    assert multiprocessing.active_children() == []


def test_what_goes_wrong_in_a_process_of_its_own() -> None:
    assert alone(math.hypot, 3, 4) == 5
    with pytest.raises(UserError, match="no such thing"):
        alone(refuse, "no such thing")
    with pytest.raises(RuntimeError, match="ValueError: math domain error"):
        alone(math.sqrt, -1)
    with pytest.raises(RuntimeError, match="ended with 7"):
        alone(os._exit, 7)


def refuse(text: str) -> None:
    raise UserError(text)
