"""``mixlab sync``: bring MLflow up to date with the records on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from experiments.cli import runs_option, store_option
from mixers.cli import json_option

if TYPE_CHECKING:
    from experiments.tracking import SyncReport


@click.command()
@click.argument("what", required=False, metavar="[SWEEP|FOLDER]")
@json_option
@runs_option
@store_option
def sync(what: str | None, as_json: bool, runs_dir: str | None) -> None:
    """Bring MLflow up to date with the records on disk: of SWEEP, of a FOLDER of runs, or of all.

    Safe at any time: while a sweep runs, twice, or cut off and started again. Runs that were killed are closed.
    """
    from experiments.paths import artifact_root, runs_root, tracking_uri
    from experiments.tracking import prepare_store

    runs, names = _chosen(runs_root(runs_dir), what)
    uri = tracking_uri(runs)
    prepare_store(uri, artifact_root(runs))
    reports = {name: _sync(uri, runs, name, quiet=as_json) for name in names}
    if as_json:
        click.echo(json.dumps({name: vars(report) for name, report in reports.items()}, indent=1))
        return
    for name, report in reports.items():
        click.echo(f"{name}: {_summary(report)}")


def _chosen(runs: Path, what: str | None) -> tuple[Path, list[str]]:
    """The root of the records, and the names of sweeps in it."""
    from experiments.errors import UserError, nearest

    known = _sweeps_in(runs)
    if what is None:
        return runs, known
    if what in known:
        return runs, [what]
    folder = Path(what)
    if found := _sweeps_in(folder):
        return folder, found
    if next(folder.glob("*/run.json"), None) is not None:
        return folder.resolve().parent, [folder.resolve().name]
    raise UserError(f"no records of {what!r} under {runs}{nearest(what, known)}")


def _sweeps_in(runs: Path) -> list[str]:
    return sorted({path.parent.parent.name for path in runs.glob("*/*/run.json")})


def _sync(uri: str, runs: Path, name: str, *, quiet: bool) -> SyncReport:
    from rich.console import Console
    from rich.progress import Progress

    from experiments.paths import artifact_root
    from experiments.tracking import ensure_experiment
    from experiments.tracking import sync as sync_sweep
    from sweeps.mirror import experiment_tags
    from sweeps.saved import read_saved

    tags = {}
    if (runs / name / "sweep.json").exists():
        saved = read_saved(runs, name)
        tags = experiment_tags(saved.question, saved.metric)
    experiment_id = ensure_experiment(uri, name, artifact_root(runs), tags)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        return sync_sweep(
            uri,
            experiment_id,
            runs,
            name,
            on_progress=lambda n_done, n_records: bar.update(task, completed=n_done, total=n_records),
        )


def _summary(report: SyncReport) -> str:
    parts = [
        f"{report.n_created} created",
        f"{report.n_updated} updated",
        f"{report.n_unchanged} already up to date",
    ]
    parts += [f"{report.n_running} still training, left alone"] if report.n_running else []
    parts += [f"{report.n_doubled} doubled, deleted"] if report.n_doubled else []
    return ", ".join(parts)
