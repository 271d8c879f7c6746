"""What fast-weight memories do during training: how open the gate is, and how reads spread over the slots."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from analysis.figures.data import DoesNotApply, FigureData
from analysis.figures.style import QUIET, legend, matrix
from analysis.history import MemoryUse
from analysis.palette import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# metric, what it is, whether it is a share of 1
COLUMNS = (
    ("gate_mean", "Gate: mean", True),
    ("levels", "Gate: share of\ntokens above", True),
    ("slot_coverage", "Slots read,\nshare of all", True),
    ("slot_collisions", "Reads of a slot\nread before", True),
    ("slot_kl_uniform", "KL of reads from\nuniform (nats)", False),
)
# metric, level, how dark
GATE_LEVELS = (("gate_above_10", 0.1, 0.2), ("gate_above_50", 0.5, 0.3), ("gate_above_90", 0.9, 0.55))


def memory_use(data: FigureData) -> Figure:
    """A row per arm, cell and layer: mean over seeds (line) and their range (band) over training steps.

    The gate's distribution, where it was logged, has a panel too: the shares of tokens whose gate is above .1, .5 and
    .9, as areas that darken.
    """
    from matplotlib.patches import Patch

    if not data.memory_use:
        raise DoesNotApply("no run logged how a fast-weight memory uses its slots")
    groups: dict[tuple[str, str, str], list[MemoryUse]] = {}
    for each in data.memory_use:
        groups.setdefault((each.arm, each.cell, each.layer), []).append(each)
    has_levels = any(name in each.values for each in data.memory_use for name, _, _ in GATE_LEVELS)
    columns = [column for column in COLUMNS if has_levels or column[0] != "levels"]
    figure, grid = matrix(len(groups), len(columns))
    for panel, (_, label, is_share) in zip(grid[0], columns, strict=True):
        panel.set_title(label, loc="left")
        if is_share:
            panel.set_ylim(-0.04, 1.04)
            panel.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    for row, ((arm, cell, layer), runs) in zip(grid, groups.items(), strict=True):
        for panel, (metric, _, _) in zip(row, columns, strict=True):
            if metric == "levels":
                _draw_levels(panel, runs, data.looks[arm])
            else:
                _draw(panel, runs, metric, data.looks[arm])
        parts = (arm, "" if cell == "all" else cell, f"layer {layer.split('/')[0]}")
        row[0].set_ylabel("\n".join(part for part in parts if part))
    for panel in grid[-1]:
        panel.set_xlabel("step")
    arms = {arm: look for arm, look in data.looks.items() if any(name == arm for name, _, _ in groups)}
    levels = [Patch(color=QUIET, alpha=dark, label=f"gate > {level:g}") for _, level, dark in GATE_LEVELS]
    legend(
        figure, arms, [("range over seeds", {"linewidth": 6, "alpha": 0.25})], levels if has_levels else (), lines=True
    )
    return figure


def over_seeds(runs: list[MemoryUse], metric: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps, and the mean, lowest and highest value over the seeds that have one there (early stopping ends some)."""
    at: dict[int, list[float]] = {}
    for run in runs:
        for step, value in zip(run.steps, run.values.get(metric, []), strict=False):
            if value is not None and math.isfinite(value):
                at.setdefault(step, []).append(value)
    steps = sorted(at)
    return steps, [sum(at[s]) / len(at[s]) for s in steps], [min(at[s]) for s in steps], [max(at[s]) for s in steps]


def _draw(panel: Axes, runs: list[MemoryUse], metric: str, look: Style) -> None:
    steps, mean, low, high = over_seeds(runs, metric)
    panel.fill_between(steps, low, high, color=look.color, alpha=0.25, linewidth=0)
    panel.plot(steps, mean, color=look.color, linewidth=1.2, linestyle=look.linestyle)


def _draw_levels(panel: Axes, runs: list[MemoryUse], look: Style) -> None:
    for name, _, dark in GATE_LEVELS:
        steps, mean, _, _ = over_seeds(runs, name)
        panel.fill_between(steps, 0, mean, color=look.color, alpha=dark, linewidth=0)
        panel.plot(steps, mean, color=look.color, linewidth=0.6)
