"""``mixlab check`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.command import ROOT, mixlab

PLUGIN = """
from mixers.base import Traits
from mixers.pkm import ProductKeyMemory
from mixers.registry import register

@register("half_right")
class HalfRight(ProductKeyMemory):
    def flops_per_token(self, context):
        return 1.0

@register("gpu_only")
class GpuOnly(ProductKeyMemory):
    traits = Traits(state_growth="none", devices=("cuda",))

@register("crashes")
class Crashes(ProductKeyMemory):
    def __init__(self, config):
        raise OSError("no disk [left]")
"""


def check(*args: str) -> subprocess.CompletedProcess[str]:
    return mixlab("check", *args, cwd=ROOT, COLUMNS="200")


def test_a_mixer_that_passes() -> None:
    done = check("softmax", "--seed", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "softmax keeps the contract: 23 of 24 checks passed" in done.stdout
    assert "nan_in_future" in done.stdout
    assert "excused" in done.stdout


def test_options_reach_the_mixer(tmp_path: Path) -> None:
    done = check("softmax", "-o", "window=4", "-o", "impl=reference", "--dtype", "float32", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(done.stdout)
    assert row["options"] == {"d_model": 16, "window": 4, "impl": "reference"}
    assert (row["impl"], row["dtype"], row["device"]) == ("reference", "float32", "cpu")
    statuses = {c["name"]: c["status"] for c in row["checks"]}
    assert statuses["finite_differences"] == statuses["twin"] == "not_applicable"


def test_failures_exit_with_one_and_never_show_a_traceback(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN)
    done = check("half_right", "crashes", "--plugin", str(plugin), "--json")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    half_right, crashes = json.loads(done.stdout)
    assert [c["name"] for c in half_right["checks"] if c["status"] == "failed"] == ["flops"]
    assert not half_right["ok"]
    statuses = {c["status"] for c in crashes["checks"]}
    assert statuses == {"failed"}
    assert f"raised OSError: no disk [left] ({plugin}:18)" in crashes["checks"][0]["message"]

    table = check("crashes", "--plugin", str(plugin))
    assert table.returncode == 1
    assert "crashes breaks the contract: 0 of 24 checks passed" in table.stdout
    assert "no disk [left]" in table.stdout


def test_mistakes_exit_with_two_and_one_line(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN)
    for args, message in (
        ((), "check: name one or more mixers, or give --all"),
        (("softmax", "--all"), "check: name one or more mixers, or give --all"),
        (
            ("gpu_only", "--plugin", str(plugin)),
            "check: mixer 'gpu_only' runs on cuda only, and the suite on cpu; leave it out, or give --device",
        ),
        (("softmax", "-o", "window"), "'window': overrides are written key=value, for example train.lr=3e-4"),
        (
            ("softmax", "-o", "windo=4"),
            "mixer 'softmax': windo: unknown key; did you mean 'window'?",
        ),
        (("softmax", "--device", "tpu"), "check: device 'tpu' is neither cpu nor cuda"),
        (("softmaxx",), "unknown mixer 'softmaxx'; did you mean 'softmax'?"),
        (("softmax", "--plugin", str(tmp_path / "no.py")), f"--plugin {tmp_path / 'no.py'}: no such file"),
    ):
        done = check(*args)
        assert done.returncode == 2
        assert done.stderr == f"mixlab: {message}\n"
        assert done.stdout == ""
