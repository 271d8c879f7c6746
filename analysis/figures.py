"""The comparison as a figure for a paper: recall over difficulty, and quality against cost in every cell."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from analysis.axes import Axis, axis, human, sign
from analysis.comparison import Comparison
from analysis.palette import Style, styles
from analysis.pareto import pareto
from sweeps.saved import SavedSweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL_IN = (2.35, 2.0)  # width, height
_DPI = 300
_QUIET = "#555555"
_STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "text.parse_math": False,  # names of arms are not formulas
}


def comparison_png(
    saved: SavedSweep, comparisons: list[Comparison], *, x: str, y: str, chance: float | None = None
) -> bytes:
    """A PNG at 300 dpi. One panel per cell: ``y`` against ``x`` (a cost on a log axis), with intervals over seeds.

    Arms on the Pareto front are filled and joined by a step line, the others are hollow. When exactly one numeric
    setting is varied, a first panel shows ``y`` over it. ``chance`` is a reference line for accuracies.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = _figure(saved, comparisons, axis(x, saved.metric), axis(y, saved.metric), chance)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight", pad_inches=0.05)
    return buffer.getvalue()


def _figure(saved: SavedSweep, comparisons: list[Comparison], x: Axis, y: Axis, chance: float | None) -> Figure:
    from matplotlib.figure import Figure

    looks = styles(saved.arms)
    factor = _varied_number(saved)
    n_panels = len(saved.cells) + (factor is not None)
    n_columns = n_panels if n_panels <= 4 else (3 if n_panels % 4 else 4)
    n_rows = math.ceil(n_panels / n_columns)
    # A single panel has its legend beside it, others below.
    size = (4.8, 2.4) if n_panels == 1 else (_PANEL_IN[0] * n_columns, _PANEL_IN[1] * n_rows + 0.35)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True)
    panels = [panel for row in grid for panel in row]
    scale = _Scale(x, [value for line in comparisons if (value := line.value(x.name)) is not None])
    if factor is not None:
        _draw_over_factor(panels[0], saved, comparisons, factor, y, looks)
    for cell, panel in zip(saved.cells, panels[factor is not None :], strict=False):
        here = [line for line in comparisons if line.cell == cell]
        _draw_cell(panel, cell, here, x, y, scale, looks)
    for panel in panels[:n_panels]:
        if chance is not None and y.unit == "fraction":
            panel.axhline(chance, color=_QUIET, linewidth=0.8, linestyle=":", zorder=1)
        if y.unit == "fraction":
            panel.set_ylim(-0.04, 1.06)
    for i, panel in enumerate(panels[:n_panels]):
        if i % n_columns == 0:
            panel.set_ylabel(y.label)
        if i + n_columns >= n_panels or factor is not None:
            panel.set_xlabel(factor if factor is not None and i == 0 else x.label)
    for panel in panels[n_panels:]:
        panel.set_axis_off()
    _legend(figure, saved, looks, chance if y.unit == "fraction" else None, beside=n_panels == 1)
    return figure


class _Scale:
    """The cost axis: logarithmic, with a place of its own for zero, which a static memory's state has."""

    def __init__(self, of: Axis, values: list[float]) -> None:
        positive = [value for value in values if value > 0]
        self.axis = of
        self.log = of.log and bool(positive)
        self.low, self.high = (min(positive), max(positive)) if positive else (1.0, 1.0)
        self.decades = math.log10(self.high / self.low)
        self.zero_at = self.low / 10 ** max(0.35, 0.18 * self.decades) if self.log and 0 in values else None

    def place(self, value: float | None) -> float | None:
        """The coordinate, or None where a log axis has none."""
        if value is None or not self.log or value > 0:
            return value
        return self.zero_at if value == 0 else None

    def dress(self, panel: Axes) -> None:
        """Limits, ticks and, between zero and the rest, a break."""
        if not self.log:
            panel.xaxis.set_major_formatter(lambda value, _: human(value, self.axis.unit))
            panel.locator_params(axis="x", nbins=4)
            return
        panel.set_xscale("log")
        pad = max(0.08 * self.decades, 0.15)
        left = self.low if self.zero_at is None else self.zero_at
        panel.set_xlim(left / 10**pad, self.high * 10**pad)
        ticks = _log_ticks(self.low / 10 ** (pad / 2), self.high * 10 ** (pad / 2), self.axis.unit)
        labels = [human(tick, self.axis.unit) for tick in ticks]
        if self.zero_at is not None:
            ticks, labels = [self.zero_at, *ticks], ["0", *labels]
            between = math.sqrt(self.zero_at * self.low)
            panel.text(
                between,
                0,
                "//",
                transform=panel.get_xaxis_transform(),
                ha="center",
                va="center",
                color=_QUIET,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
                zorder=5,
            )
        panel.set_xticks(ticks, labels)
        panel.set_xticks([], minor=True)


def _log_ticks(low: float, high: float, unit: str, limit: int = 4) -> list[float]:
    """At most ``limit`` round numbers between ``low`` and ``high``: powers of two for bytes, else of ten."""
    base = 2.0 if unit == "bytes" else 10.0
    first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / limit))
    ticks = [base**power for power in range(-(-first // step) * step, last + 1, step)]
    if len(ticks) >= 2:
        return ticks
    # less than a decade apart
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    fine = [m * 10.0**power for power in range(first, last + 1) for m in range(1, 10) if low <= m * 10.0**power <= high]
    return fine[:: max(1, math.ceil(len(fine) / limit))]


def _draw_cell(
    panel: Axes, cell: str, lines: list[Comparison], x: Axis, y: Axis, scale: _Scale, looks: dict[str, Style]
) -> None:
    points = [(line.value(x.name), line.value(y.name)) if line.n_seeds else (None, None) for line in lines]
    front = pareto(points, x_sign=sign(x), y_sign=sign(y))
    on_front = [(scale.place(px), py) for (px, py), best in zip(points, front, strict=True) if best]
    step = sorted((px, py) for px, py in on_front if px is not None and py is not None)
    if step:
        xs, ys = zip(*step, strict=True)
        where: Any = "post" if x.direction == "minimize" else "pre"
        panel.step(xs, ys, where=where, color=_QUIET, linewidth=0.9, linestyle="--", zorder=2)
    for line, (px, py), best in zip(lines, points, front, strict=True):
        at = scale.place(px)
        if at is not None and py is not None:
            _mark(panel, at, line, y, looks[line.arm], filled=best)
    if not any(line.n_seeds for line in lines):
        panel.text(0.5, 0.5, "no finished run", transform=panel.transAxes, ha="center", va="center", color=_QUIET)
    scale.dress(panel)
    panel.set_title("" if cell == "all" else cell, loc="left", fontweight="bold")


def _draw_over_factor(
    panel: Axes, saved: SavedSweep, comparisons: list[Comparison], factor: str, y: Axis, looks: dict[str, Style]
) -> None:
    for arm in saved.arms:
        points = sorted(
            (float(line.factors[factor]), line.value(y.name), line) for line in comparisons if line.arm == arm
        )
        present = [(at, py, line) for at, py, line in points if py is not None]
        panel.plot([p[0] for p in present], [p[1] for p in present], color=looks[arm].color, linewidth=1.1, zorder=2)
        for at, _, line in present:
            _mark(panel, at, line, y, looks[arm], filled=True)
    values = sorted({float(factors[factor]) for factors in saved.cells.values()})
    if values[0] > 0 and values[-1] / values[0] >= 4:
        panel.set_xscale("log")
        panel.set_xticks([], minor=True)
    panel.set_xticks(values, [f"{value:g}" for value in values])
    panel.margins(x=0.08)
    panel.set_title("over difficulty", loc="left", fontweight="bold")


def _mark(panel: Axes, at: float, line: Comparison, y: Axis, look: Style, *, filled: bool) -> None:
    mean = line.value(y.name)
    found = line.metrics.get(y.name)
    assert mean is not None
    known = found is not None and found.low is not None and found.high is not None
    panel.errorbar(
        [at],
        [mean],
        yerr=[[mean - found.low], [found.high - mean]] if known else None,
        fmt=look.marker,
        color=look.color,
        markersize=5.5,
        markerfacecolor=look.color if filled else "white",
        markeredgecolor=look.color,
        markeredgewidth=1.0,
        elinewidth=0.9,
        capsize=2,
        zorder=3,
    )


def _legend(figure: Figure, saved: SavedSweep, looks: dict[str, Style], chance: float | None, *, beside: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=looks[arm].color, marker=looks[arm].marker, markersize=5.5) for arm in saved.arms]
    # matplotlib leaves out what starts with an underscore
    labels = [f" {arm}" if arm.startswith("_") else arm for arm in saved.arms]
    handles.append(Line2D([], [], color=_QUIET, linewidth=0.9, linestyle="--"))
    labels.append("Pareto front (filled)")
    if chance is not None:
        handles.append(Line2D([], [], color=_QUIET, linewidth=0.8, linestyle=":"))
        labels.append("chance")
    if beside:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, handlelength=1.8)
        return
    # about 0.062 in a letter at this size, and half an inch for the mark
    widest = 0.5 + 0.062 * max(len(label) for label in labels)
    n_columns = max(1, min(len(labels), int(figure.get_figwidth() / widest)))
    figure.legend(handles, labels, loc="outside lower center", ncols=n_columns, frameon=False, handlelength=1.8)


def _varied_number(saved: SavedSweep) -> str | None:
    """The one varied setting, if it is a number; else None."""
    names = {name for factors in saved.cells.values() for name in factors}
    if len(names) != 1 or len(saved.cells) < 2:
        return None
    name = names.pop()
    values = [factors.get(name) for factors in saved.cells.values()]
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return name if numbers else None
