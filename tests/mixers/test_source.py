"""The code of mixers from elsewhere as part of a run's key."""

import subprocess
import sys
from pathlib import Path

import pytest

from mixers import registry
from mixers.source import foreign_code

TOP = Path(__file__).parents[2]
PLUGIN = '''
"""A layer."""
from mixers.{base} import {cls}
from mixers.registry import register


@register("edited")
class Edited({cls}):
    """Says {word}."""

    factor = {factor}  # {word}
'''
KEY = """
import sys
from experiments.config import ExperimentConfig
from mixers.registry import load_plugin
load_plugin(sys.argv[1])
model = {"pattern": sys.argv[2], "d_model": 8, "n_layers": 1}
print(ExperimentConfig.parse({"model": model, "task": {"name": "mqar"}, "train": {"max_steps": 1}}, "test").key())
"""


def key(path, text, pattern="edited"):
    path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", KEY, str(path), pattern], cwd=TOP, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_an_edited_plugin_gives_new_keys_and_only_to_its_own_runs(tmp_path):
    def text(factor, word):
        return PLUGIN.format(base="linear_attention", cls="LinearAttention", factor=factor, word=word)

    path = tmp_path / "plugin.py"
    first = key(path, text(1, "hello"))
    assert key(path, text(1, "goodbye")) == first  # comments and docstrings aside
    assert key(path, text(2, "hello")) != first
    elsewhere = tmp_path / "other" / "plugin.py"
    elsewhere.parent.mkdir()
    assert key(elsewhere, text(1, "hello")) == first  # wherever the file lies
    of_softmax = [key(path, text(factor, "hello"), "softmax") for factor in (1, 2)]
    assert of_softmax[0] == of_softmax[1]


@pytest.mark.parametrize("name", ["softmax", "fwpkm", "peer"])
def test_layers_of_this_project_are_told_by_its_version(name):
    assert foreign_code(registry.get(name)) == ""
