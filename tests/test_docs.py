"""What the documentation shows is true: its files load, its code runs."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch

from experiments.config import ExperimentConfig, read_toml
from experiments.pattern import parse_pattern
from experiments.recipe import RECIPES
from mixers import registry
from sweeps.definition import definition_names, load_sweep
from sweeps.plan import plan

ROOT = Path(__file__).parent.parent


def indented_block(page: str, first_line: str) -> str:
    """The indented block of a page that starts with ``first_line``."""
    text = (ROOT / "docs" / page).read_text()
    match = re.search(rf"^    {re.escape(first_line)}.*\n(?:    .*\n|\n)*", text, re.MULTILINE)
    assert match, f"{page}: no block starts with {first_line!r}"
    return textwrap.dedent(match[0])


def test_the_sweep_of_the_first_journey(tmp_path: Path) -> None:
    (tmp_path / "window.toml").write_text(indented_block("sweeps.md", 'name = "window"'))
    planned = plan(load_sweep(str(tmp_path / "window.toml")))
    count = re.search(
        r"`(\d+ arms x \d+ cells x \(\d+\s+tuning \+ \d+ seeds\) = \d+ runs)`", (ROOT / "docs/sweeps.md").read_text()
    )
    assert count
    assert planned.count() == " ".join(count[1].split())


def test_the_mixer_of_the_third_journey(tmp_path: Path) -> None:
    path = tmp_path / "decayed_sum.py"
    path.write_text(indented_block("register.md", "import torch"))
    assert registry.load_plugin(path) == ["decayed_sum"]
    try:
        mixer = registry.build("decayed_sum", {"d_model": 6, "half_life": 4.0}).double()
        x = torch.randn(2, 9, 6, dtype=torch.float64)
        whole = mixer(x, return_state=True)
        first = mixer(x[:, :4], return_state=True)
        second = mixer(x[:, 4:], first.state, return_state=True)
        torch.testing.assert_close(torch.cat([first.y, second.y], 1), whole.y)
        torch.testing.assert_close(second.state, whole.state)
        weight = 2 ** (-1 / 4.0)
        want = sum(weight ** (8 - t) * x[:, t] for t in range(9)) @ mixer.out.weight.T
        torch.testing.assert_close(whole.y[:, -1], want)
    finally:
        registry._registered.pop("decayed_sum")


@pytest.mark.parametrize("name", definition_names())
def test_shipped_sweeps_can_be_planned(name: str) -> None:
    assert plan(load_sweep(name)).n_runs > 0


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    from experiments.backbone import validate_model

    validate_model(ExperimentConfig.parse(read_toml(path), path.name))


def test_patterns_shown_are_patterns() -> None:
    for page in ("README.md", "docs/patterns.md"):
        for text in re.findall(r"gated_deltanet\*3,softmax\(window=64\) \| [^`\n]*", (ROOT / page).read_text()):
            assert str(parse_pattern(text))


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
