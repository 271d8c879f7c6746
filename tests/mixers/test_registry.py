"""Names of mixers: duplicates, unknown ones, installed packages that work and that don't."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mixers import registry
from mixers.base import Mixer
from mixers.errors import UserError

ROOT = Path(__file__).parent.parent.parent
LAYER = '''
from mixers.base import MixerOutput
from mixers.pkm import ProductKeyMemory
from mixers.registry import register

@register("installed_memory")
class InstalledMemory(ProductKeyMemory):
    """A mixer that comes with another package."""
'''


def install(site: Path, name: str, source: str) -> None:
    """What pip leaves of a package: its module, and metadata with an entry point."""
    site.mkdir(exist_ok=True)
    (site / f"{name}.py").write_text(source)
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINT_GROUP}]\n{name} = {name}\n")


def listed(site: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path[:0] = [{str(site)!r}, {str(ROOT)!r}]; import mixlab; mixlab.main()"
    return subprocess.run([sys.executable, "-c", code, "mixers", "--json"], capture_output=True, text=True, cwd=site)


def test_an_installed_package_adds_its_mixer_and_a_broken_one_harms_nobody(tmp_path: Path) -> None:
    site = tmp_path / "site"
    install(site, "good_layers", LAYER)
    install(site, "bad_layers", "x = 1\nraise RuntimeError('needs a licence')\n")
    done = listed(site)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["installed_memory"]["module"] == "good_layers"
    assert {"softmax", "pkm", "fwpkm"} < set(rows)
    why = f"{site / 'bad_layers.py'}: line 2: RuntimeError: needs a licence; mend the package, or uninstall it"
    assert f"entry point 'bad_layers' was left out: package bad_layers 1.0: {why}" in done.stderr
    assert rows["bad_layers"]["problem"].endswith(why)


def test_unknown_names_list_the_near_matches() -> None:
    with pytest.raises(UserError, match="unknown mixer 'gated_deltanett'; did you mean 'gated_deltanet'"):
        registry.get("gated_deltanett")
    with pytest.raises(UserError, match="unknown mixer 'zzz'; known: " + ", ".join(registry.names())):
        registry.get("zzz")


def test_a_taken_name_is_refused_and_the_first_stays() -> None:
    before = registry.get("softmax")
    with pytest.raises(UserError, match=r"the name 'softmax' is taken by mixers\.softmax\.SoftmaxAttention"):

        @registry.register("softmax")
        class Other(Mixer):
            pass

    assert registry.get("softmax") is before


@pytest.mark.parametrize("name", ["two words", "", "3d"])
def test_names_are_identifiers(name: str) -> None:
    with pytest.raises(UserError, match="letters, digits and underscores"):
        registry.register(name)(Mixer)


def test_only_mixers_can_be_registered() -> None:
    with pytest.raises(UserError, match="takes a subclass"):
        registry.register("number")(int)
