"""A plugin that can't be used is one line: file, line number, rule, way out; nothing of it stays registered."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from mixers import registry
from mixers.cli import mixers_command
from mixers.errors import UserError

# Line 6 holds the decorator.
GOOD = '''\
import torch
from mixers.base import Mixer, MixerConfig, MixerOutput, Traits
from mixers.registry import register


@register("scaled")
class Scaled(Mixer):
    """y_t = w * x_t."""

    Config = MixerConfig
    traits = Traits(state_growth="none")
    family, source = "pointwise", "here"

    def __init__(self, config):
        super().__init__(config)
        self.w = torch.nn.Parameter(torch.ones(config.d_model))

    def reset_parameters(self):
        torch.nn.init.ones_(self.w)

    def initial_state(self, batch_size, *, device, dtype):
        return None

    def flops_per_token(self, context):
        return 0.0

    def forward(self, x, state=None, *, return_state=False, mask=None):
        return MixerOutput(self.w * x, None, {})
'''
TWIN = GOOD + GOOD.replace("class Scaled", "class Twin")
SIGNATURE = "forward(self, x, state=None, *, return_state=False, mask=None)"


def without(method: str) -> str:
    return re.sub(rf"    def {method}\(.*?\n\n|    def {method}\(.*", "", GOOD, flags=re.DOTALL)


@pytest.fixture
def plugin(tmp_path: Path):
    """Write a file and load it; afterwards the registry is as it was."""
    before = dict(registry._registered) if registry.names() else {}

    def load(source: str) -> list[str]:
        path = tmp_path / "bad.py"
        path.write_text(source)
        return registry.load_plugin(path)

    yield load
    registry._restore(before)


def test_the_good_one_is_good(plugin) -> None:
    assert plugin(GOOD) == ["scaled"]
    assert registry.build("scaled", {"d_model": 4}).config.d_model == 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import torch\n\nraise OSError('no\\ndisk')\n", "line 3: OSError: no disk (for the traceback: python bad.py)"),
        ("import sys\nsys.exit(0)\n", "line 2: SystemExit: 0"),
        ("import absent_module_xyz\n", "line 1: ModuleNotFoundError: No module named 'absent_module_xyz'"),
        ("x = 1\ndef f(:\n", "line 2: SyntaxError: "),
        ("x = '\0'\n", "null bytes"),
        ("x = 1\n", "registers no mixer; decorate a Mixer subclass with @register('name')"),
        (
            GOOD.replace('"scaled"', '"softmax"'),
            "line 6: Scaled: the name 'softmax' is taken by mixers.softmax.Softmax",
        ),
        (TWIN, "line 34: Twin: the name 'scaled' is taken by Scaled in "),
        (
            GOOD.replace("@register", '@register("second")\n@register'),
            "line 6: Scaled is registered as 'scaled' already, and a class has one name",
        ),
        (
            GOOD.replace('register("scaled")', "register"),
            "line 6: @register takes the mixer's name: write @register('my",
        ),
        (GOOD.replace('"scaled"', '"two words"'), "line 6: a mixer's name is letters, digits and underscores"),
        (GOOD.replace('"scaled"', '"none"'), "line 6: the name 'none' means an empty slot"),
        (GOOD.replace("class Scaled(Mixer)", "class Scaled"), "line 6: @register('scaled') takes a subclass of"),
        *(
            (without(method), f"line 6: mixer 'scaled': Scaled lacks {method}(")
            for method in ("forward", "initial_state", "reset_parameters", "flops_per_token")
        ),
        (
            GOOD.replace('    traits = Traits(state_growth="none")\n', ""),
            "line 6: mixer 'scaled': Scaled declares no traits",
        ),
        (
            GOOD.replace('Traits(state_growth="none")', '{"causal": True}'),
            "Scaled.traits must be mixers.base.Traits(...), got a dict",
        ),
        (
            GOOD.replace('"none"', '"konstant"'),
            "state_growth='konstant' is none of its values; did you mean 'constant'?",
        ),
        (GOOD.replace('"none"', '"config"'), "state_growth='config' needs a property state_growth"),
        (
            GOOD.replace('"none"', '"none", devices="cpu"'),
            "devices must be a tuple of names such as ('cpu', 'cuda'), got 'cpu'",
        ),
        (GOOD.replace('"none"', '"none", causal="yes"'), "causal must be True or False"),
        (
            GOOD.replace("Config = MixerConfig", "Config = dict"),
            "Scaled.Config must be a subclass of mixers.base.MixerConfig, got the class dict",
        ),
        (GOOD.replace("Config = MixerConfig", "Config = None"), "Scaled.Config must be a subclass"),
        (
            GOOD.replace("Config = MixerConfig", 'default_slot = "tokens"'),
            "default_slot='tokens' is no slot; did you mean 'token'?",
        ),
        (GOOD.replace('"pointwise"', "3"), "Scaled.family must be a str, got a int"),
        (
            GOOD.replace(SIGNATURE, "forward(self, x)"),
            "Scaled.forward must be callable as forward(x, state, return_state=..., mask=...): too many",
        ),
        (
            GOOD.replace("batch_size, *, device", "batch_size, *, where"),
            "Scaled.initial_state must be callable as initial_state(batch_size, device=..., dtype=...)",
        ),
        (GOOD.replace("def flops_per_token(self, context):\n        return 0.0", "flops_per_token = 3"), "it is a int"),
    ],
)
def test_a_bad_plugin_is_one_line(plugin, tmp_path: Path, source: str, message: str) -> None:
    assert source != GOOD
    before = registry.names()
    with pytest.raises(UserError) as raised:
        plugin(source)
    text = str(raised.value)
    assert text.startswith(f"--plugin {tmp_path / 'bad.py'}: ")
    assert message in text
    assert "\n" not in text
    assert registry.names() == before


def test_a_mended_plugin_loads_in_the_same_process(plugin) -> None:
    for broken in ("x = 1\n", without("forward")):
        with pytest.raises(UserError):
            plugin(broken)
    assert plugin(GOOD) == ["scaled"]


def test_an_error_in_an_imported_file_points_at_the_import(plugin, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "helper_of_bad.py").write_text("\n\ndef f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"bad\.py: line 2: SyntaxError"):
        plugin("x = 1\nimport helper_of_bad\n")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--plugin \S+: is a folder; name the Python file"):
        registry.load_plugin(tmp_path)
    with pytest.raises(UserError, match=r"--plugin \S+absent\.py: no such file"):
        registry.load_plugin(tmp_path / "absent.py")
    (tmp_path / "layer.txt").write_text(GOOD)
    with pytest.raises(UserError, match=r"layer\.txt: not a Python file \(its name must end in \.py\)"):
        registry.load_plugin(tmp_path / "layer.txt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("self.w = ", "raise KeyError('w')\n        self.w = "), r"raised KeyError: 'w' (PATH:16)"),
        (("Config = MixerConfig", "class Config(MixerConfig):\n        width: int"), "width: required, but not given"),
        (("self.w * x, None", "self.w[:3] * x, None"), "raised RuntimeError: The size of tensor"),
    ],
)
def test_a_plugin_that_cannot_run_is_named_when_listed(plugin, tmp_path: Path, change, message: str) -> None:
    plugin(GOOD.replace(*change))
    path = tmp_path / "bad.py"
    done = CliRunner().invoke(mixers_command, ["--plugin", str(path)])
    assert isinstance(done.exception, UserError)
    text = str(done.exception)
    assert text.startswith(f"--plugin {path}: mixer 'scaled' can't be built and run with its default options: ")
    assert message.replace("PATH", str(path)) in text
    assert "\n" not in text


def test_an_installed_mixer_that_cannot_run_is_listed_as_broken(plugin) -> None:
    plugin(GOOD.replace("self.w = ", "raise KeyError('w')\n        self.w = "))
    done = CliRunner().invoke(mixers_command, [])
    assert done.exit_code == 0, done.exception
    rows = {words[0]: words[1] for line in done.output.splitlines() if len(words := line.split()) > 1}
    assert rows["scaled"] == "broken"
    assert rows["softmax"] == "attention"
    assert "mixlab: mixer 'scaled' can't be built and run with its default options: raised KeyError" in done.output


def test_the_table_fits_100_columns(plugin) -> None:
    done = CliRunner().invoke(mixers_command, [], env={"COLUMNS": "100"})
    lines = done.output.splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in done.output
    assert "devices" in lines[2]
    assert len(lines) == 4 + len(registry.names())
    assert next(line for line in lines if line.startswith("softmax")).split()[4:6] == ["cpu", "cuda"]
