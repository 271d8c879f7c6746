"""Quality by position in the sequence, where the task reports it: what more context is worth to an arm."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from analysis.axes import axis
from analysis.figures.data import DoesNotApply, FigureData
from analysis.figures.style import columns_of, dodged, legend, mark, panels, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUCKET = re.compile(r"(?P<metric>report/\w+)/pos_(?P<first>\d+)_(?P<last>\d+)")


def position_metrics(names: list[str]) -> dict[str, list[tuple[int, int, str]]]:
    """Metric -> (first, last position, full name) of its buckets, in order; metrics with two buckets or more."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    for name in names:
        if match := BUCKET.fullmatch(name):
            found.setdefault(match["metric"], []).append((int(match["first"]), int(match["last"]), name))
    return {metric: sorted(buckets) for metric, buckets in found.items() if len(buckets) > 1}


def position(data: FigureData) -> Figure:
    """A panel per cell and metric: the mean of each bucket of positions, at its geometric middle, with intervals."""
    metrics = position_metrics(sorted({name for line in data.lines for name in line.metrics}))
    if not metrics:
        raise DoesNotApply("no metric is reported by position")
    saved, looks = data.saved, data.looks
    aside = dodged(saved.arms, 0.25)
    figure, shown = panels(len(saved.cells) * len(metrics), share_y=len(metrics) == 1)
    for i, (metric, cell) in enumerate((metric, cell) for metric in metrics for cell in saved.cells):
        panel = shown[i]
        for line in (line for line in data.lines if line.cell == cell):
            look = looks[line.arm]
            points = [
                # buckets double: the first one, which begins at 0, gets the same width as the others
                (aside[line.arm] * math.sqrt(max(first, (last + 1) / 2) * (last + 1)), found)
                for first, last, name in metrics[metric]
                if (found := line.metrics.get(name)) is not None
            ]
            panel.plot(
                [at for at, _ in points],
                [found.mean for _, found in points],
                color=look.color,
                linestyle=look.linestyle,
                linewidth=1.1,
            )
            for at, found in points:
                mark(panel, at, found.mean, look, over=found)
        panel.set_xscale("log", base=2)
        ends = [last + 1 for _, last, _ in metrics[metric]]
        panel.set_xticks(ends, [str(end) for end in ends])
        panel.set_xticks([], minor=True)
        title(panel, "" if cell == "all" else cell)
        panel.set_xlabel("position (tokens)")
        if i % columns_of(shown) == 0 or len(metrics) > 1:
            panel.set_ylabel(axis(metric, saved.metric).label)
    legend(figure, looks, lines=True)
    return figure
