"""How much every arm hangs on its learning rate, or whatever number was tuned: all tuning trials, none left out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from analysis.axes import axis, sign
from analysis.comparison import Comparison
from analysis.figures.data import DoesNotApply, FigureData
from analysis.figures.style import CHANCE, QUIET, columns_of, dodged, fraction_axis, legend, number_ticks, panels, title
from analysis.palette import Style
from analysis.tuning import is_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CHOSEN = (
    "chosen",
    {"marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgewidth": 0.9, "linestyle": "none"},
)
_LOST = ("diverged or failed", {"marker": "x", "markersize": 5, "linestyle": "none"})


def learning_rate(data: FigureData) -> Figure:
    """A panel per cell and tuned number: the select metric over it, the chosen trial ringed, lost ones at the foot.

    On a log axis arms stand a little beside one another.
    """
    saved = data.saved
    settings = list(dict.fromkeys(each.setting for tuning in data.found.tuning for each in tuning.sensitivity))
    if not settings:
        raise DoesNotApply("no number was tuned over two values or more")
    select = axis(saved.metric["select"], saved.metric)
    figure, shown = panels(len(saved.cells) * len(settings))
    chosen = {(each.arm, each.cell): each.chosen for each in data.found.tuning}
    looks = data.looks
    for i, (setting, cell) in enumerate((setting, cell) for setting in settings for cell in saved.cells):
        panel = shown[i]
        here = [line for line in data.lines if line.cell == cell]
        values = [
            float(value) for line in here for trial in line.trials if _number(value := trial.settings.get(setting))
        ]
        if not values:
            panel.text(0.5, 0.5, "no trial yet", transform=panel.transAxes, ha="center", va="center", color=QUIET)
            panel.set_xticks([])
        else:
            number_ticks(panel, values, log=is_log(saved, setting, values))
        aside = _aside([line.arm for line in here], values if panel.get_xscale() == "log" else [])
        for line in here:
            look, won = looks[line.arm], chosen.get((line.arm, cell), {})
            _draw(panel, line, setting, look, won, sign(select), aside[line.arm])
        if select.unit == "fraction":
            fraction_axis(panel, chance=data.chance if select.name.endswith("/accuracy") else None)
        title(panel, "" if cell == "all" else cell)
        panel.set_xlabel(setting)
        if i % columns_of(shown) == 0:
            panel.set_ylabel(select.label)
    lost = any(trial.value is None for line in data.lines for trial in line.trials)
    chance = select.unit == "fraction" and data.chance is not None
    legend(figure, looks, [_CHOSEN, *([_LOST] if lost else []), *([CHANCE] if chance else [])], lines=True)
    return figure


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _aside(arms: list[str], values: list[float]) -> dict[str, float]:
    """What moves the marks of each arm, a tenth of a log axis in all: equal results don't hide each other."""
    octaves = math.log2(max(values) / min(values)) if values else 0.0
    return dodged(arms, span=octaves / 10)


def _draw(
    panel: Axes,
    line: Comparison,
    setting: str,
    look: Style,
    chosen: dict[str, object],
    better: int,
    aside: float,
) -> None:
    having = [trial for trial in line.trials if _number(trial.settings.get(setting))]
    trials = sorted(((aside * float(trial.settings[setting]), trial) for trial in having), key=lambda pair: pair[0])
    finished = [(at, trial) for at, trial in trials if trial.outcome == "finished" and trial.value is not None]
    # with several tuned settings the others vary along: points without a line
    joined = len(line.trials[0].settings) == 1 if line.trials else False
    panel.plot(
        [at for at, _ in finished],
        [trial.value for _, trial in finished],
        color=look.color,
        marker=look.marker,
        markersize=4.5,
        linewidth=1.1,
        linestyle=look.linestyle if joined else "none",
        zorder=3,
    )
    for at, trial in trials:
        if trial.outcome != "finished" or trial.value is None:
            panel.plot(
                [at],
                [0.02 if better > 0 else 0.98],
                marker="x",
                color=look.color,
                markersize=5,
                linestyle="none",
                transform=panel.get_xaxis_transform(),
                clip_on=False,
            )
        elif trial.settings == chosen:
            panel.plot(
                [at],
                [trial.value],
                marker="o",
                color=QUIET,
                markersize=9,
                markerfacecolor="none",
                markeredgewidth=0.9,
                zorder=4,
                clip_on=False,
            )
