"""One direction of import: analysis -> sweeps -> experiments -> mixers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["mixers", "experiments", "sweeps", "analysis"]
# Only these files may import an accelerator's libraries; everything else goes through them.
KERNEL_LIBRARIES = {"fla", "flash_attn", "triton"}


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}: imports are absolute here, so that this test can read them")
    return names


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, package
    return found


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_down(package: str) -> None:
    above = set(LAYERS[LAYERS.index(package) + 1 :]) | {"mixlab", "tests"}
    for path in files(package):
        assert not imported(path) & above, f"{path.relative_to(ROOT)} imports {imported(path) & above}"


def test_analysis_imports_neither_torch_nor_mixers() -> None:
    for path in files("analysis"):
        assert not imported(path) & {"torch", "mixers"}, path.relative_to(ROOT)


def test_kernel_libraries_are_imported_by_mixers_only() -> None:
    for package in LAYERS[1:]:
        for path in files(package):
            assert not imported(path) & KERNEL_LIBRARIES, path.relative_to(ROOT)


def test_top_level_modules_are_the_declared_ones() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {*LAYERS, "tests"}
    assert {path.name for path in ROOT.glob("*.py")} == {"mixlab.py"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import mixlab", {"torch", "mlflow", "optuna", "plotly", "matplotlib", "pandas", "scipy", "pydantic", "rich"}),
        ("import analysis.comparison, analysis.table, analysis.page", {"torch", "mlflow"}),
        ("import experiments.records, sweeps.saved", {"torch", "mlflow", "pydantic"}),
        ("import experiments.config, experiments.tasks.mqar", {"torch", "mlflow"}),
    ],
)
def test_light_modules_stay_light(statement: str, absent: set[str]) -> None:
    code = f"import sys; {statement}; print(sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
