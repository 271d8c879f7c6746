"""The comparison as tables on a terminal: one per cell, arms in plan order."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from analysis.axes import axis, human
from analysis.comparison import DEFAULT_X, Comparison
from analysis.notes import Note
from analysis.stats import Interval
from sweeps.saved import SavedSweep

# cost, heading; a cost chosen as x that is not among them gets a column of its own
_COLUMNS = (
    ("state_bytes", "state"),
    ("state_bytes_fixed", "of it\nfixed"),
    ("state_bytes_per_token", "growth\n/token"),
    ("params", "params"),
    ("flops_per_token", "FLOPs\n/token"),
    ("train_tokens_per_s", "train\ntok/s"),
)


def print_comparison(
    console: Console,
    saved: SavedSweep,
    comparisons: list[Comparison],
    *,
    x: str,
    y: str,
    all_metrics: bool = False,
    chance: float | None = None,
) -> None:
    """Print the question and a table for each cell."""
    if saved.question:
        console.print(escape(saved.question), style="bold", highlight=False)
    for cell in saved.cells:
        here = [line for line in comparisons if line.cell == cell]
        console.print(cell_table(saved, cell, here, x=x, y=y))
        for line in here:
            if line.notes:
                console.print(f"  {line.arm}: {'; '.join(line.notes)}", highlight=False, markup=False)
        if all_metrics:
            console.print(metrics_table(cell, here))
    better = {name: "higher" if axis(name, saved.metric).direction == "maximize" else "lower" for name in (x, y)}
    reference = f"Chance: {chance:.2g}. " if chance is not None and y.endswith("/accuracy") else ""
    console.print(
        f"{reference}● Pareto: {y} ({better[y]} is better) against {x} ({better[x]}). ± 95 % Student-t over n seeds.",
        style="dim",
        highlight=False,
        markup=False,
    )


def print_notes(console: Console, notes: Iterable[Note]) -> None:
    for note in notes:
        console.print(f"{note.title}: {note.text}", style="dim", highlight=False, markup=False)


def cell_table(saved: SavedSweep, cell: str, lines: list[Comparison], *, x: str, y: str) -> Table:
    contexts = {line.cost["state_context_tokens"] for line in lines if "state_context_tokens" in line.cost}
    context = f", state at {contexts.pop():,.0f} tokens" if len(contexts) == 1 else ""
    table = plain_table(cell + context)
    table.add_column("  arm", overflow="fold", min_width=18)
    table.add_column(escape(y.replace("/", "/\n", 1)), justify="right", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    columns = list(_COLUMNS)
    chosen = x.removeprefix("cost/")
    if x.startswith("cost/") and x != DEFAULT_X and chosen not in dict(columns):
        columns.append((chosen, chosen.replace("_", " ")))
    for _, heading in columns:
        table.add_column(escape(heading), justify="right", no_wrap=True)
    metric_as_x = [] if x.startswith("cost/") else [x]
    for name in metric_as_x:
        table.add_column(escape(name), justify="right", no_wrap=True)
    for line in lines:
        table.add_row(
            ("● " if line.pareto else "  ") + escape(line.arm),
            spread(line.metrics.get(y)),
            f"{line.n_seeds}/{line.n_planned}",
            *(_narrow(human(line.cost.get(name), axis(f"cost/{name}", saved.metric).unit)) for name, _ in columns),
            *(spread(line.metrics.get(name)) for name in metric_as_x),
        )
    return table


def _narrow(text: str) -> str:
    """``25.1k`` for ``25.1 k``: nine columns share the 80 of a terminal."""
    return text.replace(" ", "")


def metrics_table(cell: str, lines: list[Comparison]) -> Table:
    """Every report and select metric of a cell: a line per metric and arm, so that any number of arms fits."""
    table = plain_table(f"{cell}: all metrics")
    table.add_column("metric", overflow="fold")
    table.add_column("arm", overflow="fold")
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for name in sorted({name for line in lines for name in line.metrics}):
        for i, line in enumerate(lines):
            found = line.metrics.get(name)
            table.add_row(escape(name) if i == 0 else "", escape(line.arm), spread(found), str(found.n if found else 0))
    return table


def spread(found: Interval | None) -> str:
    """``0.934 ±0.012``; no ± where one seed leaves the spread unknown."""
    if found is None:
        return "–"
    half = None if found.high is None else found.high - found.mean
    if 1e-2 <= max(abs(found.mean), half or 0) < 1e3:
        return f"{found.mean:.3f}" if half is None else f"{found.mean:.3f} ±{half:.3f}"
    return f"{found.mean:.3g}" if half is None else f"{found.mean:.3g} ±{half:.2g}"


def plain_table(title: str) -> Table:
    """Without frame: the numbers need the width."""
    return Table(
        title=escape(title),
        title_justify="left",
        title_style="bold",
        box=None,
        header_style="underline",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
