"""``mixlab plot-bench``: the figure of a benchmark's file."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("plot-bench")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("figures"), show_default=True, help="Folder to write into."
)
def plot_bench(file: Path, out: Path) -> None:
    """Draw cost against T from FILE, which `mixlab bench --json FILE` wrote: PDF, SVG and PNG."""
    from analysis.bench_figures import read_costs, write_cost_figure

    for path in write_cost_figure(read_costs(file), out):
        click.echo(f"wrote {path}", err=True)
