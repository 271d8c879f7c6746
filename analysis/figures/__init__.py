"""Figures fit for a paper: each is a function from :class:`analysis.figures.data.FigureData`, one file, one idea."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from analysis.figures.capacity import capacity
from analysis.figures.cost_growth import cost_growth
from analysis.figures.data import DoesNotApply, FigureData
from analysis.figures.learning_rate import learning_rate
from analysis.figures.memory_use import memory_use
from analysis.figures.position import position
from analysis.figures.quality_cost import quality_cost
from analysis.figures.style import FORMATS, RC, rendered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES: dict[str, Callable[[FigureData], Figure]] = {
    "quality_cost": quality_cost,
    "capacity": capacity,
    "cost_growth": cost_growth,
    "learning_rate": learning_rate,
    "position": position,
    "memory_use": memory_use,
}


class Written(NamedTuple):
    """The files of a figure, or why the sweep has none."""

    name: str
    paths: list[Path]
    why_not: str


def write_figures(folder: Path, data: FigureData) -> list[Written]:
    """Every figure that applies as PDF, SVG and PNG into ``folder``, which is made. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name in FIGURES:
        try:
            files = figure_files(name, data, FORMATS)
        except DoesNotApply as reason:
            found.append(Written(name, [], str(reason)))
            continue
        paths = [folder / f"{name}.{kind}" for kind in FORMATS]
        for path, content in zip(paths, files, strict=True):
            path.write_bytes(content)
        found.append(Written(name, paths, ""))
    return found


def figure_files(name: str, data: FigureData, kinds: tuple[str, ...]) -> list[bytes]:
    """One figure in these formats. Raises DoesNotApply."""
    import matplotlib

    with matplotlib.rc_context(RC):
        figure = FIGURES[name](data)
        return [rendered(figure, kind) for kind in kinds]
