"""A scaffolded mixer works at once, as a user would try it; what can't be written leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixers import registry
from mixers.errors import UserError
from mixers.scaffold import PACKAGE, scaffold
from tests.command import ROOT, mixlab

SMALL = ["task.n_train=64", "task.n_select=8", "task.n_report=8", "train.batch_size=8", "train.max_steps=3"]


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=environment)


def test_a_new_mixer_passes_its_test_is_listed_and_trains(tmp_path: Path) -> None:
    written = mixlab("new", "leaky_sum", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["leaky_sum.py", "test_leaky_sum.py"]
    tested = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "test_leaky_sum.py", cwd=tmp_path)
    assert tested.returncode == 0, tested.stdout
    assert "12 passed" in tested.stdout

    listed = mixlab("mixers", "--json", "--plugin", "leaky_sum.py", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert rows["leaky_sum"]["state_bytes"] == 64 * 4
    assert rows["leaky_sum"]["params"] == 3 * 64 * 64

    train_line = next(line for line in written.stdout.splitlines() if "mixlab train" in line)
    words = train_line.split()[1:]
    trained = mixlab(*words, *SMALL, "--no-tracking", "--json", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    outcome = json.loads(trained.stdout)
    assert outcome["outcome"] == "finished"
    assert outcome["step"] == 3


def test_a_broken_mixer_fails_its_scaffolded_test(tmp_path: Path) -> None:
    mixer, test = scaffold("leaky_sum", tmp_path)
    source = mixer.read_text()
    assert "state = decay[:, t] * state + value[:, t]" in source
    mixer.write_text(source.replace("decay[:, t] * state", "state"))
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "computes_its_equation or earlier_tokens")
    tested = run(*words, test.name, cwd=tmp_path)
    assert tested.returncode == 1, tested.stdout
    assert "test_it_computes_its_equation" in tested.stdout
    assert "1 failed, 1 passed" in tested.stdout


def test_the_printed_commands_name_the_files_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "my mixers").mkdir()
    written = mixlab("new", "leaky_sum", "--dir", "my mixers", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert "  mixlab check leaky_sum --plugin 'my mixers/leaky_sum.py'" in written.stdout.splitlines()
    assert sorted(path.name for path in (tmp_path / "my mixers").iterdir()) == ["leaky_sum.py", "test_leaky_sum.py"]


@pytest.mark.parametrize("name", ["mixer", "mixer_", "traits", "tensor"])
def test_names_that_resemble_imports_work(tmp_path: Path, name: str) -> None:
    mixer, _ = scaffold(name, tmp_path)
    try:
        assert registry.load_plugin(mixer) == [name]
        assert registry.build(name, {"d_model": 4})(torch.ones(1, 3, 4)).y.shape == (1, 3, 4)
    finally:
        registry._registered.pop(name, None)


@pytest.mark.parametrize("name", ["", "Leaky", "leaky-sum", "2leaky", "_leaky", "lambda", "a b", "../x", "größe"])
def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="a mixer's name is"):
        scaffold(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_word_for_an_empty_slot_is_no_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the name 'none' means an empty slot"):
        scaffold("none", tmp_path)
    assert not list(tmp_path.iterdir())


def test_taken_names_are_refused_even_with_force(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="new softmax: the name is taken"):
        scaffold("softmax", tmp_path, force=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("existing", ["leaky_sum.py", "test_leaky_sum.py"])
def test_existing_files_stay_unless_forced(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("mine")
    with pytest.raises(UserError, match=f"{existing} exist already"):
        scaffold("leaky_sum", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_text() == "mine"
    for path in scaffold("leaky_sum", tmp_path, force=True):
        assert "leaky_sum" in path.read_text()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_in_the_way_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "test_leaky_sum.py").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        scaffold("leaky_sum", tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["test_leaky_sum.py"]


def test_folders_that_cannot_take_it_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        scaffold("leaky_sum", tmp_path / "absent")
    with pytest.raises(UserError, match="register themselves"):
        scaffold("leaky_sum", PACKAGE)
    with pytest.raises(UserError, match="can't be written"):
        scaffold("leaky_sum", Path("/proc"))
    refused = mixlab("new", "softmax", cwd=tmp_path)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
