"""Cost against T as a figure: every measured point is in it, and what can't be drawn is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from analysis.bench_figures import cost_figure, read_costs
from analysis.cli import plot_bench
from experiments.errors import UserError

LENGTHS = (512, 1024, 2048)


def row(label: str, scene: str, tokens: int, **values) -> dict:
    row = {"label": label, "scene": scene, "tokens": tokens, "batch": 1, "status": "measured", "note": ""}
    row |= {"seconds": tokens / 1e4, "seconds_min": tokens / 2e4, "seconds_max": tokens / 5e3}
    return row | {"peak_bytes": None, "state_bytes": None} | values


def costs() -> dict:
    """softmax's state grows, fwpkm's doesn't and it runs out of memory at the end, pkm has none."""
    rows = [row(label, "prefill", n, peak_bytes=9 * n) for label in ("softmax", "fwpkm", "pkm") for n in LENGTHS]
    rows[5] |= {"status": "out of memory", "seconds": None}
    states = {"softmax": lambda n: 2048 * n, "fwpkm": lambda n: 2**20, "pkm": lambda n: 0}
    rows += [row(label, "decode", n, state_bytes=of(n)) for label, of in states.items() for n in LENGTHS]
    return {
        "benchmark": "mixers",
        "schema": 1,
        "settings": {"d_model": 256, "precision": "float32"},
        "machine": {"cpu": "a CPU", "n_threads": 1},
        "layers": [{"label": label} for label in states],
        "rows": rows,
    }


def test_every_measured_point_is_drawn() -> None:
    figure = cost_figure(costs())
    prefill, decode, state, peak = figure.axes
    assert [len(line.get_xdata()) for line in prefill.lines] == [3, 2, 3]
    assert list(prefill.lines[0].get_ydata()) == [51.2, 102.4, 204.8]
    assert [len(line.get_xdata()) for line in decode.lines] == [3, 3, 3]
    assert [list(line.get_ydata()) for line in state.lines] == [[2048 * n for n in LENGTHS], [2**20] * 3]
    assert len(peak.lines) == 3
    assert len({(line.get_color(), line.get_marker()) for line in prefill.lines}) == 3
    # One look per layer in all panels.
    assert [line.get_color() for line in state.lines] == [line.get_color() for line in prefill.lines][:2]
    words = figure.get_supxlabel()
    assert "no state: pkm" in words
    assert "fwpkm (out of memory)" in words
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["softmax", "fwpkm", "pkm"]


def test_a_panel_that_was_not_measured_is_left_out() -> None:
    values = costs()
    for entry in values["rows"]:
        entry["peak_bytes"] = None
    assert len(cost_figure(values).axes) == 3
    values["rows"] = []
    with pytest.raises(UserError, match="nothing that was measured"):
        cost_figure(values)


def test_the_command_writes_three_formats(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(costs()))
    done = CliRunner(catch_exceptions=False).invoke(plot_bench, [str(file), "--out", str(tmp_path / "new" / "figures")])
    assert done.exit_code == 0
    starts = {"pdf": b"%PDF", "svg": b"<?xml", "png": b"\x89PNG"}
    for ending, start in starts.items():
        assert (tmp_path / "new" / "figures" / f"bench.{ending}").read_bytes().startswith(start)


@pytest.mark.parametrize("text", ["{", "[]", '{"benchmark": "fwpkm"}', '{"benchmark": "mixers", "schema": 2}'])
def test_another_file_is_one_clear_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(UserError, match="write it with mixlab bench --json"):
        read_costs(file)
    with pytest.raises(UserError, match="can't be read"):
        read_costs(tmp_path / "none.json")
