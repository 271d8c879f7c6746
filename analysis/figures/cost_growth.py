"""How cost grows with the length of the context: measured by `mixlab bench`, or state as the runs measured it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analysis.axes import Unit, human
from analysis.figures.data import DoesNotApply, FigureData
from analysis.figures.style import legend, log_values, panels, title
from analysis.palette import Style, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = list[tuple[float, float, float | None, float | None]]  # tokens, value, lowest, highest


def cost_growth(data: FigureData) -> Figure:
    """With a benchmark's file: state, prefill time per token, decoding time and peak memory of its layers over T.

    Without: the state of each arm's model from half to eight times the length it was measured at, by its measured
    fixed part and growth per token. That is a line by construction, not a measurement.
    """
    if data.bench is not None:
        return measured_growth(data.bench)
    curves = _state_of_arms(data)
    if not curves:
        raise DoesNotApply("no arm's state was measured, and no benchmark was given (--bench FILE)")
    figure, (panel,) = panels(1)
    for arm, curve in curves.items():
        _draw(panel, curve, data.looks[arm])
    _dress(panel, list(curves.values()), "bytes")
    panel.set_ylabel("State per sequence")
    title(panel, "from fixed part and growth per token")
    legend(figure, {arm: look for arm, look in data.looks.items() if arm in curves}, lines=True)
    return figure


def _state_of_arms(data: FigureData) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for line in data.lines:
        fixed, growth = line.cost.get("state_bytes_fixed"), line.cost.get("state_bytes_per_token")
        at = line.cost.get("state_context_tokens")
        if line.arm in curves or fixed is None or growth is None or not at:
            continue
        lengths = [at * 2**power for power in range(-1, 4)]
        curves[line.arm] = [(n, fixed + growth * n, None, None) for n in lengths if fixed + growth * n > 0]
    return {arm: curve for arm, curve in curves.items() if curve}


MEASURED = "measured"
# scene, value of a row, heading, unit
_SCENES = (
    ("prefill", lambda row, value: 1e6 * value / row["tokens"], "Prefill (µs per token)", ""),
    ("decode", lambda row, value: 1e3 * value, "Decoding (ms per token)", ""),
)


def measured_growth(bench: dict[str, Any]) -> Figure:
    """State, prefill, decoding and peak memory over T, of what was measured. Raises DoesNotApply where nothing was."""
    looks = styles({layer["label"]: layer["label"] for layer in bench["layers"]})
    states = {
        layer["label"]: [
            (row["tokens"], row["bytes"], None, None) for row in layer.get("state", []) if row["bytes"] > 0
        ]
        for layer in bench["layers"]
    }
    parts: list[tuple[str, Unit, dict[str, Curve]]] = [("State (bytes)", "bytes", states)]
    for scene, value_of, heading, unit in _SCENES:
        curves: dict[str, Curve] = {}
        for row in bench["rows"]:
            if row["scene"] == scene and row["status"] == MEASURED:
                found = [
                    value_of(row, row[name]) if row.get(name) else None
                    for name in ("seconds", "seconds_min", "seconds_max")
                ]
                curves.setdefault(row["label"], []).append((row["tokens"], *found))  # type: ignore[arg-type]
        parts.append((heading, unit, curves))
    peaks: dict[str, Curve] = {}
    for row in bench["rows"]:
        if row["scene"] == "prefill" and row["status"] == MEASURED and row.get("peak_bytes"):
            peaks.setdefault(row["label"], []).append((row["tokens"], row["peak_bytes"], None, None))
    parts.append(("Peak memory of prefill", "bytes", peaks))
    parts = [part for part in parts if any(part[2].values())]
    if not parts:
        raise DoesNotApply("the benchmark's file holds no measured cost")
    figure, shown = panels(len(parts), share_y=False)
    for (heading, unit, of_labels), panel in zip(parts, shown, strict=True):
        for label, curve in of_labels.items():
            if curve:
                _draw(panel, sorted(curve), looks[label])
        _dress(panel, [curve for curve in of_labels.values() if curve], unit)
        panel.set_ylabel(heading)
    legend(figure, looks, lines=True)
    return figure


def _draw(panel: Axes, curve: Curve, look: Style) -> None:
    tokens = [point[0] for point in curve]
    if all(point[2] is not None and point[3] is not None for point in curve):
        panel.fill_between(
            tokens,
            [point[2] for point in curve],
            [point[3] for point in curve],
            color=look.color,
            alpha=0.2,
            linewidth=0,
        )
    panel.plot(
        tokens,
        [point[1] for point in curve],
        color=look.color,
        linestyle=look.linestyle,
        marker=look.marker,
        markersize=4.5,
        linewidth=1.1,
    )


def _dress(panel: Axes, curves: list[Curve], unit: Unit) -> None:
    tokens = sorted({point[0] for curve in curves for point in curve})
    panel.set_xscale("log", base=2)
    panel.set_xticks(tokens[:: max(1, -(-len(tokens) // 5))])
    panel.xaxis.set_major_formatter(lambda value, _: human(value, "count").replace(" ", ""))
    panel.set_xticks([], minor=True)
    log_values(panel, [point[1] for curve in curves for point in curve], unit)
    panel.set_xlabel("context T (tokens)")
