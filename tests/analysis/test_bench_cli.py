"""`plot-bench`: a benchmark's file becomes figures, and what isn't in them is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from analysis.cli import plot_bench
from analysis.figures.cost_growth import measured_growth
from experiments.errors import UserError

LENGTHS = (512, 1024, 2048)
STATES = {"softmax": lambda n: 2048 * n, "fwpkm": lambda n: 2**20, "pkm": lambda n: 0}


def row(label: str, scene: str, tokens: int, **values) -> dict:
    found = {"label": label, "scene": scene, "tokens": tokens, "status": "measured", "peak_bytes": None}
    found |= {"seconds": tokens / 1e4, "seconds_min": tokens / 2e4, "seconds_max": tokens / 5e3, "state_bytes": None}
    return found | values


def costs() -> dict:
    """softmax's state grows, fwpkm's doesn't and it runs out of memory at the end, pkm has none."""
    rows = [row(label, "prefill", n, peak_bytes=9 * n) for label in STATES for n in LENGTHS]
    rows[5] |= {"status": "out of memory", "seconds": None}
    rows += [row(label, "decode", n, state_bytes=of(n)) for label, of in STATES.items() for n in LENGTHS]
    layers = [
        {"label": label, "state": [{"tokens": n, "bytes": of(n)} for n in LENGTHS]} for label, of in STATES.items()
    ]
    return {"benchmark": "mixers", "schema": 1, "layers": layers, "rows": rows}


def test_every_measured_point_is_drawn() -> None:
    panels = [panel for panel in measured_growth(costs()).axes if panel.lines]
    assert [[len(line.get_xdata()) for line in panel.lines] for panel in panels] == [
        [3, 3],  # state: none of pkm
        [3, 2, 3],  # prefill: fwpkm's last did not fit
        [3, 3, 3],
        [3, 2, 3],
    ]


def test_three_formats_and_what_is_not_in_them(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(costs()))
    out = tmp_path / "new" / "figures"
    done = CliRunner(catch_exceptions=False).invoke(plot_bench, [str(file), "--out", str(out)])
    assert done.exit_code == 0
    for ending, start in {"pdf": b"%PDF", "svg": b"<?xml", "png": b"\x89PNG"}.items():
        assert (out / f"bench.{ending}").read_bytes().startswith(start)
    assert "no state: pkm" in done.stderr
    assert "not drawn: fwpkm, prefill 2048: out of memory" in done.stderr


@pytest.mark.parametrize("text", ["{", "[]", '{"benchmark": "fwpkm"}', '{"benchmark": "mixers", "schema": 2}'])
def test_another_file_is_one_clear_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(UserError, match="not a benchmark of mixers"):
        plot_bench.main([str(file)], standalone_mode=False)
