"""The benchmark of all mixers on a terminal: one table per group as it finishes, within 100 columns."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.bench.case import OK
from experiments.bench.table import duration

Row = dict[str, Any]
UNKNOWN = "-"
GROWING = {
    "prefill_seconds": "prefill time", "decode_seconds": "decode time", "state_bytes": "state", "peak_bytes": "peak",
}  # fmt: skip


def print_group(console: Console, kind: str, rows: list[Row]) -> None:
    if not rows:
        return
    {"layers": _print_layers, "points": _print_points, "kernels": _print_kernels}[kind](console, rows)


def _table(title: str, *columns: str) -> Table:
    """An empty table; its title is printed apart, as a table's own is folded to the table's width."""
    table = Table(caption=title, box=None, padding=(0, 1, 0, 0), header_style="bold underline")
    table.add_column("mixer", overflow="fold", max_width=26)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _print_layers(console: Console, rows: list[Row]) -> None:
    n_tokens = next((row["flops_at_tokens"] for row in rows if "flops_at_tokens" in row), 0)
    title = f"Sizes; FLOPs per token by formula, mean over {n_tokens:,} tokens, and as counted over them together"
    table = _table(
        title, "runs as", "params", "active\n/token", "slow\nweights", "FLOPs\n/token", "counted", "training", "x fwd"
    )
    for row in rows:
        if row["status"] != OK:
            table.add_row(escape(row["label"]), f"[yellow]{row['status']}[/]", *[UNKNOWN] * 7)
            continue
        table.add_row(
            escape(row["label"]),
            row["impl"],
            count(row["params"]),
            count(row["active_params_per_token"]),
            n_bytes(row["slow_weight_bytes"]),
            count(row["flops_per_token"]),
            count(row["counted_flops_per_token"]),
            count(row["counted_train_flops_per_token"]),
            number(row["train_over_forward"]),
        )
    _print(console, table, rows)


def _print_points(console: Console, rows: list[Row]) -> None:
    first = rows[0]
    titles = {
        "prefill": f"Prefill of {first['tokens']:,} tokens, one sequence",
        "decode": f"One token after {first['tokens']:,}, one sequence",
        "train": f"Training, forward and backward of {first['batch']} x {first['tokens']:,} tokens",
    }
    has_energy = any(row["joules_per_token"] is not None for row in rows)
    is_decode = first["scene"] == "decode"
    table = _table(
        titles[first["scene"]],
        "time", "fastest..slowest (n)", "tokens/s", "state" if is_decode else "peak MB",
        *(["mJ/token"] if has_energy else []),
    )  # fmt: skip
    for row in rows:
        if row["status"] != OK:
            table.add_row(escape(row["label"]), f"[yellow]{row['status']}[/]", *[UNKNOWN] * (3 + has_energy))
            continue
        joules = row["joules_per_token"]
        table.add_row(
            escape(row["label"]),
            duration(row["seconds"]),
            f"{duration(row['seconds_min'])}..{duration(row['seconds_max'])} ({row['n_repeats']})",
            f"{row['tokens_per_s']:,.0f}",
            n_bytes(row["state_bytes"]) if is_decode else megabytes(row["peak_bytes"]),
            *([number(None if joules is None else 1e3 * joules)] if has_energy else []),
        )
    _print(console, table, rows)


def _print_kernels(console: Console, rows: list[Row]) -> None:
    first = rows[0]
    table = _table(
        f"Next to the kernel that it calls, {first['batch']} x {first['tokens']:,} tokens; goal: at most 3 % over it",
        "pass", "kernel", "calls", "kernel\ntime", "ours\naround it", "over it", "95 %", "goal", "kernel/\nlayer",
    )  # fmt: skip
    words = {True: "[green]met[/]", False: "[bold red]missed[/]", None: "unclear"}
    for row in rows:
        kind = "train" if row["backward"] else "prefill"
        if row["status"] != OK:
            table.add_row(escape(row["label"]), kind, f"[yellow]{row['status']}[/]", *[UNKNOWN] * 7)
            continue
        known = row["overhead"] is not None
        table.add_row(
            escape(row["label"]),
            kind,
            row["kernel"].replace("scaled_dot_product_attention", "SDPA"),
            str(row["n_kernel_calls"]),
            duration(row["kernel_seconds"]),
            duration(row["operation_seconds"]) if known else UNKNOWN,
            f"{100 * row['overhead']:+.1f} %" if known else UNKNOWN,
            f"{100 * row['overhead_low']:+.1f}..{100 * row['overhead_high']:+.1f}" if known else UNKNOWN,
            words[row["met"]] if known else UNKNOWN,
            f"{100 * row['kernel_share']:.0f} %",
        )
    _print(console, table, rows)


def print_growth(console: Console, layers: list[Row], growths: list[Row]) -> None:
    """Exponents over T with their intervals, and the state's parts."""
    if not growths:
        return
    found = {(row["label"], row["cost"]): row for row in growths}
    table = _table("Growth: cost ~ T^a over the lengths measured, a with its 95 % interval", *GROWING.values())
    for column in ("fixed", "growing\n/token", "shared\nby batch"):
        table.add_column(f"state,\n{column}" if column == "fixed" else column, justify="right", no_wrap=True)
    for layer in layers:
        if layer["status"] != OK:
            continue
        parts = ("state_bytes_fixed", "state_bytes_per_token", "state_bytes_shared")
        table.add_row(
            escape(layer["label"]),
            *(_exponent(found.get((layer["label"], cost))) for cost in GROWING),
            *(n_bytes(layer.get(part)) for part in parts),
        )
    _print_table(console, table)
    console.print()


def _exponent(row: Row | None) -> str:
    if row is None:
        return UNKNOWN
    if row["low"] is None:
        return f"{row['exponent']:.2f}"
    return f"{row['exponent']:.2f} ±{row['high'] - row['exponent']:.2f}"


def _print_table(console: Console, table: Table) -> None:
    title, table.caption = table.caption, None
    console.print(title, style="italic", highlight=False)
    console.print(table)


def _print(console: Console, table: Table, rows: list[Row]) -> None:
    _print_table(console, table)
    for note in dict.fromkeys(f"{row['label']}: {row['note']}" for row in rows if row.get("note")):
        console.print(f"  {escape(note)}", style="dim")
    console.print()


def print_machine(console: Console, machine: Row, energy: str) -> None:
    device = machine.get("gpu") or machine["cpu"]
    load = ", ".join(f"{value:.2f}" for value in machine["load_average"])
    console.print(
        f"{escape(device)}, {machine['n_threads']} threads of {machine['n_cpus']} cores, "
        f"torch {machine['versions']['torch']}, load {load}; energy {escape(energy)}\n"
    )


def megabytes(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value / 1e6:,.1f}"


def number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3g}"


def count(value: float | None) -> str:
    return UNKNOWN if value is None else _scaled(value, 1000, ("", "k", "M", "G", "T"))


def n_bytes(value: float | None) -> str:
    return UNKNOWN if value is None else _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{value:.3g}{units[power]}"
