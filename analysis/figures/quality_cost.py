"""Quality against a cost: a panel per cell with its Pareto front, and quality over difficulty."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from analysis.axes import Axis, axis, sign
from analysis.comparison import Comparison
from analysis.figures.data import FigureData
from analysis.figures.style import (
    CHANCE,
    FRONT,
    QUIET,
    CostScale,
    columns_of,
    dodged,
    fraction_axis,
    legend,
    mark,
    number_ticks,
    panels,
    title,
)
from analysis.palette import Style
from analysis.pareto import pareto
from sweeps.saved import SavedSweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def quality_cost(data: FigureData) -> Figure:
    """One panel per cell: ``y`` against ``x`` (a cost on a log axis), with intervals over seeds.

    Arms on the Pareto front are filled and joined by a step line, the others are hollow. When exactly one numeric
    setting is varied, a first panel shows ``y`` over it.
    """
    saved, looks = data.saved, data.looks
    x, y = axis(data.found.x, saved.metric), axis(data.found.y, saved.metric)
    factor = varied_number(saved)
    figure, shown = panels(len(saved.cells) + (factor is not None))
    scale = CostScale(x, [value for line in data.lines if (value := line.value(x.name)) is not None])
    if factor is not None:
        _draw_over_factor(shown[0], saved, data.lines, factor, y, looks)
    for cell, panel in zip(saved.cells, shown[factor is not None :], strict=True):
        _draw_cell(panel, cell, [line for line in data.lines if line.cell == cell], x, y, scale, looks)
    chance = data.chance if y.unit == "fraction" and y.name.endswith("/accuracy") else None
    n_columns = columns_of(shown)
    for i, panel in enumerate(shown):
        if y.unit == "fraction":
            fraction_axis(panel, chance=chance)
        if i % n_columns == 0:
            panel.set_ylabel(y.label)
        if i + n_columns >= len(shown) or factor is not None:
            panel.set_xlabel(factor if factor is not None and i == 0 else x.label)
    legend(figure, looks, [FRONT, *([CHANCE] if chance is not None else [])])
    return figure


def _draw_cell(
    panel: Axes, cell: str, lines: list[Comparison], x: Axis, y: Axis, scale: CostScale, looks: dict[str, Style]
) -> None:
    points = [(line.value(x.name), line.value(y.name)) if line.n_seeds else (None, None) for line in lines]
    front = pareto(points, x_sign=sign(x), y_sign=sign(y))
    on_front = [(scale.place(px), py) for (px, py), best in zip(points, front, strict=True) if best]
    step = sorted((px, py) for px, py in on_front if px is not None and py is not None)
    if step:
        xs, ys = zip(*step, strict=True)
        where: Any = "post" if x.direction == "minimize" else "pre"
        panel.step(xs, ys, where=where, color=QUIET, linewidth=0.9, linestyle="--", zorder=2)
    for line, (px, py), best in zip(lines, points, front, strict=True):
        at = scale.place(px)
        if at is not None and py is not None:
            mark(panel, at, py, looks[line.arm], over=line.metrics.get(y.name), filled=best)
    if not any(line.n_seeds for line in lines):
        panel.text(0.5, 0.5, "no finished run", transform=panel.transAxes, ha="center", va="center", color=QUIET)
    scale.dress(panel)
    title(panel, "" if cell == "all" else cell)


def _draw_over_factor(
    panel: Axes, saved: SavedSweep, comparisons: list[Comparison], factor: str, y: Axis, looks: dict[str, Style]
) -> None:
    values = sorted({float(factors[factor]) for factors in saved.cells.values()})
    aside = dodged(saved.arms) if values[0] > 0 and values[-1] / values[0] >= 4 else dict.fromkeys(saved.arms, 1.0)
    for arm in saved.arms:
        points = sorted(
            (float(line.factors[factor]), line.value(y.name), line) for line in comparisons if line.arm == arm
        )
        present = [(at, py, line) for at, py, line in points if py is not None]
        look = looks[arm]
        panel.plot(
            [p[0] * aside[arm] for p in present],
            [p[1] for p in present],
            color=look.color,
            linestyle=look.linestyle,
            linewidth=1.1,
            zorder=2,
        )
        for at, py, line in present:
            mark(panel, at * aside[arm], py, look, over=line.metrics.get(y.name))
    number_ticks(panel, values)
    title(panel, "over difficulty")


def varied_number(saved: SavedSweep) -> str | None:
    """The one varied setting, if it is a number; else None."""
    names = {name for factors in saved.cells.values() for name in factors}
    if len(names) != 1 or len(saved.cells) < 2:
        return None
    name = names.pop()
    values = [factors.get(name) for factors in saved.cells.values()]
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return name if numbers else None
