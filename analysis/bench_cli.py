"""``mixlab plot-bench``: the figure of a benchmark's file, without a sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from experiments.errors import UserError

SCHEMA = 1


@click.command("plot-bench")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("figures"), show_default=True, help="Folder to write into."
)
def plot_bench(file: Path, out: Path) -> None:
    """Draw cost against T from FILE, which `mixlab bench --json FILE` wrote: PDF, SVG and PNG.

    What has no place in the figure, as no state on a log axis or a case out of memory, is said.
    """
    import matplotlib

    from analysis.figures.cost_growth import measured_growth
    from analysis.figures.data import DoesNotApply
    from analysis.figures.style import FORMATS, RC, rendered

    bench = read_bench(file, "plot-bench")
    try:
        with matplotlib.rc_context(RC):
            figure = measured_growth(bench)
            files = {out / f"bench.{kind}": rendered(figure, kind) for kind in FORMATS}
    except DoesNotApply as reason:
        raise UserError(f"plot-bench: {file}: {reason}") from None
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            path.write_bytes(content)
            click.echo(f"wrote {path}", err=True)
    except OSError as error:
        raise UserError(f"plot-bench: --out {out}: can't be written: {error.strerror}") from None
    for line in left_out(bench):
        click.echo(line, err=True)


def read_bench(path: Path, place: str) -> dict[str, Any]:
    """What `mixlab bench --json FILE` wrote. Raises UserError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{place} {path}: can't be read: {error.strerror}") from None
    except ValueError:
        values = None
    if not isinstance(values, dict) or values.get("benchmark") != "mixers" or values.get("schema") != SCHEMA:
        raise UserError(f"{place} {path}: not a benchmark of mixers: write one with `mixlab bench --json FILE`")
    return values


def left_out(bench: dict[str, Any]) -> list[str]:
    """What the figure does not show, one line for each reason."""
    stateless = {row["label"] for row in bench["rows"] if row["scene"] == "decode" and row["state_bytes"] == 0}
    found = [f"no state: {', '.join(sorted(stateless))}"] if stateless else []
    for row in bench["rows"]:
        if row["status"] != "measured":
            found.append(f"not drawn: {row['label']}, {row['scene']} {row['tokens']}: {row['status']}")
    return found
