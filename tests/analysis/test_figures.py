from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from analysis.comparison import compare
from analysis.figures import FIGURES, figure_files, write_figures
from analysis.figures.data import DoesNotApply, FigureData
from analysis.figures.memory_use import over_seeds
from analysis.findings import findings
from analysis.history import MemoryUse, memory_use
from analysis.palette import styles
from analysis.runs import replicates, rows_from_records
from experiments.records import run_folder
from sweeps.saved import SavedSweep
from tests.analysis import planted
from tests.analysis.conftest import HOSTILE
from tests.analysis.test_tuning import TUNED, trials


def pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3]


def holds(png: bytes, color: str) -> bool:
    wanted = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return bool((np.abs(pixels(png) - wanted).max(axis=-1) < 0.02).sum() > 50)


def data(tmp_path: Path, saved: SavedSweep, x: str = "cost/state_bytes", y: str = "report/accuracy") -> FigureData:
    planted.write_records(tmp_path, saved)
    _, rows = rows_from_records(tmp_path, saved.name)
    lines = compare(saved, rows, x, y)
    return FigureData(saved, lines, findings(saved, rows, lines, x=x, y=y), chance=2 / 8192)


def draw(name: str, of: FigureData) -> bytes:
    return figure_files(name, of, ("png",))[0]


def test_every_arm_is_drawn_in_its_colour_even_with_no_state_at_all(tmp_path: Path) -> None:
    png = draw("quality_cost", data(tmp_path, planted.plan()))
    for arm, style in styles(planted.ARMS).items():
        assert holds(png, style.color), arm
    assert pixels(png).shape[1] > 2000  # four panels at 300 dpi


@pytest.mark.parametrize(
    ("x", "y"), [("cost/train_tokens_per_s", "report/loss"), ("cost/flops_per_token", "select/accuracy")]
)
def test_other_axes(tmp_path: Path, x: str, y: str) -> None:
    figure = FIGURES["quality_cost"](data(tmp_path, planted.plan(), x, y))
    assert len(figure.axes) == 4
    assert figure.axes[1].get_xlabel() == {"cost/train_tokens_per_s": "Training speed (tokens/s)"}.get(
        x, "FLOPs per token"
    )


def test_names_are_text_not_formulas_and_one_cell_is_enough(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png = draw("quality_cost", data(tmp_path, planted.plan("odd", arms=HOSTILE, pairs=(8,))))
    for style in styles(HOSTILE).values():
        assert holds(png, style.color)


def test_a_sweep_without_any_result_still_gives_a_figure() -> None:
    saved = planted.plan(pairs=(8,))
    lines = compare(saved, [])
    assert pixels(draw("quality_cost", FigureData(saved, lines, findings(saved, [], lines)))).size


def test_what_applies_is_written_in_three_formats_and_the_rest_says_why_not(tmp_path: Path) -> None:
    of = data(tmp_path, planted.plan(arms={"linear": "linear_attention", "FwPKM": "fwpkm"}, pairs=(8, 64)))
    found = {each.name: each for each in write_figures(tmp_path / "new" / "figures", of)}
    assert list(found) == list(FIGURES)
    assert [path.suffix for path in found["capacity"].paths] == [".pdf", ".svg", ".png"]
    heads = {".pdf": b"%PDF", ".svg": b"<?xml", ".png": b"\x89PNG"}
    for each in found.values():
        for path in each.paths:
            assert path.read_bytes().startswith(heads[path.suffix])
    assert {name: each.why_not for name, each in found.items() if each.why_not} == {
        "learning_rate": "no number was tuned over two values or more",
        "position": "no metric is reported by position",
        "memory_use": "no run logged how a fast-weight memory uses its slots",
    }
    svg = found["capacity"].paths[1].read_text()
    assert "FwPKM" in svg  # letters stay letters
    assert "mathdefault" not in svg
    assert figure_files("capacity", of, ("svg",))[0].decode() == svg  # the same data, the same file


def test_tuning_curves_show_every_trial_lost_ones_at_the_foot() -> None:
    rows = trials([0.5, 1.0, 0.9, None])
    lines = compare(TUNED, rows)
    (panel,) = FIGURES["learning_rate"](FigureData(TUNED, lines, findings(TUNED, rows, lines))).axes
    curve, *marks = panel.lines
    assert curve.get_xydata().tolist() == [[1e-4, 0.5], [1e-3, 1.0], [1e-2, 0.9]]
    assert sorted((mark.get_marker(), mark.get_xdata()[0]) for mark in marks) == [("o", 1e-3), ("x", 1e-1)]
    assert panel.get_xscale() == "log"


def test_quality_by_position(tmp_path: Path) -> None:
    saved = planted.plan(arms={"linear": "linear_attention"}, pairs=(8,))
    of = data(tmp_path, saved)
    line = of.lines[0]
    loss = line.metrics["report/loss"]
    line.metrics.update({f"report/bits_per_byte/pos_{a}_{b}": loss for a, b in ((0, 63), (64, 127), (128, 255))})
    (panel,) = FIGURES["position"](of).axes
    assert panel.lines[0].get_xdata() == pytest.approx([2**5.5, 2**6.5, 2**7.5])
    assert [label.get_text() for label in panel.get_xticklabels()] == ["64", "128", "256"]


def test_use_of_memory_is_read_from_the_records_and_averaged_over_seeds(tmp_path: Path) -> None:
    saved = planted.plan(arms={"linear": "linear_attention", "FwPKM": "fwpkm"}, pairs=(8,))
    planted.write_records(tmp_path, saved)
    for run in saved.runs:
        head = {"linear": "train", "FwPKM": "mixer/3/memory"}[run.arm]
        steps = (25, 50) if run.seed else (25,)  # stopped early
        lines = [
            {"step": step, f"{head}/slot_coverage": 0.1 * run.seed, f"{head}/gate_above_50": 0.5, "train/loss": 1.0}
            for step in steps
        ]
        lines = lines if run.arm == "FwPKM" else [{"step": 25, "train/loss": 1.0}]
        path = run_folder(tmp_path, saved.name, run.key) / "metrics.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, rows = rows_from_records(tmp_path, saved.name)
    found = memory_use(tmp_path, saved.name, replicates(rows))
    assert [(each.arm, each.layer, each.seed) for each in found] == [("FwPKM", "3/memory", seed) for seed in (0, 1, 2)]
    assert found[1].values == {"slot_coverage": [0.1, 0.1], "gate_above_50": [0.5, 0.5]}
    steps, mean, low, high = over_seeds(found, "slot_coverage")
    assert steps == [25, 50]
    assert mean == pytest.approx([0.1, 0.15])
    assert (low, high) == (pytest.approx([0.0, 0.1]), pytest.approx([0.2, 0.2]))
    lines = compare(saved, rows)
    of = FigureData(saved, lines, findings(saved, rows, lines), memory_use=found)
    assert len(FIGURES["memory_use"](of).axes) == 5  # with the gate's distribution
    bare = [MemoryUse(each.arm, each.cell, each.seed, each.layer, each.steps, {}) for each in found]
    assert len(FIGURES["memory_use"](FigureData(saved, lines, of.found, memory_use=bare)).axes) == 4


def test_cost_over_length_comes_from_a_benchmark_or_from_the_measured_growth(tmp_path: Path) -> None:
    of = data(tmp_path, planted.plan())
    (panel,) = FIGURES["cost_growth"](of).axes
    attention = panel.lines[0].get_xydata()
    assert attention[:, 0].tolist() == [128, 256, 512, 1024, 2048]
    assert attention[:, 1] == pytest.approx(1024 * attention[:, 0])
    bench: dict[str, Any] = {
        "layers": [
            {"label": "softmax", "state": [{"tokens": 64, "bytes": 100}, {"tokens": 128, "bytes": 200}]},
            {"label": "pkm", "state": [{"tokens": 64, "bytes": 0}]},
        ],
        "rows": [
            {"scene": scene, "label": "softmax", "tokens": n, "status": status, "seconds": n * 1e-6, "peak_bytes": None}
            | {"seconds_min": n * 0.9e-6, "seconds_max": n * 1.1e-6}
            for scene in ("prefill", "decode", "train")
            for n, status in ((64, "measured"), (128, "measured"), (256, "failed"))
        ],
    }
    measured = FIGURES["cost_growth"](FigureData(of.saved, of.lines, of.found, bench=bench))
    assert [panel.get_ylabel() for panel in measured.axes] == [
        "State (bytes)",
        "Prefill (µs per token)",
        "Decoding (ms per token)",
    ]
    assert measured.axes[1].lines[0].get_ydata() == pytest.approx([1.0, 1.0])
    with pytest.raises(DoesNotApply, match="no measured cost"):
        FIGURES["cost_growth"](FigureData(of.saved, of.lines, of.found, bench={"layers": [], "rows": []}))
