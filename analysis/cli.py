"""`mixlab compare` and `mixlab dashboard`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from analysis.bench_cli import plot_bench, read_bench
from experiments.cli import runs_option
from experiments.errors import UserError, nearest
from experiments.paths import runs_root, tracking_uri


@click.command()
@click.argument("sweep")
@click.option("--x", default="cost/state_bytes", show_default=True, help="Cost (or metric) against which to compare.")
@click.option("--y", default=None, help="Metric to compare.  [default: the sweep's report metric]")
@click.option("--baseline", metavar="ARM", default=None, help="Arm to compare each other with.  [default: all pairs]")
@click.option("--json", "as_json", is_flag=True, help="Print a list, one object per arm and cell, and nothing else.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a report that works by itself.")
@click.option("--figures", type=click.Path(path_type=Path), metavar="DIR", help="Write all figures: PDF, SVG, PNG.")
@click.option("--png", type=click.Path(path_type=Path), help="Write the figure of metric against cost.")
@click.option("--csv", type=click.Path(path_type=Path), help="Write one line per run, as it was measured.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the tables as Markdown.")
@click.option("--latex", type=click.Path(path_type=Path), help="Write the tables as LaTeX (booktabs).")
@click.option("--bench", type=click.Path(path_type=Path), metavar="FILE", help="Costs over T: `mixlab bench --json`.")
@runs_option
@click.option("--all-metrics", is_flag=True, help="Also list every report and select metric.")
def compare(
    sweep: str,
    x: str,
    y: str | None,
    baseline: str | None,
    as_json: bool,
    html: Path | None,
    figures: Path | None,
    png: Path | None,
    csv: Path | None,
    markdown: Path | None,
    latex: Path | None,
    bench: Path | None,
    runs_dir: str | None,
    all_metrics: bool,
) -> None:
    """Compare the arms of SWEEP (a name, or the path of a sweep file): metric, cost and Pareto front.

    Means over seeds with 95 % Student-t intervals, paired differences, capacity and tuning; runs that diverged, failed
    or are missing are counted and shown. docs/statistics.md says what each number means.
    """
    from rich.console import Console

    from analysis import comparison
    from analysis.findings import findings, json_lines
    from analysis.findings_table import print_findings
    from analysis.notes import arm_notes, held_equal
    from analysis.runs import replicates, rows_from_records
    from analysis.table import print_comparison, print_notes

    runs = runs_root(runs_dir)
    saved, rows = rows_from_records(runs, sweep_name(sweep))
    y = y or saved.metric["report"]
    lines = comparison.compare(saved, rows, x, y)
    comparison.check_axis("--x", x, saved, lines)
    comparison.check_axis("--y", y, saved, lines)
    if baseline is not None and baseline not in saved.arms:
        raise UserError(f"--baseline {baseline!r}: sweep {saved.name!r} has no such arm{nearest(baseline, saved.arms)}")
    found = findings(saved, rows, lines, x=x, y=y, baseline=baseline)
    chance = comparison.chance_accuracy(rows)
    said: list[str] = []
    if html is not None or figures is not None or png is not None:
        from analysis.figures.data import FigureData
        from analysis.history import memory_use

        history = memory_use(runs, saved.name, replicates(rows)) if html is not None or figures is not None else []
        drawn = FigureData(
            saved, lines, found, chance, history, None if bench is None else read_bench(bench, "--bench")
        )
    if html is not None:
        from analysis.page import report_page
        from analysis.payload import payload
        from analysis.runs import environments

        values = payload(saved, rows, lines, found, environment=environments(runs, saved.name, rows), history=history)
        said += _write(html, "--html", report_page(values).encode())
    if figures is not None:
        from analysis.figures import write_figures

        with _writing(figures, "--figures"):
            for each in write_figures(figures, drawn):
                said += [f"wrote {path}" for path in each.paths]
                said += [f"no figure {each.name}: {each.why_not}"] if each.why_not else []
    if png is not None:
        from analysis.figures import figure_files

        said += _write(png, "--png", figure_files("quality_cost", drawn, ("png",))[0])
    if csv is not None:
        from analysis.export import runs_csv

        said += _write(csv, "--csv", runs_csv(saved, rows).encode())
    if markdown is not None or latex is not None:
        from analysis.export import latex_text, markdown_text, report_tables

        tables = report_tables(saved, lines, found)
        said += _write(markdown, "--markdown", markdown_text(saved, rows, tables, found).encode()) if markdown else []
        said += _write(latex, "--latex", latex_text(tables).encode()) if latex else []
    if as_json:
        click.echo(json.dumps(json_lines(lines, found), indent=1, allow_nan=False))
    else:
        console = Console()
        print_comparison(console, saved, lines, x=x, y=y, all_metrics=all_metrics, chance=chance)
        print_findings(console, saved, lines, found)
        print_notes(console, [held_equal(saved, replicates(rows), lines), *arm_notes(saved, rows)])
    for text in said:
        click.echo(text, err=True)


def sweep_name(sweep: str) -> str:
    """``sweep`` itself, or the ``name`` in the sweep file that it is the path of."""
    if not sweep.endswith(".toml"):
        return sweep
    from experiments.config import read_toml

    name = read_toml(Path(sweep)).get("name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{sweep}: name: required, but not given")
    return name


def _write(path: Path, option: str, content: bytes) -> list[str]:
    with _writing(path, option):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return [f"wrote {path}"]


@contextmanager
def _writing(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{option} {path}: can't be written: {error.strerror}") from None


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535), help="Port to listen on.")
@runs_option
@click.option("--store", default=None, help="Tracking store.  [default: $MLFLOW_TRACKING_URI or RUNS/mlflow.db]")
@click.option("--static-prefix", default="", help="Path under which a proxy serves this, for example /mixlab.")
@click.option("--auth", is_flag=True, help="Ask for a login; users see what they may read. See docs/team-server.md.")
@click.option(
    "--auth-store", default="", envvar="MIXLAB_AUTH_STORE", help="Database of users and roles.  [default: RUNS/auth.db]"
)
@click.option("--allowed-hosts", default="", help="Names by which browsers may call this, separated by commas.")
@click.option(
    "--artifacts", default="", help="URI of the files of runs, for example s3://...  [default: RUNS/artifacts]"
)
@click.option("--allow-public", is_flag=True, help="Without a login, listen where others can reach it.")
def dashboard(
    host: str,
    port: int,
    runs_dir: str | None,
    store: str | None,
    static_prefix: str,
    auth: bool,
    auth_store: str,
    allowed_hosts: str,
    artifacts: str,
    allow_public: bool,
) -> None:
    """Serve MLflow's pages with ours beside them (/sweeps, /compare, /mixers) until Ctrl-C."""
    from analysis.dashboard.login import Login
    from analysis.dashboard.server import serve

    root = runs_root(runs_dir)
    serve(
        store=store or tracking_uri(root),
        runs=root,
        host=host,
        port=port,
        static_prefix=static_prefix,
        allow_public=allow_public,
        allowed_hosts=allowed_hosts,
        artifacts=artifacts,
        login=Login(auth_store or f"sqlite:///{root.resolve() / 'auth.db'}") if auth else None,
        say=click.echo,
    )


commands = [compare, dashboard, plot_bench]
