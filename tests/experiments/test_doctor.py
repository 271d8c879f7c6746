"""``mixlab doctor`` reports what is there, says what is broken, and leaves nothing behind."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import doctor
from mixers import implementations, registry

ROOT = Path(__file__).parent.parent.parent
BROKEN_MIXER = """
from mixers.base import Mixer
from mixers.base import Traits
from mixers.registry import register

@register("needs_more")
class NeedsMore(Mixer):
    traits = Traits()
    def __init__(self, config):
        raise OSError("no licence")
    def reset_parameters(self): ...
    def initial_state(self, batch_size, *, device, dtype): ...
    def flops_per_token(self, context): ...
    def forward(self, x, state=None, *, return_state=False, mask=None): ...
"""


def run(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    values = {name: value for name, value in os.environ.items() if name not in ("MLFLOW_TRACKING_URI", "MIXLAB_RUNS")}
    values |= {"OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(ROOT / "mixlab.py"), "doctor", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=values)


def test_a_sound_machine_exits_with_0_and_nothing_is_created(tmp_path: Path) -> None:
    done = run("--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    findings = json.loads(done.stdout)
    assert findings["broken"] == []
    assert findings["versions"]["torch"] == torch.__version__
    assert findings["versions"]["optuna"] == importlib.metadata.version("optuna")
    assert findings["machine"]["n_cores"] >= 1
    assert findings["machine"]["free_disk_bytes"] > 0
    assert findings["devices"][0] == {"name": "cpu", "error": None}
    assert findings["store"]["uri"].endswith("/runs/mlflow.db")
    assert findings["store"]["status"] == "will be created by the first run"
    rows = {row["name"]: row["impl"]["cpu"] for row in findings["mixers"]}
    assert rows["softmax"] == "sdpa"
    assert rows["gated_deltanet"] == "reference"
    assert not list(tmp_path.iterdir())


def test_a_store_that_cannot_be_used_exits_with_1(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("not a database, " * 100)
    done = run(cwd=tmp_path, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/notes.db")
    assert done.returncode == 1, done.stdout
    assert "BROKEN tracking store" in done.stdout
    assert "Traceback" not in done.stderr
    assert (tmp_path / "notes.db").read_text() == "not a database, " * 100


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://127.0.0.1:9", "server can't be reached"),
        ("sqlite:///{folder}", "is a folder"),
        ("sqlite:///{folder}/file/mlflow.db", "can't be created"),
        ("sqlyte:///x.db", "did you mean 'sqlite'"),
        ("postgresql://me:secret@127.0.0.1:9/db", "tracking store postgresql://me:***@"),
    ],
)
def test_stores_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, message: str) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(folder=tmp_path))
    store = doctor.tracking_store(tmp_path)
    assert store["status"] is None
    assert message in store["error"]
    assert "secret" not in json.dumps(store)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_existing_store_is_asked_and_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE kept (x)")
    connection.close()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    before = path.read_bytes()
    assert doctor.tracking_store(tmp_path)["status"] == "exists and takes writing"
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_mixer_that_cannot_be_built_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BROKEN_MIXER)
    try:
        registry.load_plugin(tmp_path / "mine.py")
        rows = {row["name"]: row for row in doctor.implementations(["cpu"])}
    finally:
        registry._registered.pop("needs_more", None)
    assert rows["needs_more"]["error"] == "OSError: no licence"
    assert rows["softmax"]["error"] is None


def test_packages_that_do_not_fit_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["click>=8.1", "torch>=99", "no-such-package<2", 'flash-attn>=2; extra == "gpu"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: declared)
    found, broken = doctor.required_packages()
    assert found["no-such-package"] is None
    assert set(found) == {"click", "torch", "no-such-package"}
    assert len(broken) == 2
    assert f"package torch: {torch.__version__} is installed, needed is >=99; pip install 'torch>=99'" in broken
    assert "package no-such-package: not installed; pip install 'no-such-package<2'" in broken


def test_without_torch_the_rest_is_still_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "required_packages", lambda: ({"torch": None}, ["package torch: not installed"]))
    findings = doctor.diagnose(tmp_path / "runs")
    assert findings["broken"] == ["package torch: not installed"]
    assert findings["devices"] == findings["mixers"] == []
    assert findings["machine"]["runs"] == str(tmp_path / "runs")


def test_missing_kernels_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementations, "FLA_MISSING", ("triton",))
    monkeypatch.setattr(implementations, "FLASH_ATTN_MISSING", ())
    (item,) = doctor.missing_kernels(has_gpu=True)
    assert item["packages"] == ["triton"]
    assert item["command"] == implementations.FLA_INSTALL
    assert item["useful_here"]
    monkeypatch.setattr(implementations, "FLA_MISSING", ())
    assert doctor.missing_kernels(has_gpu=True) == []


@pytest.mark.parametrize(
    ("built_for", "driver", "n_entries"),
    [(None, "/usr/bin/nvidia-smi", 1), ("12.8", "/usr/bin/nvidia-smi", 0), (None, None, 0)],
)
def test_a_gpu_that_torch_cannot_use_is_told(
    monkeypatch: pytest.MonkeyPatch, built_for: str | None, driver: str | None, n_entries: int
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: driver)
    entries = doctor.missing_cuda()
    assert len(entries) == n_entries
    version = torch.__version__.partition("+")[0]
    assert all(entry["command"].endswith(f" torch=={version}") for entry in entries)


def test_a_device_that_does_not_compute_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.device_error("cpu") is None
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.full(size, 2.0, device=device))
    assert doctor.device_error("cpu") == "a product of matrices sums to 2048.0 instead of 512"
    assert any(line.startswith("device cpu: ") for line in doctor.diagnose(tmp_path)["broken"])


def test_free_memory_is_what_linux_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    assert doctor.free_memory_bytes(meminfo) is None
    meminfo.write_text("MemTotal:  900 kB\nMemFree:  10 kB\nMemAvailable:  300 kB\n")
    assert doctor.free_memory_bytes(meminfo) == 300 * 1024
