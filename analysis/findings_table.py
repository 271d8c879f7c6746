"""The statistics on a terminal: who differs from whom, what is recalled, and how settings were found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from analysis.axes import axis, sign
from analysis.capacity import Capacity, Threshold
from analysis.comparison import Comparison
from analysis.findings import Findings
from analysis.paired import PairedDifference
from analysis.table import plain_table
from analysis.tuning import FEWEST_FOR_WIDTH, Tuning, too_few_values
from sweeps.saved import SavedSweep


def print_findings(console: Console, saved: SavedSweep, lines: Sequence[Comparison], found: Findings) -> None:
    """Tables of paired differences, of capacity and of tuning, each only where there is something to say."""
    if any(each.n for each in found.paired):
        console.print(paired_table(saved, lines, found))
    if found.capacity:
        console.print(capacity_table(found.capacity))
    if found.tuning:
        console.print(tuning_table(found.tuning))
    for fault in found.tuning_faults:
        console.print(f"TUNING NOT EQUAL: {fault}", style="bold yellow", highlight=False, markup=False)
    for setting in too_few_values(found.tuning):
        console.print(
            f"Only two values of {setting} were tried: how much an arm hangs on it, and whether better values lie "
            "outside, is not known.",
            style="yellow",
            highlight=False,
            markup=False,
        )
    if found.edges:
        console.print(
            f"▲▼ In {len(found.edges)} of {len(found.tuning)} arm-cells the best setting is the highest (▲) or lowest "
            "(▼) tried: better ones may lie outside. Search a wider range.",
            style="yellow",
            highlight=False,
            markup=False,
        )


def paired_table(saved: SavedSweep, lines: Sequence[Comparison], found: Findings) -> Table:
    """Every arm against the baseline, or against the best arm of its cell."""
    better = sign(axis(found.y, saved.metric))
    table = plain_table(f"{found.y}: paired differences on shared seeds and data; Holm over {len(found.paired)}")
    table.add_column("cell", overflow="fold")
    table.add_column("arm", overflow="fold")
    table.add_column("minus", overflow="fold")
    for heading in ("difference [95 %]", "p Holm", "pairs", "P(●)"):
        table.add_column(heading, justify="right", no_wrap=True)
    differences = {(each.cell, each.a, each.b): each for each in found.paired}
    for cell in saved.cells:
        here = [line for line in lines if line.cell == cell]
        valued = [line for line in here if line.value(found.y) is not None and line.n_seeds]
        if not valued:
            continue
        # a cut-down family has comparisons with the first arm only
        fixed = found.baseline or (found.paired[0].b if len({each.b for each in found.paired}) == 1 else None)
        against = fixed or max(valued, key=lambda line: better * (line.value(found.y) or 0.0)).arm
        for i, line in enumerate(here):
            probability = found.pareto_probability.get((line.arm, cell))
            cells = ["–", "–", "–"]
            if line.arm != against:
                cells = _difference(differences, cell, line.arm, against)
            table.add_row(
                escape(cell) if i == 0 else "",
                escape(line.arm),
                "" if line.arm == against else escape(against),
                *(cells if line.arm != against else ("", "", "")),
                "–" if probability is None else f"{probability:.2f}",
            )
    return table


def _difference(found: dict[tuple[str, str, str], PairedDifference], cell: str, a: str, b: str) -> list[str]:
    each, flip = found.get((cell, a, b)), 1
    if each is None:
        each, flip = found.get((cell, b, a)), -1
    if each is None or each.mean is None:
        return ["–", "–", "0" if each is None else str(each.n)]
    bounds = (
        "" if each.low is None or each.high is None else f" [{_signed(flip * (each.low if flip > 0 else each.high))}"
    )
    if bounds:
        bounds += f", {_signed(flip * (each.high if flip > 0 else each.low))}]"  # type: ignore[operator]
    return [escape(_signed(flip * each.mean) + bounds), p_text(each.p_holm), str(each.n)]


def _signed(value: float) -> str:
    return f"{value:+.3f}" if abs(value) < 1e3 else f"{value:+.3g}"


def p_text(p: float | None) -> str:
    """``0.012``, ``<0.001``; a dash where there is none."""
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def capacity_table(capacity: Sequence[Capacity]) -> Table:
    table = plain_table("Pairs recalled, and bits recalled per byte of state (best over the numbers of pairs)")
    grouped = any(each.group for each in capacity)
    for heading in ("arm", *(["at"] if grouped else [])):
        table.add_column(heading, overflow="fold")
    for level in capacity[0].thresholds:
        table.add_column(f"pairs at {100 * level.accuracy:g} %", justify="right", no_wrap=True)
    for heading in ("bits", "bits/byte", "of state"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in capacity:
        known = [point for point in each.points if point.bits is not None]
        best = max(known, key=lambda point: (point.bits_per_byte or 0.0, point.bits), default=None)
        table.add_row(
            escape(each.arm),
            *([escape(each.group)] if grouped else []),
            *(threshold_text(level, each) for level in each.thresholds),
            "–" if best is None else f"{best.bits:.3g}",
            "–" if best is None or best.bits_per_byte is None else f"{best.bits_per_byte:.2g}",
            "–" if best is None or best.state_bytes is None else f"{best.state_bytes:,.0f} B",
        )
    return table


def threshold_text(level: Threshold, of: Capacity) -> str:
    """``23.1 [19.0, 28.2]``; ``≥ 16`` or ``< 4`` where all seeds lie beyond what was tested, ``≥ 11`` where some do."""
    if level.pairs is None:
        return "–"
    if level.n_below == level.n:
        return f"< {of.points[0].n_pairs}"
    if level.n_above == level.n:
        return f"≥ {of.points[-1].n_pairs}"
    text = f"{level.pairs:.1f}"
    if level.n_below:
        text = f"≤ {text}" if not level.n_above else f"~ {text}"
    elif level.n_above:
        text = f"≥ {text}"
    return text if level.low is None else f"{text} \\[{level.low:.1f}, {level.high:.1f}]"


def tuning_table(tuned: Iterable[Tuning]) -> Table:
    """Best setting of each arm-cell, and the range that stays within 5 % of its value."""
    table = plain_table("Tuning: best setting on select, and the range within 5 % of its value")
    for heading in ("cell", "arm"):
        table.add_column(heading, overflow="fold")
    for heading in ("trials", "best", "setting", "within 5 %", "factor"):
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for each in sorted(tuned, key=lambda tuning: list({t.cell: 0 for t in tuned}).index(tuning.cell)):
        tried = each.n_planned - each.ended.get("missing", 0)
        lost = sum(n for outcome, n in each.ended.items() if outcome not in ("finished", "missing"))
        for i, found in enumerate(each.sensitivity or (None,)):
            ratio = found.ratio if found else None
            span, factor, chosen = "–", "–", _settings(each.chosen)
            if found is not None:
                edge = {"high": " ▲", "low": " ▼"}.get(found.edge if found.n_values >= FEWEST_FOR_WIDTH else "", "")
                chosen = f"{found.setting.rpartition('.')[2]}={found.best:.3g}" + edge
                if found.low is not None and found.high is not None and ratio is not None:
                    span = f"{found.low:.2g}–{found.high:.2g}"
                    factor = ("≥ " if found.open_low or found.open_high else "") + f"{ratio:.1f}"
            table.add_row(
                escape(each.cell) if each.cell != last else "",
                escape(each.arm) if i == 0 else "",
                (f"{tried}/{each.n_planned}" + (f" ({lost} lost)" if lost else "")) if i == 0 else "",
                ("–" if each.best is None else f"{each.best:.3g}") if i == 0 else "",
                escape(chosen),
                span,
                factor,
            )
            last = each.cell
    return table


def _settings(settings: dict[str, object]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in settings.items()) or "–"
