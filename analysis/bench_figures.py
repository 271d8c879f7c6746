"""Cost against T, from a file that ``mixlab bench --json FILE`` wrote: for a paper, on log axes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from analysis.axes import human
from analysis.palette import styles
from experiments.errors import UserError

SCHEMA = 1
FORMATS = ("pdf", "svg", "png")
# Panels in reading order: scene and field of a row, the fields of its fastest and slowest, scale, title.
PANELS = (
    ("prefill", "seconds", ("seconds_min", "seconds_max"), 1e3, "Prefill (ms)"),
    ("decode", "seconds", ("seconds_min", "seconds_max"), 1e3, "One token more (ms)"),
    ("decode", "state_bytes", None, 1.0, "State"),
    ("prefill", "peak_bytes", None, 1.0, "Peak memory of the prefill"),
)
MEASURED = "measured"


def read_costs(path: Path) -> dict[str, Any]:
    """The file's values.

    Raises:
        UserError: it can't be read, or is not of this benchmark and schema.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"plot-bench: {path}: can't be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"plot-bench: {path}: is no JSON; write it with mixlab bench --json {path}") from None
    if not isinstance(values, dict) or values.get("benchmark") != "mixers" or values.get("schema") != SCHEMA:
        raise UserError(
            f"plot-bench: {path}: is not schema {SCHEMA} of the benchmark of mixers; "
            f"write it with mixlab bench --json {path}"
        )
    return values


def cost_figure(values: dict[str, Any]) -> Figure:
    """One panel per cost that was measured, one line per layer: medians, bars from the fastest to the slowest call.

    What has no place on a log axis or was not measured is named below the panels.
    """
    labels = [layer["label"] for layer in values["layers"]]
    looks = styles(labels)
    panels = [panel for panel in PANELS if any(_points(values, label, panel) for label in labels)]
    if not panels:
        raise UserError("plot-bench: the file holds nothing that was measured")
    n_columns = min(2, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(4.1 * n_columns + 2.1, 2.9 * n_rows + 0.5), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    drawn: dict[str, Any] = {}
    for axes, panel in zip(grid.flat, panels, strict=False):
        for label in labels:
            points = _points(values, label, panel)
            if points:
                drawn.setdefault(label, _line(axes, points, panel, looks[label]))
        _dress(axes, panel, sorted({row["tokens"] for row in values["rows"] if row["scene"] == panel[0]}))
    figure.legend(
        drawn.values(), drawn.keys(), loc="outside right upper", frameon=False, fontsize=7.5, handlelength=1.8
    )
    figure.supxlabel(_notes(values, labels), fontsize=7, x=0.01, ha="left")
    return figure


def write_cost_figure(values: dict[str, Any], folder: Path) -> list[Path]:
    """``bench.pdf``, ``.svg`` and ``.png`` (300 dpi) in ``folder``, which is made."""
    figure = cost_figure(values)
    paths = [folder / f"bench.{ending}" for ending in FORMATS]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            figure.savefig(path, dpi=300)
    except OSError as error:
        raise UserError(f"plot-bench: --out {folder}: can't be written: {error.strerror}") from None
    return paths


def _points(values: dict[str, Any], label: str, panel: tuple) -> list[dict[str, Any]]:
    scene, field, *_ = panel
    found = [
        row
        for row in values["rows"]
        if row["label"] == label and row["scene"] == scene and row["status"] == MEASURED and (row[field] or 0) > 0
    ]
    return sorted(found, key=lambda row: row["tokens"])


def _line(axes: Axes, points: list[dict[str, Any]], panel: tuple, look: Any) -> Any:
    _, field, ends, scale, _ = panel
    x, y = [row["tokens"] for row in points], [scale * row[field] for row in points]
    if ends is not None:
        low, high = ([scale * row[end] for row in points] for end in ends)
        axes.vlines(x, low, high, color=look.color, linewidth=0.7, alpha=0.5)
    (line,) = axes.plot(
        x, y, color=look.color, marker=look.marker, markersize=4, linewidth=1, markeredgecolor="white",
        markeredgewidth=0.4,
    )  # fmt: skip
    return line


def _dress(axes: Axes, panel: tuple, lengths: list[int]) -> None:
    *_, title = panel
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("tokens before it" if panel[:2] == ("decode", "seconds") else "tokens", fontsize=8)
    axes.set_xticks(lengths)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if panel[1].endswith("_bytes"):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value, "bytes")))
    axes.grid(True, which="major", linewidth=0.3, color="#CCCCCC")
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _notes(values: dict[str, Any], labels: list[str]) -> str:
    """The machine, what has no state, what could not be measured."""
    machine, settings = values["machine"], values["settings"]
    device = machine.get("gpu") or f"{machine['cpu']}, threads: {machine['n_threads']}"
    notes = [f"{device}; D={settings['d_model']}, {settings['precision']}; medians, bars: fastest to slowest call"]
    decoded = {row["label"] for row in values["rows"] if row["scene"] == "decode" and row["state_bytes"] == 0}
    if decoded:
        notes.append(f"no state: {', '.join(label for label in labels if label in decoded)}")
    failed = sorted({f"{row['label']} ({row['status']})" for row in values["rows"] if row["status"] != MEASURED})
    if failed:
        notes.append(f"not everywhere measured: {', '.join(failed)}")
    return "\n".join(notes)
