"""`mixlab compare` and `mixlab dashboard`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from analysis.bench_cli import plot_bench
from experiments.cli import runs_option
from experiments.errors import UserError, nearest
from experiments.paths import runs_root, tracking_uri


@click.command()
@click.argument("sweep")
@click.option("--x", default="cost/state_bytes", show_default=True, help="Cost (or metric) against which to compare.")
@click.option("--y", default=None, help="Metric to compare.  [default: the sweep's report metric]")
@click.option("--json", "as_json", is_flag=True, help="Print a list, one object per arm and cell, and nothing else.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page that works by itself.")
@click.option("--png", type=click.Path(path_type=Path), help="Write a figure for a paper.")
@click.option("--baseline", metavar="ARM", default=None, help="Arm to compare each other with.  [default: all pairs]")
@runs_option
@click.option("--all-metrics", is_flag=True, help="Also list every report and select metric.")
def compare(
    sweep: str,
    x: str,
    y: str | None,
    as_json: bool,
    html: Path | None,
    png: Path | None,
    baseline: str | None,
    runs_dir: str | None,
    all_metrics: bool,
) -> None:
    """Compare the arms of SWEEP (a name, or the path of a sweep file): metric, cost and Pareto front.

    Means over seeds with 95 % Student-t intervals; runs that diverged, failed or are missing are counted and shown.
    """
    from rich.console import Console

    from analysis import comparison
    from analysis.findings import findings, json_lines
    from analysis.findings_table import print_findings
    from analysis.notes import arm_notes, held_equal
    from analysis.runs import replicates, rows_from_records
    from analysis.table import print_comparison, print_notes

    saved, rows = rows_from_records(runs_root(runs_dir), sweep_name(sweep))
    y = y or saved.metric["report"]
    lines = comparison.compare(saved, rows, x, y)
    comparison.check_axis("--x", x, saved, lines)
    comparison.check_axis("--y", y, saved, lines)
    if baseline is not None and baseline not in saved.arms:
        raise UserError(f"--baseline {baseline!r}: sweep {saved.name!r} has no such arm{nearest(baseline, saved.arms)}")
    found = findings(saved, rows, lines, x=x, y=y, baseline=baseline)
    if html is not None:
        from analysis.page import report_page
        from analysis.payload import payload

        values = payload(saved, rows, lines, found)
        _write(html, "--html", report_page(values).encode())
    if png is not None:
        from analysis.figures import comparison_png

        chance = comparison.chance_accuracy(rows)
        _write(png, "--png", comparison_png(saved, lines, x=x, y=y, chance=chance))
    if as_json:
        click.echo(json.dumps(json_lines(lines, found), indent=1, allow_nan=False))
    else:
        console = Console()
        chance = comparison.chance_accuracy(rows)
        print_comparison(console, saved, lines, x=x, y=y, all_metrics=all_metrics, chance=chance)
        print_findings(console, saved, lines, found)
        print_notes(console, [held_equal(saved, replicates(rows), lines), *arm_notes(saved, rows)])
    for path in (html, png):
        if path is not None:
            click.echo(f"wrote {path}", err=True)


def sweep_name(sweep: str) -> str:
    """``sweep`` itself, or the ``name`` in the sweep file that it is the path of."""
    if not sweep.endswith(".toml"):
        return sweep
    from experiments.config import read_toml

    name = read_toml(Path(sweep)).get("name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{sweep}: name: required, but not given")
    return name


def _write(path: Path, option: str, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
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
