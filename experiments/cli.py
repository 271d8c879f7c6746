"""``mixlab train`` and ``evaluate``; ``bench`` and ``doctor`` have files of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from experiments.bench_cli import bench
from experiments.doctor_cli import doctor
from mixers.cli import json_option, load_plugins, plugin_option

if TYPE_CHECKING:
    from experiments.config import ExperimentConfig
    from experiments.progress import Progress
    from experiments.records import RunIdentity, RunOutcome


def runs_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--runs", "runs_dir", metavar="DIR", help="Where records and the store live; default $MIXLAB_RUNS or ./runs."
    )(command)


def store_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Sets ``MLFLOW_TRACKING_URI``, which the processes of workers inherit."""

    def take(context: click.Context, option: click.Parameter, uri: str | None) -> None:
        if uri is not None:
            os.environ["MLFLOW_TRACKING_URI"] = uri

    return click.option(
        "--store",
        metavar="URL",
        callback=take,
        expose_value=False,
        help="Tracking store: sqlite:///FILE, postgresql://..., http://HOST:PORT; default $MLFLOW_TRACKING_URI or "
        "RUNS/mlflow.db.",
    )(command)


@click.command()
@click.argument("experiment")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@json_option
@click.option("--no-tracking", is_flag=True, help="Write the record only, nothing to MLflow.")
@runs_option
@store_option
@plugin_option
def train(
    experiment: str,
    overrides: tuple[str, ...],
    as_json: bool,
    no_tracking: bool,
    runs_dir: str | None,
    plugins: tuple[str, ...],
) -> None:
    """Train one EXPERIMENT (a TOML file or the name of a shipped recipe), once. Run again, it resumes."""
    from experiments.paths import runs_root

    load_plugins(plugins)
    config, name = _experiment(experiment, overrides)
    runs = runs_root(runs_dir)
    identity = _identity(config, name)
    outcome = _train(config, identity, runs, tracked=not no_tracking, quiet=as_json)
    if as_json:
        from dataclasses import asdict

        from experiments.records import finite

        click.echo(json.dumps(finite({"key": identity.key, **asdict(outcome)}), indent=1))
    else:
        _print_outcome(outcome, runs / name / identity.key)
    if outcome.outcome != "finished":
        raise SystemExit(130 if outcome.outcome == "killed" else 1)


@click.command()
@click.argument("run", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@json_option
@plugin_option
def evaluate(run: str, overrides: tuple[str, ...], as_json: bool, plugins: tuple[str, ...]) -> None:
    """Evaluate the checkpoint of RUN (its folder) on select and report.

    Overrides may change the data and the state protocol, for example task.seq_len=256 or state.reads=2; the model
    stays as it was trained. The run needs train.keep_checkpoint=true.
    """
    from experiments.config import ExperimentConfig, merged
    from experiments.errors import UserError
    from experiments.records import read_run
    from experiments.reevaluate import evaluate_checkpoint
    from mixers.config import parse_overrides

    load_plugins(plugins)
    record = read_run(Path(run))
    if record is None:
        raise UserError(f"{run}: not the folder of a run (no run.json and config.json)")
    changes = parse_overrides(overrides)
    for key in changes:
        if key.partition(".")[0] not in ("task", "state", "train", "seeds"):
            raise UserError(f"{key}: evaluation may change task, state, train and seeds, not the trained model")
    trained = ExperimentConfig.parse(record.config, run)
    config = ExperimentConfig.parse(merged(record.config, changes), run)
    metrics = evaluate_checkpoint(trained, config, record.folder)
    if as_json:
        click.echo(json.dumps(metrics, indent=1))
        return
    _print_metrics(metrics)


def _experiment(experiment: str, overrides: tuple[str, ...]) -> tuple[ExperimentConfig, str]:
    """The validated config, and the name that its record is filed under."""
    from experiments.config import ExperimentConfig, merged, read_toml
    from experiments.recipe import recipe_path
    from mixers.config import parse_overrides

    path = recipe_path(experiment)
    values = merged(read_toml(path), parse_overrides(overrides))
    return ExperimentConfig.parse(values, str(path)), path.stem


def _identity(config: ExperimentConfig, name: str) -> RunIdentity:
    from experiments.pattern import parse_pattern
    from experiments.records import RunIdentity

    pattern = str(parse_pattern(config.model.pattern))
    return RunIdentity(config.key(), name, pattern, "all", {}, "replicate", config.seed, pattern)


def _train(config: ExperimentConfig, identity: RunIdentity, runs: Path, *, tracked: bool, quiet: bool) -> RunOutcome:
    import signal

    from experiments.backbone import validate_model
    from experiments.paths import artifact_root, tracking_uri
    from experiments.progress import Interrupted
    from experiments.run import TrackingTarget, run_experiment
    from experiments.tracking import StoreOutOfReach, ensure_experiment, prepare_store
    from experiments.tracking.unsynced import way_to_catch_up

    validate_model(config)
    target = None
    if tracked:
        uri = tracking_uri(runs)
        try:
            prepare_store(uri, artifact_root(runs))
            target = TrackingTarget(uri, ensure_experiment(uri, identity.sweep, artifact_root(runs), {}))
        except StoreOutOfReach as error:
            click.echo(f"mixlab: {way_to_catch_up(str(error), identity.sweep)}", err=True)

    asked_to_stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: asked_to_stop.append(received))
    bar = _ProgressBar(quiet)

    def on_progress(progress: Progress) -> None:
        if asked_to_stop:
            raise Interrupted
        bar.show(progress)

    with bar:
        return run_experiment(config, identity, runs, tracking=target, on_progress=on_progress)


# The first of these that a task reports is shown while it trains.
SHOWN_METRICS = ("select/bits_per_byte", "select/accuracy", "select/loss")


class _ProgressBar:
    """A rich bar on a terminal, a line per tenth of the way elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.quiet = quiet
        self.console = Console(stderr=True)
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=None, metrics="")
        self.tenth = -1

    def __enter__(self) -> None:
        self.bar.start()

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, progress: Progress) -> None:
        # Two numbers fit beside the bar on 80 columns.
        best_known = next((name for name in SHOWN_METRICS if name in progress.metrics), None)
        shown = [name for name in ("train/loss", best_known) if name in progress.metrics]
        metrics = "  ".join(f"{name} {progress.metrics[name]:.4g}" for name in shown)
        self.bar.update(
            self.task,
            total=progress.n_steps,
            completed=progress.step,
            metrics=metrics,
            description=progress.note or "training",
        )
        tenth = 10 * progress.step // max(progress.n_steps, 1)
        if self.bar.disable and not self.quiet and tenth > self.tenth:
            self.console.print(f"step {progress.step}/{progress.n_steps}  {metrics}")
        self.tenth = max(self.tenth, tenth)


def _print_outcome(outcome: RunOutcome, folder: Path) -> None:
    reason = f": {outcome.reason}" if outcome.reason else ""
    click.echo(f"{outcome.outcome}{reason}, {outcome.step} steps, {outcome.wall_s:.1f} s, record in {folder}")
    _print_metrics({**outcome.metrics, **{f"cost/{name}": value for name, value in outcome.cost.items()}})


def _print_metrics(metrics: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not metrics:
        return
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in sorted(metrics.items()):
        table.add_row(name, "not finite" if value is None else f"{value:,.6g}")
    Console().print(table)


commands = [train, evaluate, bench, doctor]
