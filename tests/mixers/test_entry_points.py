"""A package that pip really installs: its mixer is listed and checked, and a broken one is listed as broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PYPROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "throw-away-mixers"
version = "1.2"
[project.entry-points."mixlab.mixers"]
throw_away = "throw_away_mixers.layers:ThrowAway"
throw_away_broken = "throw_away_mixers.broken"
throw_away_empty = "throw_away_empty"
throw_away_gone = "throw_away_mixers.layers:Gone"
[tool.setuptools]
packages = ["throw_away_mixers"]
py-modules = ["throw_away_empty"]
"""
LAYER = '''
from mixers.gated_conv import GatedConv
from mixers.registry import register

@register("throw_away")
class ThrowAway(GatedConv):
    """A mixer that comes with another package."""
'''
# Half of it works: what a file registered before it failed is undone.
BROKEN = LAYER.replace("throw_away", "half_there") + "\nraise RuntimeError('needs a\\nlicence')\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the package; no network, nothing of this environment changed."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    package = source / "throw_away_mixers"
    package.mkdir()
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "throw_away_empty.py").write_text("x = 1\n")
    (package / "__init__.py").write_text("")
    (package / "layers.py").write_text(LAYER)
    (package / "broken.py").write_text(BROKEN)
    options = "--quiet --no-build-isolation --no-deps --no-index --no-compile --disable-pip-version-check"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options.split(), "--target", str(site), str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"pip needs setuptools here (the extra `test` has it): {done.stderr}"
    return site


def mixlab(*words: str, site: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    words = (sys.executable, "-m", "mixlab", *words)
    return subprocess.run(words, capture_output=True, text=True, cwd=site, env=environment)


def test_it_is_listed_beside_ours_and_what_is_broken_with_its_reason(site: Path) -> None:
    done = mixlab("mixers", "--json", site=site)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["throw_away"]["module"] == "throw_away_mixers.layers"
    assert rows["throw_away"]["problem"] is None
    assert {"softmax", "pkm", "fwpkm"} < set(rows)
    assert "half_there" not in rows
    place = site / "throw_away_mixers" / "broken.py"
    broken = rows["throw_away_broken"]
    assert broken["problem"] == (
        "entry point 'throw_away_broken' was left out: package throw-away-mixers 1.2: "
        f"{place}: line 9: RuntimeError: needs a licence; mend the package, or uninstall it"
    )
    assert broken["state_bytes"] is None
    assert set(broken) == set(rows["softmax"])
    assert "throw_away_empty registers no mixer" in rows["throw_away_empty"]["problem"]
    assert "AttributeError" in rows["throw_away_gone"]["problem"]
    assert len(done.stderr.splitlines()) == 3


def test_it_is_checked_and_a_broken_one_is_one_line(site: Path) -> None:
    done = mixlab("check", "throw_away", site=site)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "throw_away keeps the contract" in done.stdout
    refused = mixlab("check", "throw_away_broken", site=site)
    assert refused.returncode == 2
    assert "needs a licence" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
