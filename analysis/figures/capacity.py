"""Recall against state bytes over difficulty: the curve over pairs, the pairs held at 90 %, and bits per byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.axes import axis
from analysis.capacity import THRESHOLDS, Capacity, Threshold
from analysis.figures.data import DoesNotApply, FigureData
from analysis.figures.style import (
    CHANCE,
    QUIET,
    CostScale,
    dodged,
    fraction_axis,
    legend,
    log_values,
    mark,
    number_ticks,
    panels,
    title,
)
from analysis.palette import Style
from analysis.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_HELD = (f"{THRESHOLDS[0]:.0%}".replace("%", " %"), {"linewidth": 0.6, "linestyle": "--"})


def capacity(data: FigureData) -> Figure:
    """Three panels for each group of cells that differ in the number of pairs only.

    Accuracy over the number of pairs with intervals over seeds; the largest number of pairs recalled at 90 % against
    state bytes (an arrow: at least, or at most, as seeds lie beyond what was tested); bits recalled per byte of state
    over the number of pairs, where the state is not empty.
    """
    if not data.found.capacity:
        raise DoesNotApply("it needs associative recall with two numbers of pairs or more")
    looks = data.looks
    groups: dict[tuple[str, bool], list[Capacity]] = {}
    for each in data.found.capacity:
        groups.setdefault((each.group, each.trained), []).append(each)
    figure, shown = panels(3 * len(groups), columns=3, share_y=False)
    for row, ((group, _), members) in enumerate(groups.items()):
        over, held, efficient = shown[3 * row : 3 * row + 3]
        _draw_over_pairs(over, members, looks, data.chance)
        _draw_held(held, members, looks, data)
        _draw_efficiency(efficient, members, looks)
        title(over, group or "accuracy over difficulty")
        title(held, "pairs at 90 % against state")
        title(efficient, "bits per byte of state")
    legend(figure, looks, [_HELD, *([CHANCE] if data.chance is not None else [])], lines=True)
    return figure


def _draw_over_pairs(panel: Axes, members: list[Capacity], looks: dict[str, Style], chance: float | None) -> None:
    aside = dodged(each.arm for each in members)
    for each in members:
        look = looks[each.arm]
        known = [point for point in each.points if point.accuracy is not None]
        line = [(point.n_pairs, point.accuracy.mean) for point in known if point.accuracy]
        panel.plot(
            *zip(*line, strict=True), color=look.color, linestyle=look.linestyle, linewidth=1.1
        ) if line else None
        for point in known:
            assert point.accuracy is not None
            mark(
                panel,
                point.n_pairs * aside[each.arm],
                point.accuracy.mean,
                look,
                over=point.accuracy,
                filled=not point.n_diverged,
            )
    panel.axhline(THRESHOLDS[0], color=QUIET, zorder=1, **_HELD[1])
    number_ticks(panel, (point.n_pairs for each in members for point in each.points))
    fraction_axis(panel, chance=chance)
    panel.set_xlabel("key-value pairs")
    panel.set_ylabel("Accuracy (report split)")


def _draw_held(panel: Axes, members: list[Capacity], looks: dict[str, Style], data: FigureData) -> None:
    points = [(each, _state(each), each.thresholds[0]) for each in members]
    scale = CostScale(
        axis("cost/state_bytes", data.saved.metric), [state for _, state, _ in points if state is not None]
    )
    for each, state, threshold in points:
        at = scale.place(state)
        if at is None or threshold.pairs is None:
            continue
        over = Interval(threshold.pairs, threshold.low, threshold.high, threshold.n)
        mark(panel, at, threshold.pairs, looks[each.arm], over=over, filled=not _bounded(threshold))
        for n, direction in ((threshold.n_above, 1), (threshold.n_below, -1)):
            if n:
                panel.annotate(
                    "",
                    (at, threshold.pairs * 2 ** (0.45 * direction)),
                    (at, threshold.pairs),
                    arrowprops={"arrowstyle": "->", "color": looks[each.arm].color, "linewidth": 0.9},
                )
    scale.dress(panel)
    loads = sorted({point.n_pairs for each in members for point in each.points})
    panel.set_yscale("log", base=2)
    panel.set_ylim(loads[0] / 1.8, loads[-1] * 1.8)
    panel.set_yticks(loads, [str(load) for load in loads])
    panel.set_yticks([], minor=True)
    panel.set_xlabel("State per sequence")
    panel.set_ylabel("Pairs recalled at 90 %")


def _bounded(threshold: Threshold) -> bool:
    return bool(threshold.n_above or threshold.n_below)


def _state(each: Capacity) -> float | None:
    """With the most pairs tested."""
    known = [point.state_bytes for point in each.points if point.state_bytes is not None]
    return known[-1] if known else None


def _draw_efficiency(panel: Axes, members: list[Capacity], looks: dict[str, Style]) -> None:
    values = []
    for each in members:
        look = looks[each.arm]
        known = [(point.n_pairs, point.bits_per_byte) for point in each.points if (point.bits_per_byte or 0) > 0]
        if known:
            panel.plot(
                *zip(*known, strict=True),
                color=look.color,
                linestyle=look.linestyle,
                linewidth=1.1,
                marker=look.marker,
                markersize=5.5,
            )
        values += [value for _, value in known]
    number_ticks(panel, (point.n_pairs for each in members for point in each.points))
    if values and max(values) / min(values) > 4:
        log_values(panel, values)
    panel.set_xlabel("key-value pairs")
    panel.set_ylabel("Bits recalled per byte")
