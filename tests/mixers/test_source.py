"""The code of mixers from elsewhere as part of a run's key."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.config import RESULTS_VERSION, ExperimentConfig
from mixers import registry
from mixers.source import code_of, foreign_code

TOP = Path(__file__).parents[2]
SOFTMAX = {"model": {"pattern": "softmax"}, "task": {"name": "mqar"}, "train": {"max_steps": 1}}
PLUGIN = '''
"""A layer."""
from mixers.{base} import {cls}
from mixers.registry import register


@register("edited")
class Edited({cls}):
    """Says {word}."""

    factor = {factor}  # {word}
'''
KEYS_OF_PLUGINS = """
import json, os, sys
from pathlib import Path
from experiments.config import ExperimentConfig
from mixers.registry import load_all, load_plugin

load_all()
for path, text in json.loads(sys.argv[1]):
    child = os.fork()  # a process for each, which has loaded no other plugin
    if child == 0:
        Path(path).write_text(text)
        load_plugin(path)
        for pattern in ("edited", "softmax"):
            model = {"pattern": pattern, "d_model": 8, "n_layers": 1}
            values = {"model": model, "task": {"name": "mqar"}, "train": {"max_steps": 1}}
            print(ExperimentConfig.parse(values, "test").key(), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def keys_of_plugins(*plugins):
    """For each plugin, (path, text): the keys of runs of its layer, and of another layer."""
    words = [sys.executable, "-c", KEYS_OF_PLUGINS, json.dumps([(str(path), text) for path, text in plugins])]
    keys = subprocess.run(words, cwd=TOP, capture_output=True, text=True, check=True).stdout.split()
    return list(zip(keys[::2], keys[1::2], strict=True))


def test_an_edited_plugin_gives_new_keys_and_only_to_its_own_runs(tmp_path):
    def text(factor, word):
        return PLUGIN.format(base="linear_attention", cls="LinearAttention", factor=factor, word=word)

    path, elsewhere = tmp_path / "plugin.py", tmp_path / "other" / "plugin.py"
    elsewhere.parent.mkdir()
    first, other_words, edited, moved = keys_of_plugins(
        (path, text(1, "hello")), (path, text(1, "goodbye")), (path, text(2, "hello")), (elsewhere, text(1, "hello"))
    )
    assert other_words == first  # comments and docstrings aside
    assert edited[0] != first[0]
    assert edited[1] == first[1]
    assert moved == first  # wherever the file lies


@pytest.mark.parametrize("name", ["softmax", "fwpkm", "peer"])
def test_layers_of_this_project_have_no_code_from_elsewhere(name):
    assert foreign_code(registry.get(name)) == ""


def test_what_says_nothing_is_left_out_and_nothing_else():
    text = '''
"""Module."""
# comment
X = "# kept"  # gone


class A:
    """Docstring
    of two lines."""

    y = f"""{X} # kept

    kept  """

    def f(self):
        "gone"
        return b"#" + g()  # gone
'''
    expected = [
        'X = "# kept"', "class A:", '    y = f"""{X} # kept', "", '    kept  """', "    def f(self):",
        '        return b"#" + g()',
    ]  # fmt: skip
    assert code_of(text).split("\n") == expected


@pytest.fixture
def copy(tmp_path):
    for package in ("mixers", "experiments"):
        shutil.copytree(TOP / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


KEYS = """
import sys
from pathlib import Path
from experiments import source as of_runs
from experiments.config import ExperimentConfig
from mixers import source

for line in sys.stdin:
    pattern, *edited = line.split(";")
    for edit in edited:
        name, text = edit.split(":")
        with open(name, "a") as file:
            file.write(text.strip() + "\\n")
    for cached in (source._read, source._edited_files, source.own_code, of_runs.run_code):
        cached.cache_clear()
    values = {"model": {"pattern": pattern.strip()}, "task": {"name": "mqar"}, "train": {"max_steps": 1}}
    print(ExperimentConfig.parse(values, "test").key())
"""


def keys_of(copy, *lines):
    """The keys that a copy of this project gives to patterns, each after edits: what is appended to which file."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "-c", KEYS]
    done = subprocess.run(
        words, cwd=copy, env=environment, input="\n".join(lines), capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_an_edited_file_of_this_project_gives_new_keys_to_the_runs_it_decides(copy):
    nothing = "mixers/softmax.py:# a comment;mixers/ttt.py:X = 1;experiments/records.py:X = 1"
    nothing += ";experiments/tasks/text.py:X = 1;mixers/product_keys.py:X = 1"
    softmax, peer, same, of_keys, of_rope, trained = keys_of(
        copy,
        "softmax",
        "softmax | peer@0",
        f"softmax;{nothing}",
        "softmax | peer@0",
        "softmax;mixers/rope.py:X = 1",  # which the layer imports
        "softmax;experiments/train.py:X = 1",
    )
    assert same == softmax
    assert of_keys != peer
    assert len({softmax, of_rope, trained}) == 3


def test_of_an_installed_release_only_edited_files_count(copy):
    info = copy / "mixlab-0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mixlab\nVersion: 0.0\n")
    rows = []
    for path in sorted(copy.rglob("*.py")):
        digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
        rows.append(f"{path.relative_to(copy)},sha256={digest},{path.stat().st_size}\n")
    (info / "RECORD").write_text("".join(rows))
    released, of_ttt, same, edited = keys_of(copy, "softmax", "ttt", "softmax;mixers/ttt.py:X = 1", "ttt")
    assert same == released
    assert edited != of_ttt
    config = {"results_version": RESULTS_VERSION, "config": ExperimentConfig.parse(SOFTMAX, "test").resolved()}
    assert released == hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
