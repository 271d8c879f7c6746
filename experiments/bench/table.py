"""The benchmark on a terminal: a small table per group as it finishes, and what was to be reached at the end."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

PIPE_WIDTH = 110
COLUMNS = ("time", "spread", "tokens/s", "peak MB", "of bandwidth", "x dense")


def console_on(stderr: bool) -> Console:
    console = Console(stderr=stderr)
    if not console.is_terminal:
        # What goes into a file or a pipe is never cut to a narrow terminal.
        console.width = max(console.width, PIPE_WIDTH)
    return console


def print_group(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    of_model = any(row["scene"] == "model" for row in rows)
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold underline")
    table.add_column("implementation", no_wrap=True)
    table.add_column("memory", no_wrap=True)
    for column in (*COLUMNS[:2], "samples/s" if of_model else COLUMNS[2], *COLUMNS[3:5]):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("x without" if of_model else COLUMNS[5], justify="right", no_wrap=True)
    notes = []
    for row in rows:
        if row["note"]:
            notes.append(f"{row['impl']}: {row['note']}")
        if row["seconds"] is None:
            table.add_row(row["impl"], row["scope"], f"[yellow]{row['status']}[/]", *["-"] * 5)
            continue
        share, rate = row["bandwidth_share"], row["tokens_per_s"] / (row["tokens"] if of_model else 1)
        times = row["times_without"] if of_model else row["times_dense"]
        table.add_row(
            row["impl"],
            row["scope"],
            duration(row["seconds"]),
            f"{duration(row['seconds_min'])}..{duration(row['seconds_max'])} ({row['n_repeats']})",
            f"{rate:,.2f}" if of_model else f"{rate:,.0f}",
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}",
            "-" if share is None else f"{100 * share:.1f} %",
            "-" if times is None else f"{times:.3g}",
        )
    console.print(table)
    for note in dict.fromkeys(notes):
        console.print(f"  {escape(note)}", style="dim")
    console.print()


def duration(seconds: float) -> str:
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def print_goals(console: Console, found: list[dict[str, Any]]) -> None:
    table = Table(title="Goals", title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold underline")
    table.add_column("goal", overflow="fold")
    for column in ("measured", "by fastest calls", "goal", "met"):
        table.add_column(column, justify="right", no_wrap=True)
    words = {True: "[green]yes[/]", False: "[bold red]no[/]"}
    for goal in found:
        measured = goal["measured"]
        unknown = "not measured" if measured is None else "other sizes"
        table.add_row(
            goal["name"],
            *("-" if goal[key] is None else f"{goal[key]:.3g}" for key in ("measured", "of_fastest")),
            goal["goal"],
            words.get(goal["met"], f"[yellow]{unknown}[/]"),
        )
    console.print(table)


def print_machine(console: Console, machine: dict[str, Any], copy_bytes_per_s: float) -> None:
    device = machine.get("gpu") or machine["cpu"]
    load = ", ".join(f"{value:.2f}" for value in machine["load_average"])
    console.print(
        f"{escape(device)}, {machine['n_threads']} threads of {machine['n_cpus']} cores, "
        f"torch {machine['versions']['torch']}, load {load}, copy {copy_bytes_per_s / 1e9:.1f} GB/s\n"
    )
