from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from analysis.cli import compare as command
from analysis.comparison import compare
from analysis.findings import findings
from analysis.findings_table import print_findings
from analysis.runs import rows_from_records
from analysis.table import print_comparison
from experiments.errors import UserError
from tests.analysis import planted
from tests.analysis.conftest import HOSTILE


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    planted.write_records(tmp_path, planted.plan())
    return tmp_path


def run(runs: Path, *words: str) -> Result:
    result = CliRunner().invoke(command, [*words, "--runs", str(runs)], env={"COLUMNS": "100"})
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_the_table_fits_100_columns_and_shows_every_arm(runs: Path) -> None:
    text = run(runs, "mqar_state").stdout
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    lines = [line for line in text.splitlines() if "/3 " in line]
    assert len(lines) == 18
    attention = next(line for line in lines if "attention" in line)
    assert attention.split()[0] == "●"
    for part in ("256KiB", "1KiB", "566k", "1.2M", "3/3"):
        assert part in attention
    assert "missing 1/3" in text
    assert "diverged" in text
    assert "Chance: 0.00024" in text
    assert "mixes nothing over time" in " ".join(text.split())


def test_json_is_all_that_is_printed_and_agrees_with_the_front(runs: Path) -> None:
    values = json.loads(run(runs, "mqar_state", "--json").stdout)
    assert [value["arm"] for value in values if value["cell"] == "n_pairs=8" and value["pareto"]] == [
        "attention",
        "window 16",
        "linear",
        "gated DeltaNet",
        "static PKM",
    ]
    fwpkm = next(value for value in values if value["arm"] == "FwPKM" and value["cell"] == "n_pairs=64")
    assert (fwpkm["n_seeds"], fwpkm["n_planned"], fwpkm["n_diverged"]) == (2, 3, 1)


def test_another_cost_and_all_metrics_get_their_place(runs: Path) -> None:
    text = run(runs, "mqar_state", "--x", "cost/state_context_tokens", "--y", "report/loss", "--all-metrics").stdout
    assert "state context tokens" in text
    assert "n_pairs=8: all metrics" in text
    assert "select/accuracy" in text
    assert "report/loss (lower is better)" in " ".join(text.split())


def test_a_sweep_file_stands_for_its_name(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "anything.toml"
    path.write_text('name = "mqar_state"\n')
    assert run(runs, str(path), "--json").stdout == run(runs, "mqar_state", "--json").stdout
    path.write_text("seeds = [1]\n")
    with pytest.raises(UserError, match=r"anything.toml: name: required"):
        run(runs, str(path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mqar_stat"], "no sweep 'mqar_stat'.*did you mean 'mqar_state'"),
        (["mqar_state", "--x", "cost/state"], "--x 'cost/state': sweep 'mqar_state' has no such metric or cost"),
        (["mqar_state", "--y", "report/acuracy"], "--y 'report/acuracy'.*did you mean 'report/accuracy'"),
        (["mqar_state", "--png", "/dev/null/x.png"], "--png /dev/null/x.png: can't be written"),
        (["mqar_state", "--baseline", "liner"], "--baseline 'liner'.*did you mean 'linear'"),
        (["mqar_state", "--bench", "/nowhere.json", "--png", "x.png"], "--bench /nowhere.json: can't be read"),
        (["missing.toml"], "missing.toml: no such file"),
    ],
)
def test_mistakes_are_one_clear_line(runs: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(runs, *words)
    assert "\n" not in str(caught.value)


def test_files_are_written(runs: Path, tmp_path: Path) -> None:
    names = {"html": "new/r.html", "png": "r.png", "csv": "r.csv", "markdown": "r.md", "latex": "r.tex"}
    paths = {option: tmp_path / name for option, name in names.items()}
    words = [word for option, path in paths.items() for word in (f"--{option}", str(path))]
    result = run(runs, "mqar_state", "--json", *words)
    json.loads(result.stdout)
    assert [line for line in result.stderr.splitlines() if line] == [f"wrote {path}" for path in paths.values()]
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    for option in ("html", "markdown", "latex", "csv"):
        assert "FwPKM" in paths[option].read_text()


def test_statistics_stand_below_the_tables(runs: Path) -> None:
    text = run(runs, "mqar_state", "--baseline", "linear").stdout
    assert "paired differences on shared seeds and data; Holm over 15" in text
    assert "pairs at 90 %" in text
    assert "TUNING NOT EQUAL: FwPKM, n_pairs=8: 0 of 4 tuning trials run" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100


def test_a_benchmark_must_be_one(runs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(UserError, match="not a benchmark of mixers"):
        run(runs, "mqar_state", "--figures", str(tmp_path / "f"), "--bench", str(other))


def test_names_are_not_read_as_markup_of_the_terminal(tmp_path: Path) -> None:
    saved = planted.plan("odd", arms=HOSTILE, pairs=(8,))
    planted.write_records(tmp_path, saved)
    _, rows = rows_from_records(tmp_path, "odd")
    console = Console(width=220, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, closed with the console
    with console.file:
        lines = compare(saved, rows)
        print_comparison(console, saved, lines, x="cost/state_bytes", y="report/accuracy", all_metrics=True)
        print_findings(console, saved, lines, findings(saved, rows, lines))
        text = console.export_text()
    for arm in HOSTILE:
        assert arm in text


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, analysis.cli\n"
        "heavy = {'torch', 'mlflow', 'optuna', 'plotly', 'matplotlib', 'pandas', 'scipy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_comparing_never_imports_torch_or_mlflow(runs: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from click.testing import CliRunner\n"
        "from analysis.cli import compare\n"
        f"words = ['mqar_state', '--runs', {str(runs)!r}, '--html', {str(runs / 'r.html')!r}]\n"
        "assert CliRunner().invoke(compare, words).exit_code == 0\n"
        "heavy = {'torch', 'mlflow', 'plotly', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
