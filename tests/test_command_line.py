"""The command as a user runs it: exit codes, one line for a mistake, JSON for machines, nothing half-created."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import mixlab

ROOT = Path(__file__).parent.parent
RECIPE = """
[model]
pattern = "softmax"
d_model = 16
n_layers = 1
[task]
name = "mqar"
vocab_size = 32
seq_len = 16
n_pairs = 2
n_train = 64
n_select = 16
n_report = 16
[train]
batch_size = 8
max_steps = 3
"""
PLUGIN = '''
import torch
from mixers.base import Mixer, MixerOutput, Traits
from mixers.registry import register

@register("running_mean")
class RunningMean(Mixer):
    """y_t = mean of x_1..x_t."""

    traits = Traits(state_growth="constant")
    family, source = "pooling", "here"

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(config.d_model))

    def reset_parameters(self):
        torch.nn.init.ones_(self.scale)

    def initial_state(self, batch_size, *, device, dtype):
        zeros = torch.zeros(batch_size, 1, self.config.d_model, device=device, dtype=dtype)
        return zeros, torch.zeros((), device=device, dtype=dtype)

    def flops_per_token(self, context):
        return 0.0

    def forward(self, x, state=None, *, return_state=False, mask=None):
        total, n = state or self.initial_state(x.shape[0], device=x.device, dtype=x.dtype)
        sums = total + x.cumsum(1)
        counts = n + torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
        after = (sums[:, -1:] if x.shape[1] else total, n + x.shape[1])
        return MixerOutput(self.scale * sums / counts[:, None], after if return_state else None, {})
'''


def by_itself(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "mixlab.py"), *words], capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def test_help_lists_the_commands(tmp_path: Path) -> None:
    done = by_itself("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in ("mixers", "train", "evaluate", "sync", "sweep", "compare", "dashboard"):
        assert command in done.stdout


def test_folders_of_the_user_are_not_taken_for_ours(tmp_path: Path) -> None:
    for package in ("analysis", "experiments", "mixers", "sweeps"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('a folder of the user')\n")
    # its processes are forked from a server, which looks for modules by itself
    words = ("bench", "fwpkm", "--quick", "--scene", "decode", "--impl", "sparse", "--no-memory")
    done = by_itself(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a folder of the user" not in done.stderr


def test_train_twice_is_train_once(recipe: Path) -> None:
    first = by_itself("train", "tiny.toml", "train.lr=0.01", "--json", cwd=recipe.parent)
    assert first.returncode == 0, first.stderr
    outcome = json.loads(first.stdout)
    assert outcome["outcome"] == "finished"
    assert (recipe.parent / "runs" / "tiny" / outcome["key"] / "outcome.json").is_file()
    again = mixlab("train", "tiny.toml", "train.lr=0.01", "--json", cwd=recipe.parent)
    assert json.loads(again.stdout) == outcome
    synced = mixlab("sync", cwd=recipe.parent)
    assert synced.stdout.strip() == "tiny: 0 created, 0 updated, 1 already up to date"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "tiny.toml", "train.lrr=1"], "tiny.toml: train.lrr: unknown key; did you mean 'lr'?"),
        (["train", "tiny.toml", "model.pattern=sofmax"], "unknown mixer 'sofmax'; did you mean 'softmax'?"),
        (["train", "tiny.toml", "model.pattern=softmax | pkm@4"], "there is no layer 4"),
        (["train", "tiny.toml", "model.pattern=softmax(n_heads=3)"], "n_heads"),
        (["train", "tiny.toml", "task.name=text"], "task.vocab_size: unknown key"),
        (["train", "tiny.toml", "task.seq_len=15"], "tiny.toml: task: "),
        (["train", "tiny.toml", "train.lr"], "overrides are written key=value"),
        (["train", "absent.toml"], "absent.toml: no such file"),
        (["train", "quickstrat"], "neither a file nor a shipped recipe"),
        (["train", "tiny.toml", "--runs", "/proc/nowhere"], "/proc/nowhere"),
        (["train", "tiny.toml", "--plugin", "absent.py"], "absent.py: no such file"),
        (["sweep", "plan", "quickstrat"], "did you mean 'quickstart'"),
        (["compare", "nothing"], "no sweep 'nothing'"),
        (["evaluate", "nowhere"], "not the folder of a run"),
        (["dashboard", "--runs", "nowhere"], "nowhere"),
        (["trian"], "trian"),
    ],
)
def test_a_mistake_is_one_line_and_creates_nothing(recipe: Path, words: list[str], message: str) -> None:
    done = mixlab(*words, cwd=recipe.parent)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith(("Usage:", "Try "))]
    assert len(lines) == 1, done.stderr
    assert sorted(path.name for path in recipe.parent.iterdir()) == ["tiny.toml"]


def test_a_plugin_is_a_mixer_like_any_other(recipe: Path) -> None:
    (recipe.parent / "mine.py").write_text(PLUGIN)
    listed = mixlab("mixers", "--json", "--plugin", "mine.py", cwd=recipe.parent)
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert rows["running_mean"]["state_bytes"] == 4 * 64 + 4
    assert {"softmax", "linear_attention", "gated_deltanet", "pkm", "fwpkm"} < set(rows)
    trained = mixlab(
        "train", "tiny.toml", "model.pattern=running_mean", "--plugin", "mine.py", "--no-tracking", cwd=recipe.parent
    )
    assert trained.returncode == 0, trained.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\nraise OSError('no disk')\n", "broken.py: line 2: OSError: no disk"),
        ("def f(:\n", "broken.py: line 1: SyntaxError"),
        ("x = 1\n", "registers no mixer"),
        (
            PLUGIN.replace('"running_mean"', '"softmax"'),
            "the name 'softmax' is taken by mixers.softmax.SoftmaxAttention",
        ),
    ],
)
def test_a_broken_plugin_is_one_line(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "broken.py").write_text(source)
    done = mixlab("mixers", "--plugin", "broken.py", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
