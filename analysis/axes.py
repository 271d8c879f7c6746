"""What a metric or cost means when it stands on an axis: its name in words, its unit and which way is better."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Unit = Literal["bytes", "count", "fraction", "ms", ""]
Direction = Literal["maximize", "minimize"]

_COSTS: dict[str, tuple[str, Unit]] = {
    "state_bytes": ("State per sequence", "bytes"),
    "state_bytes_fixed": ("State that does not grow", "bytes"),
    "state_bytes_per_token": ("State growth per token", "bytes"),
    "params": ("Parameters", "count"),
    "flops_per_token": ("FLOPs per token", "count"),
    "train_tokens_per_s": ("Training speed (tokens/s)", "count"),
    "prefill_tokens_per_s": ("Prefill speed (tokens/s)", "count"),
    "decode_ms_per_token": ("Decoding time per token", "ms"),
    "peak_bytes": ("Peak memory", "bytes"),
    "state_context_tokens": ("Context at which state was measured (tokens)", "count"),
}
_SPLITS = {"report": "report split", "select": "select split"}
# first part of a metric's name, without the split
_HIGHER_IS_BETTER = ("accuracy", "recall", "exact_match")


@dataclass(frozen=True)
class Axis:
    """``label`` has no unit in it; ``log`` is the scale to start with."""

    name: str
    label: str
    unit: Unit
    direction: Direction
    log: bool


def axis(name: str, metric: dict[str, str]) -> Axis:
    """The axis of ``cost/...``, ``report/...`` or ``select/...``.

    ``metric`` is the sweep's own (select, report, direction): its direction holds for these two and what is derived
    from them (``report/accuracy/T64_P4``). Other metrics are better when higher if they name an accuracy, a recall
    or a match, else when lower. Speeds are better when higher, every other cost when lower.
    """
    head, _, rest = name.partition("/")
    if head == "cost":
        label, unit = _COSTS.get(rest, (rest.replace("_", " "), "bytes" if rest.endswith("_bytes") else ""))
        return Axis(name, label, unit, "maximize" if rest.endswith("_per_s") else "minimize", log=True)
    stem, _, part = rest.partition("/")
    own = {metric.get("select", "").partition("/")[2], metric.get("report", "").partition("/")[2]}
    if (stem in own or rest in own) and metric.get("direction") in ("maximize", "minimize"):
        direction: Direction = metric["direction"]  # type: ignore[assignment]
    else:
        direction = "maximize" if stem.startswith(_HIGHER_IS_BETTER) else "minimize"
    words = stem.replace("_", " ").capitalize() + (f", {part}" if part else "")
    unit = "fraction" if stem.startswith(_HIGHER_IS_BETTER) else ""
    return Axis(name, f"{words} ({_SPLITS.get(head, head)})", unit, direction, log=False)


def sign(of: Axis) -> int:
    """+1 when higher is better, else -1."""
    return 1 if of.direction == "maximize" else -1


def human(value: float | None, unit: Unit = "") -> str:
    """A number for a table: ``9.5 KiB``, ``1.2 M``, ``0.934``; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit == "bytes":
        return _scaled(value, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB"))
    if unit == "count":
        return _scaled(value, 1000.0, ("", " k", " M", " G", " T", " P"))
    if unit == "fraction":
        return f"{value:.3f}"
    return f"{value:.3g} ms" if unit == "ms" else f"{value:.4g}"


def _scaled(value: float, base: float, suffixes: tuple[str, ...]) -> str:
    power = 0
    # 999.5 would be printed as 1000 of the smaller unit
    while abs(value) >= 999.5 and power < len(suffixes) - 1:
        value, power = value / base, power + 1
    digits = f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
    return digits + suffixes[power]
