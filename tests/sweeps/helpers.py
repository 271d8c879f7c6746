"""A small sweep file, and drivers in this process or in one of their own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.config import merged
from sweeps.definition import SweepConfig, load_sweep
from sweeps.driver import SweepResult, run_sweep
from sweeps.live import JsonView
from tests.sweeps.fake_target import TARGET
from tests.sweeps.forked_worker import forked_workers

TOP = Path(__file__).parent.parent.parent
BASE = """
name = "tiny"
question = "Is a wider model better?"
seeds = [0, 1]

[base.model]
d_model = 16
n_layers = 1
[base.task]
name = "mqar"
vocab_size = 64
seq_len = 32
n_pairs = 4
n_train = 64
n_select = 16
n_report = 16
[base.train]
batch_size = 8

[metric]
select = "select/accuracy"
report = "report/accuracy"
direction = "maximize"
[budget]
max_steps = 2

[arms.narrow]
mixer = "softmax"
[arms.wide]
mixer = "softmax"
model.d_model = 32
"""
TUNED = """
[tune]
"train.lr" = { log_uniform = [1e-4, 1e-1] }
"""


def write_sweep(folder: Path, text: str = "", **replaced: str) -> Path:
    """The small sweep with more text at its end, and some of its lines replaced."""
    content = BASE + text
    for old, new in replaced.items():
        content = content.replace(old, new)
    path = folder / "tiny.toml"
    path.write_text(content, encoding="utf-8")
    return path


def tiny(folder: Path, text: str = "", **overrides: Any) -> SweepConfig:
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_sweep(write_sweep(folder, text), merged({}, dotted))


def tuned(folder: Path, n_trials: int = 4, text: str = "", **overrides: Any) -> SweepConfig:
    return tiny(folder, TUNED + text, budget__tune_trials=n_trials, **overrides)


def one_arm(folder: Path, **overrides: Any) -> SweepConfig:
    """The small sweep with its first arm only: where workers end, each one more costs seconds."""
    path = write_sweep(folder, **{'[arms.wide]\nmixer = "softmax"\nmodel.d_model = 32\n': ""})
    return load_sweep(path, {key.replace("__", "."): value for key, value in overrides.items()})


def drive(sweep: SweepConfig, runs: Path, **options: Any) -> tuple[SweepResult, list[dict[str, Any]]]:
    """Run a sweep in this process with a worker of its own and the fake target; the result and all events.

    There are two workers where a test is about what happens side by side. One with plugins, which are loaded here, too,
    or with another target starts from nothing.
    """
    lines: list[str] = []
    options = {"n_workers": 1, "tracked": False, "target": TARGET, **options}
    forked = options["target"] == TARGET and "plugins" not in options and sys.platform == "linux"
    with forked_workers() if forked else contextlib.nullcontext():
        result = run_sweep(sweep, runs, JsonView(lines.append), **options)
    return result, [json.loads(line) for line in lines]


def start_driver(sweep_file: Path, runs: Path, *overrides: str, behaviour: dict[str, Any]) -> subprocess.Popen[str]:
    """A driver in a process of its own, printing events."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.sweeps.drive", str(sweep_file), str(runs), *overrides],
        env={**os.environ, "MIXLAB_FAKE_TARGET": json.dumps(behaviour)},
        cwd=TOP,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(condition: Callable[[], bool], patience_s: float = 120.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps(runs: Path) -> int:
    """How far the only run at work has come."""
    return max((int(path.read_text() or 0) for path in runs.glob("tiny/*/step.txt")), default=0)


def completions(runs: Path) -> Counter[str]:
    """How often each run was completed, by key."""
    path = runs / "tiny" / "completions.log"
    return Counter(path.read_text(encoding="utf-8").split()) if path.exists() else Counter()
