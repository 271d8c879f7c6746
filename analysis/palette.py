"""One look per arm, the same in every figure: Okabe-Ito colours, told apart by marker shape as well."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Okabe and Ito, "Color Universal Design" (2008). Yellow is too faint on white for a line, so it comes last;
# the grey stands for their black, which a dark page would swallow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#7F7F7F", "#C9B400")
# plotly name, matplotlib name. Nine shapes against eight colours: 72 arms before a pair comes back.
MARKERS = (
    ("circle", "o"),
    ("square", "s"),
    ("triangle-up", "^"),
    ("diamond", "D"),
    ("triangle-down", "v"),
    ("cross", "P"),
    ("x", "X"),
    ("pentagon", "p"),
    ("star", "*"),
)


@dataclass(frozen=True)
class Style:
    """``color`` as #RRGGBB; the same marker under its plotly (``symbol``) and matplotlib (``marker``) name."""

    color: str
    symbol: str
    marker: str


def styles(arms: Iterable[str]) -> dict[str, Style]:
    """A style for every arm by its place in the sweep's plan, whatever subset a figure then shows."""
    return {
        arm: Style(COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)][0], MARKERS[i % len(MARKERS)][1])
        for i, arm in enumerate(arms)
    }
