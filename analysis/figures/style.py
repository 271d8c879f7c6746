"""What all figures share: type, marks, scales and legends. Widths suit a page of 7 inches, type its 8 points."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from analysis.axes import Axis, Unit, human
from analysis.palette import Style
from analysis.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

PANEL_IN = (2.35, 2.0)  # width, height
DPI = 300
QUIET = "#555555"
FORMATS = ("pdf", "svg", "png")
RC = {
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
    "svg.hashsalt": "mixlab",  # the same data, the same file
    "pdf.fonttype": 42,  # letters stay letters, which journals ask for
    "svg.fonttype": "none",
}


def rendered(figure: Figure, kind: str) -> bytes:
    """The figure as a file of ``kind`` (pdf, svg or png at 300 dpi), the same bytes for the same figure."""
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind, {})
    figure.savefig(buffer, format=kind, dpi=DPI, bbox_inches="tight", pad_inches=0.05, metadata=metadata)
    return buffer.getvalue()


def panels(n: int, *, columns: int | None = None, share_y: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure with ``n`` panels in rows; those that are too many are hidden. A single one has its legend beside it."""
    from matplotlib.figure import Figure

    n_columns = columns or (n if n <= 4 else 3 if n % 4 else 4)
    n_rows = math.ceil(n / n_columns)
    size = (4.8, 2.4) if n == 1 else (PANEL_IN[0] * n_columns, PANEL_IN[1] * n_rows + 0.35)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharey=share_y)
    every = [panel for row in grid for panel in row]
    for panel in every[n:]:
        panel.set_axis_off()
    return figure, every[:n]


def matrix(n_rows: int, n_columns: int) -> tuple[Figure, list[list[Axes]]]:
    """A page's width of small panels: one scale of y in a column, one of x in all; labels stand at the outer ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 1.15 * n_rows + 0.9), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey="col")
    return figure, [list(row) for row in grid]


def columns_of(panel_list: Sequence[Axes]) -> int:
    """How many panels stand in a row."""
    return panel_list[0].get_gridspec().ncols


def mark(
    panel: Axes,
    x: float,
    y: float,
    look: Style,
    *,
    over: Interval | None = None,
    filled: bool = True,
    across: Interval | None = None,
) -> None:
    """One point with the intervals ``over`` y and ``across`` x."""
    panel.errorbar(
        [x],
        [y],
        yerr=_arms(over, y),
        xerr=_arms(across, x),
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


def _arms(found: Interval | None, at: float) -> list[list[float]] | None:
    if found is None or found.low is None or found.high is None:
        return None
    return [[max(at - found.low, 0.0)], [max(found.high - at, 0.0)]]


def title(panel: Axes, text: str) -> None:
    panel.set_title(text, loc="left", fontweight="bold")


def fraction_axis(panel: Axes, *, chance: float | None = None) -> None:
    """From 0 to 1, with the level of guessing."""
    panel.set_ylim(-0.04, 1.06)
    if chance is not None:
        panel.axhline(chance, color=QUIET, linewidth=0.8, linestyle=":", zorder=1)


def number_ticks(panel: Axes, values: Iterable[float], *, log: bool | None = None) -> None:
    """Ticks of the x axis at these values, six at most; on a log scale, by default where they span a factor of 4."""
    values = sorted(set(values))
    if values[0] > 0 and (values[-1] / values[0] >= 4 if log is None else log):
        panel.set_xscale("log")
    shown = values if len(values) <= 6 else values[:: math.ceil(len(values) / 6)]
    panel.set_xticks(shown, [f"{value:.3g}" for value in shown])
    panel.set_xticks([], minor=True)
    panel.margins(x=0.1)


def log_values(panel: Axes, values: Sequence[float], unit: Unit = "") -> None:
    """A logarithmic y axis with labels that are plain numbers."""
    panel.set_yscale("log")
    low, high = min(values), max(values)
    panel.set_ylim(low / 1.5, high * 1.5)
    ticks = log_ticks(low / 1.4, high * 1.4, unit)
    panel.set_yticks(ticks, [human(tick, unit) if unit else f"{tick:g}" for tick in ticks])
    panel.set_yticks([], minor=True)


def dodged(looks: Iterable[str], span: float = 0.12) -> dict[str, float]:
    """A factor for the x of each arm, so that intervals at one x stand side by side on a log axis."""
    arms = list(looks)
    return {arm: 2 ** (span * (i - (len(arms) - 1) / 2) / max(len(arms) - 1, 1)) for i, arm in enumerate(arms)}


def legend(
    figure: Figure,
    looks: dict[str, Style],
    extra: Sequence[tuple[str, dict[str, Any]]] = (),
    patches: Sequence[Patch] = (),
    *,
    lines: bool = False,
) -> None:
    """One entry per arm, then the ``extra`` ones (label, properties of the line), then the ``patches``.

    It stands below the panels, beside a single one.
    """
    from matplotlib.lines import Line2D

    handles: list[Line2D | Patch] = [
        Line2D(
            [], [], color=look.color, marker=look.marker, markersize=5.5, linestyle=look.linestyle if lines else "none"
        )
        for look in looks.values()
    ]
    # matplotlib leaves out what starts with an underscore
    labels = [f" {arm}" if arm.startswith("_") else arm for arm in looks]
    for label, properties in extra:
        handles.append(Line2D([], [], color=QUIET, **properties))
        labels.append(label)
    handles += patches
    labels += [str(patch.get_label()) for patch in patches]
    if len([panel for panel in figure.axes if panel.axison]) == 1:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, handlelength=2.2)
        return
    # about 0.062 in a letter at this size, and half an inch for the mark
    widest = 0.55 + 0.062 * max(len(label) for label in labels)
    n_columns = max(1, min(len(labels), int(figure.get_figwidth() / widest)))
    figure.legend(handles, labels, loc="outside lower center", ncols=n_columns, frameon=False, handlelength=2.2)


CHANCE = ("chance", {"linewidth": 0.8, "linestyle": ":"})
FRONT = ("Pareto front (filled)", {"linewidth": 0.9, "linestyle": "--"})


class CostScale:
    """A cost axis: logarithmic, with a place of its own for zero, which a static memory's state has."""

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
        ticks = log_ticks(self.low / 10 ** (pad / 2), self.high * 10 ** (pad / 2), self.axis.unit)
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
                color=QUIET,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
                zorder=5,
            )
        panel.set_xticks(ticks, labels)
        panel.set_xticks([], minor=True)


def log_ticks(low: float, high: float, unit: str, limit: int = 4) -> list[float]:
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
