"""The benchmark of all mixers end to end: what it writes, what goes wrong in one case, and its wrappers' overhead."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import mixers.softmax
from experiments.bench import mixers as benchmark
from experiments.bench import raw
from experiments.bench.layers import Bench, Point, parse_layers
from experiments.bench.mixers import overhead
from experiments.bench.peak import peak_server
from experiments.bench_cli import bench
from experiments.device import Compute
from experiments.errors import UserError
from mixers import registry

CPU = Compute(torch.device("cpu"), None)
SIZES = {"d-model": 16, "train-tokens": 16, "kernel-tokens": 32, "repeats": 2, "case-s": 0.05, "threads": 1}
LENGTHS = (16, 32, 64)
TINY = [f"--{name}={value}" for name, value in SIZES.items()] + [f"--tokens={n}" for n in LENGTHS]
TINY += ["--no-memory", "--json"]
MEMORY = "fwpkm(chunk_size=8,n_subkeys=8)"
PLUGIN = """
import torch
from mixers.base import Mixer, MixerOutput, Traits
from mixers.registry import register


class Stateless(Mixer):
    traits = Traits(state_growth="none")
    family, source = "test", "this test"

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(config.d_model))

    def reset_parameters(self): ...
    def initial_state(self, batch_size, *, device, dtype): ...
    def flops_per_token(self, context): return None

    def forward(self, x, state=None, *, return_state=False, mask=None):
        if x.shape[1] >= self.longest:
            self.fail(x)
        return MixerOutput(x * self.scale, None, {})


@register("bench_needs_a_terabyte")
class NeedsATerabyte(Stateless):
    longest = 64
    def fail(self, x): torch.ones(2**38)


@register("bench_breaks")
class Breaks(Stateless):
    longest = 32
    def fail(self, x): raise IndexError("row 7 of 5")
"""


@pytest.fixture(autouse=True)
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("plugin") / "bench_plugin.py"
    path.write_text(PLUGIN)
    registry.load_plugin(path)
    yield path
    for name in ("bench_needs_a_terabyte", "bench_breaks"):
        registry._registered.pop(name)


def run(*arguments: str) -> dict:
    done = CliRunner(catch_exceptions=False).invoke(bench, [*arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_what_is_measured(plugin: Path) -> None:
    """Every scene at every length, its numbers, the exponents over them; and one that fails."""
    found = run("mixers", MEMORY, "softmax", "pkm", "bench_breaks", "--plugin", str(plugin), *TINY)
    assert (found["benchmark"], found["schema"], found["interrupted"]) == ("mixers", 1, False)
    assert [layer["label"] for layer in found["layers"]] == [MEMORY, "softmax", "pkm", "bench_breaks"]
    measured = {(row["label"], row["scene"], row["tokens"]) for row in found["rows"] if row["status"] == "measured"}
    for label in (MEMORY, "softmax", "pkm"):
        assert {(label, scene, n) for scene in ("prefill", "decode") for n in LENGTHS} <= measured
        assert (label, "train", 16) in measured
    check_broken({(row["label"], row["scene"], row["tokens"]): row for row in found["rows"]})
    for row in (row for row in found["rows"] if row["status"] == "measured"):
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["n_repeats"] >= 1
        assert (row["state_bytes"] is not None) == (row["scene"] == "decode")
    cache = 2 * 16 * 4
    softmax = next(layer for layer in found["layers"] if layer["label"] == "softmax")
    assert [row["bytes"] for row in softmax["state"]] == [n * cache + 8 for n in LENGTHS]
    growths = {(row["label"], row["cost"]): row for row in found["growth"]}
    assert growths["softmax", "state_bytes"]["exponent"] == pytest.approx(1, abs=0.01)
    assert growths[MEMORY, "state_bytes"]["exponent"] == 0
    assert ("pkm", "state_bytes") not in growths
    kernels = [row for row in found["kernels"] if row["status"] == "measured"]
    assert [(row["label"], row["backward"]) for row in kernels] == [("softmax", False), ("softmax", True)]
    assert all(row["kernel"] == "scaled_dot_product_attention" for row in kernels)


def test_without_a_command_it_is_mixers(monkeypatch: pytest.MonkeyPatch) -> None:
    """fwpkm is the command first, and a mixer behind ``mixers``; no name means all that run here."""
    asked = []
    monkeypatch.setattr(benchmark, "measure", lambda report, layers, *_: asked.append([x.label for x in layers]) or [])
    for arguments in (["softmax", "fwpkm"], ["mixers", "fwpkm"], [], ["-o", "impl=auto", "pkm"]):
        run(*arguments, "--json")
    assert asked[:2] == [["softmax", "fwpkm"], ["fwpkm"]]
    assert {"softmax", "gated_deltanet", "fwpkm", "pkm", "ttt"} <= set(asked[2])
    assert asked[3] == ["pkm"]
    shown = CliRunner().invoke(bench, ["--help"]).output
    assert "fwpkm" in shown
    assert "mixers" in shown


def test_a_case_that_fails_is_a_row(plugin: Path) -> None:
    """Too large for the machine in one, an error in another, and the third is measured."""
    names = ("bench_needs_a_terabyte", "bench_breaks", "softmax")
    with_memory = [word for word in TINY if word != "--no-memory"]
    found = run(*names, "--plugin", str(plugin), *with_memory)
    rows = {(row["label"], row["scene"], row["tokens"]): row for row in found["rows"]}
    assert rows["bench_needs_a_terabyte", "prefill", 64]["status"] == "out of memory"
    assert rows["bench_needs_a_terabyte", "prefill", 32]["status"] == "measured"
    check_broken(rows)
    assert rows["softmax", "prefill", 64]["status"] == "measured"
    assert all(row["peak_bytes"] > 0 for row in found["rows"] if row["label"] == "softmax" and row["scene"] != "decode")


def check_broken(rows: dict) -> None:
    broken = rows["bench_breaks", "prefill", 32]
    assert (broken["status"], broken["seconds"]) == ("failed", None)
    assert "IndexError: row 7 of 5" in broken["note"]
    assert ("bench_breaks", "decode", 32) not in rows
    assert rows["bench_breaks", "decode", 16]["status"] == "measured"


def test_peak_memory_is_that_of_the_scores() -> None:
    """Attention written out holds at least two matrices H T T at once; torch's fused kernel far less."""
    layers = parse_layers(("softmax(impl=reference)", "softmax"), 64, {"n_heads": 4}, "cpu")
    with peak_server(layers, (), 1, 0) as server:
        peaks = {
            (layer.label, n): server.bytes(Point(layer.label, "prefill", n)) for layer in layers for n in (512, 1024)
        }
    if None in peaks.values():
        pytest.skip("this system does not tell a process's memory")
    for n in (512, 1024):
        scores = 4 * n * n * 4
        assert 1.8 * scores < peaks["softmax(impl=reference)", n] < 5 * scores
    assert peaks["softmax", 1024] < 0.2 * peaks["softmax(impl=reference)", 1024]


def test_a_time_limit_leaves_rows_that_say_so() -> None:
    found = run("softmax", "--limit-s", "0", *TINY)
    assert found["rows"]
    assert {row["status"] for row in found["rows"]} == {"not started"}
    assert found["layers"][0]["params"] == 4 * 16 * 16


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = Bench.operation

    def until_32(self: Bench, point: Point):
        if point.tokens == 32:
            raise KeyboardInterrupt
        return operation(self, point)

    monkeypatch.setattr(Bench, "operation", until_32)
    file = tmp_path / "bench.json"
    with pytest.raises(click.Abort):
        bench.main(["softmax", *TINY, str(file)], standalone_mode=False)
    found = json.loads(file.read_text())
    assert found["interrupted"]
    assert {(row["scene"], row["tokens"]) for row in found["rows"]} == {("train", 16), ("prefill", 16), ("decode", 16)}
    assert len(found["kernels"]) == 2


@pytest.mark.parametrize("backward", [False, True])
def test_what_is_recorded_is_what_the_layer_does(backward: bool) -> None:
    """The kernel's arguments are those of the layer's own call: its output comes back, bit by bit."""
    (measured,) = parse_layers(("softmax(window=8)",), 32, {"n_heads": 2}, "cpu")
    bench_ = Bench(measured, CPU, 0)
    recorded = raw.record(bench_, 200, 1, backward, "cpu")
    assert [call.name for call in recorded.operations] == ["attend_sdpa"]
    found = [call.function(*call.args, **call.options) for call in recorded.kernels]
    assert [out.shape[0] for out in found] == [1, 2, 1]  # blocks of 64 queries, two of them in one call, and 8 more
    (whole,) = recorded.operations
    blocks = torch.cat([block for out in found for block in out.split(1)], dim=2)
    assert torch.equal(whole.function(*whole.args, **whole.options), blocks)
    y = bench_.layer.out(blocks.transpose(1, 2).flatten(2))
    assert torch.equal(y, bench_.layer(bench_.inputs(1, 200)).y)
    raw.replay(recorded.kernels, backward, bench_)()
    assert mixers.softmax.attend_sdpa.__module__ == "mixers.attention"  # nothing stays patched


def test_a_slow_wrapper_misses_the_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted delay of 5 ms in our function is found as overhead, and not in the kernel's time."""
    attend = mixers.softmax.attend_sdpa

    def slow(*arguments):
        time.sleep(0.005)
        return attend(*arguments)

    monkeypatch.setattr(mixers.softmax, "attend_sdpa", slow)
    rows = run(
        "softmax",
        "--tokens=16",
        "--kernel-tokens=32",
        "--train-tokens=4",
        *(word for word in TINY if "tokens" not in word),
    )["kernels"]
    for row in rows:
        assert row["met"] is False
        assert row["operation_seconds"] - row["kernel_seconds"] > 0.0045
        assert row["layer_seconds"] > row["operation_seconds"] - 0.001


def test_overhead_is_judged_by_its_interval() -> None:
    exact = overhead([1.02] * 9, [1.0] * 9)
    assert exact["overhead"] == pytest.approx(0.02)
    assert exact["met"] is True
    assert overhead([1.1] * 9, [1.0] * 9)["met"] is False
    assert overhead([1.0, 1.2, 0.9, 1.3, 1.0, 1.15, 0.95], [1.0, 0.9, 1.1, 1.2, 1.0, 0.95, 1.05])["met"] is None
    assert overhead(None, [1.0])["met"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sofmax"], "did you mean 'softmax'"),
        (["softmax", "--tokens", "1"], "--tokens must be at least 2, got 1"),
        (["softmax", "--train-batch", "0"], "--train-batch must be at least 1, got 0"),
        (["softmax", "--untuned"], "on CUDA only"),
        (["softmax", "-o", "windo=3"], "unknown key"),
        (["softmax", "--json", "/no/such/folder/file.json"], "there is no folder"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        bench.main(arguments, standalone_mode=False)
    assert "\n" not in str(raised.value)
