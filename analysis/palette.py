"""One look per arm, the same in every figure and on every page: colour and mark follow the family of its mixer."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from analysis.patterns import mixer_names, windowed

# Okabe and Ito, "Color Universal Design" (2008); the grey stands for their black, which a dark page would swallow,
# and the olive for their yellow, which is too faint on white for a line.
BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE, GREY, OLIVE = (
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
    "#5F5F5F",
    "#A89600",
)
COLORS = (BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE, GREY, OLIVE)
# plotly name, matplotlib name
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
# plotly name, matplotlib name
DASHES = (("solid", "-"), ("dash", "--"), ("dashdot", "-."), ("dot", ":"))
# Kin share a hue and differ in their mark: attention blue, decaying sums green, delta rules orange, memories red and
# grey, layers that train a network in passing purple, convolutions olive.
FAMILIES = {
    "softmax": (BLUE, 0),
    "window": (SKY, 7),
    "linear_attention": (GREEN, 2),
    "based": (GREEN, 3),
    "retention": (GREEN, 7),
    "gla": (GREEN, 4),
    "hgrn2": (GREEN, 5),
    "mamba2": (GREEN, 8),
    "gated_deltanet": (ORANGE, 3),
    "delta_net": (ORANGE, 2),
    "kda": (ORANGE, 4),
    "rwkv7": (ORANGE, 8),
    "fwpkm": (VERMILLION, 1),
    "pkm": (GREY, 6),
    "peer": (GREY, 5),
    "fast_mlp": (PURPLE, 0),
    "ttt": (PURPLE, 4),
    "lact": (PURPLE, 7),
    "short_conv": (OLIVE, 2),
}
_MEMORIES = ("fwpkm", "pkm", "peer")
# How far further arms of a family are mixed with black (below 0) or white, so that they differ in grey too.
_SHADES = (0.0, -0.4, 0.4, -0.65, 0.2)


@dataclass(frozen=True)
class Style:
    """``color`` as #RRGGBB; mark and line under their plotly (``symbol``, ``dash``) and matplotlib names."""

    color: str
    symbol: str
    marker: str
    dash: str
    linestyle: str


def family(pattern: str) -> str:
    """Which mixer a pattern is about: its memory if it has one, else its first; ``window`` for windowed attention."""
    names = mixer_names(pattern.replace("fla:", ""))
    for memory in _MEMORIES:
        if memory in names:
            return memory
    first = names[0] if names else ""
    return "window" if first == "softmax" and names == ["softmax"] and windowed(pattern) else first


def styles(arms: Mapping[str, str]) -> dict[str, Style]:
    """A style for every arm (name -> pattern), whatever subset a figure then shows.

    The first arm of a family has the family's own look, the same in all sweeps; further ones have its hue in another
    shade, mark and dash. No two arms of a sweep look the same, up to 45 of a family.
    """
    numbers: dict[str, int] = {}  # of each arm within its family
    members: dict[str, int] = {}
    for arm, pattern in arms.items():
        numbers[arm] = members[family(pattern)] = members.get(family(pattern), -1) + 1
    used: set[tuple[str, int]] = set()
    found: dict[str, Style] = {}
    for arm in sorted(arms, key=lambda name: numbers[name] > 0):
        hue, mark = FAMILIES.get(family(arms[arm])) or _of_stranger(family(arms[arm]))
        color = _shaded(hue, _SHADES[numbers[arm] % len(_SHADES)])
        # a mark that no other arm has, so that the arms differ in grey; else one that is new in this colour
        order = [(mark + step) % len(MARKERS) for step in range(len(MARKERS))]
        taken = {other for _, other in used} if numbers[arm] else set()
        fresh = [each for each in order if each not in taken and (color, each) not in used]
        mark = next(iter(fresh or [each for each in order if (color, each) not in used] or order))
        used.add((color, mark))
        found[arm] = Style(color, *MARKERS[mark], *DASHES[numbers[arm] % len(DASHES)])
    return {arm: found[arm] for arm in arms}


def _of_stranger(name: str) -> tuple[str, int]:
    """A look for a mixer that is not ours: by its name, so that it is the same in all sweeps."""
    number = zlib.crc32(name.encode())
    return COLORS[number % len(COLORS)], number // len(COLORS) % len(MARKERS)


def _shaded(color: str, shade: float) -> str:
    target = 255 if shade > 0 else 0
    parts = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + abs(shade) * (target - part)):02X}" for part in parts)
