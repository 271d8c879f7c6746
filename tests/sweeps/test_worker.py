"""The worker's pipe and its threads of output."""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys

import pytest
import torch

from experiments.progress import Progress
from sweeps.worker import MAX_EVENT_BYTES, EventPipe, output_to, release_gpu_memory
from tests.sweeps.helpers import TOP

LEAN = """
import sys
import torch
from torch.optim import AdamW, Optimizer
from sweeps.lean_torch import spare_compiler

NAMES = ("state_dict", "load_state_dict", "zero_grad", "add_param_group")
before = AdamW.step, {name: getattr(Optimizer, name) for name in NAMES}


def trained():
    torch.manual_seed(0)
    layer = torch.nn.Linear(7, 5)
    optimizer = AdamW([{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias]}], lr=0.01)
    for step in range(5):
        optimizer.zero_grad(set_to_none=True)
        layer(torch.randn(3, 7)).square().sum().backward()
        optimizer.step()
        if step == 2:
            saved = optimizer.state_dict()
            optimizer = AdamW([{"params": [layer.weight]}, {"params": [layer.bias]}], lr=1.0)
            optimizer.load_state_dict(saved)
    assert layer.weight.requires_grad and torch.is_grad_enabled()
    return [layer.weight, layer.bias, *(state["exp_avg_sq"] for state in optimizer.state.values())]


spare_compiler()
lean = trained()
assert "torch._dynamo" not in sys.modules, "the compiler was loaded"
AdamW.step = before[0]
for name, method in before[1].items():
    setattr(Optimizer, name, method)
assert all(torch.equal(a, b) for a, b in zip(lean, trained(), strict=True))
assert "torch._dynamo" in sys.modules, "without it torch loads the compiler: else it could go"
"""


def pipe() -> tuple[int, EventPipe]:
    reading, writing = os.pipe()
    return reading, EventPipe(writing)


def test_progress_is_cut_to_what_a_pipe_writes_in_one_piece():
    reading, events = pipe()
    metrics = {f"mixer/layer{i}/a_rather_long_name_of_a_metric": 1 / 3 for i in range(500)}
    events.progress(Progress(1, 1, metrics, note="x" * 5000))
    line = os.read(reading, 1 << 16)
    assert len(line) <= MAX_EVENT_BYTES
    assert line.endswith(b"\n")
    assert 20 < len(json.loads(line)["metrics"]) < 500


def test_progress_that_is_not_finite_is_null_and_text_is_left_out():
    reading, events = pipe()
    events.progress(Progress(1, 1, {"a": math.nan, "b": math.inf, "c": 2, "d": "text"}))
    assert json.loads(os.read(reading, 1 << 16))["metrics"] == {"a": None, "b": None, "c": 2}


def test_a_reader_that_sleeps_does_not_stop_a_training_but_gets_the_end():
    reading, events = pipe()
    for step in range(2000):
        events.progress(Progress(step, step, {"loss": 1.0}))  # the last step is always sent
    content = b""
    while select.select([reading], [], [], 0)[0]:
        content += os.read(reading, 1 << 16)
    lines = content.split(b"\n")
    assert lines.pop() == b""
    assert 100 < len(lines) < 2000
    assert all(json.loads(line)["event"] == "progress" for line in lines)
    events.send("ended", leaving=False)
    assert json.loads(os.read(reading, 1 << 16)) == {"event": "ended", "leaving": False}


def test_progress_is_sent_a_few_times_a_second_only():
    reading, events = pipe()
    for step in range(100):
        events.progress(Progress(step, 1000))
    assert os.read(reading, 1 << 16).count(b"\n") <= 2


def test_output_goes_to_the_log_and_then_back(tmp_path, capfd):
    path = tmp_path / "log.txt"
    for word in ("one", "two"):
        with output_to(path):
            os.write(1, f"{word}\n".encode())
            os.write(2, f"{word} error\n".encode())
    os.write(1, b"three\n")
    assert path.read_text() == "one\none error\ntwo\ntwo error\n"
    assert capfd.readouterr().out == "three\n"


@pytest.mark.cuda
def test_what_a_run_had_of_the_gpu_is_given_back():
    held = [torch.zeros(1 << 20, device="cuda")]
    held.append(held)
    before = torch.cuda.memory_reserved()
    del held
    release_gpu_memory()
    assert torch.cuda.memory_reserved() <= before - (4 << 20)


def test_without_the_compiler_an_optimiser_does_the_same_to_the_last_bit():
    done = subprocess.run([sys.executable, "-c", LEAN], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
