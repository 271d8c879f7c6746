"""``mixlab sweep plan | run | status | cancel | retry``."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

import click

from experiments.cli import runs_option, store_option
from mixers.cli import json_option, load_plugins, plugin_option
from sweeps.sync_cli import sync

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from sweeps.definition import SweepConfig
    from sweeps.plan import Plan
    from sweeps.status import SweepStatus

SORTS = ("begun", "arm", "cell", "best", "mean")  # as in sweeps.live, which imports rich
OVERRIDES = "Overrides are keys of the sweep file: seeds=[0,1], budget.max_steps=50, base.train.batch_size=16."


@click.group()
def sweep() -> None:
    """Compare arms over varied settings: one file, many runs, safe to stop and start again."""


@sweep.command("plan", epilog=OVERRIDES)
@click.argument("sweep_file", metavar="SWEEP")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@json_option
@plugin_option
def plan_command(sweep_file: str, overrides: tuple[str, ...], as_json: bool, plugins: tuple[str, ...]) -> None:
    """Check SWEEP (a TOML file or a shipped name) and print what it would run. Creates nothing."""
    from sweeps.plan import plan

    load_plugins(plugins)
    planned = plan(_load(sweep_file, overrides))
    if as_json:
        click.echo(json.dumps(_plan_json(planned), indent=1))
    else:
        _print_plan(planned)


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """What a sweep file doesn't say: where and how its runs are executed and shown."""
    options = (
        click.argument("sweep_file", metavar="SWEEP"),
        click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]..."),
        click.option(
            "--workers", "n_workers", type=int, metavar="N", help="Runs at a time; default: what cores or GPUs hold."
        ),
        click.option(
            "--threads", type=int, metavar="N", help="CPU threads of each run; default: the sweep file's `threads`, 1."
        ),
        click.option("--gpus", metavar="0,1", help="GPUs to deal runs out to; default: all that are visible."),
        click.option("--per-gpu", type=int, metavar="K", help="Runs at a time on each GPU; default: 1."),
        click.option("--ray", metavar="auto|ADDRESS", help="Run on a Ray cluster; auto: the one here, else start one."),
        click.option(
            "--stall-after",
            "stall_s",
            type=float,
            default=1800.0,
            show_default=True,
            metavar="SECONDS",
            help="End a worker whose run reports nothing for so long, and try the run once more; 0: never.",
        ),
        click.option("--no-tracking", is_flag=True, help="Write the records only, nothing to MLflow."),
        click.option(
            "--sort", type=click.Choice(SORTS), default=SORTS[0], help="The live table's order; the key s: next."
        ),
        click.option("--quiet", is_flag=True, help="Print nothing but errors."),
        click.option("--json", "as_json", is_flag=True, help="Print every event as one JSON line."),
        runs_option,
        store_option,
        plugin_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


@sweep.command("run", epilog=OVERRIDES)
@run_options
def run_command(sweep_file: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Run what is missing of SWEEP (a TOML file or a shipped name). Started again, it continues.

    Exits with 0 when every run has its result, 1 when some failed, 130 after Ctrl-C.
    """
    _run(sweep_file, overrides, **options)


@sweep.command("retry", epilog=OVERRIDES)
@run_options
@click.option("--failed", is_flag=True, help="Run those that failed again; a checkpoint they have is used.")
def retry_command(sweep_file: str, overrides: tuple[str, ...], failed: bool, **options: Any) -> None:
    """Run SWEEP as `mixlab sweep run` does, and runs that stand as failures once more.

    What has diverged or was pruned stays: the same training would end the same.
    """
    if not failed:
        raise click.UsageError("say which runs: --failed")
    _run(sweep_file, overrides, retry_failed=True, **options)


def _run(
    sweep_file: str,
    overrides: tuple[str, ...],
    *,
    threads: int | None,
    gpus: str | None,
    no_tracking: bool,
    sort: str,
    quiet: bool,
    as_json: bool,
    runs_dir: str | None,
    plugins: tuple[str, ...],
    **options: Any,
) -> None:
    from experiments.paths import runs_root
    from sweeps.driver import run_sweep
    from sweeps.live import view_for

    result = run_sweep(
        _load(sweep_file, overrides if threads is None else (*overrides, f"threads={threads}")),
        runs_root(runs_dir),
        view_for(as_json=as_json, quiet=quiet, sort=sort),
        gpus=None if gpus is None else tuple(name.strip() for name in gpus.split(",")),
        plugins=plugins,
        tracked=not no_tracking,
        **options,
    )
    if result.interrupted:  # all is saved: one more Ctrl-C must not change how this process ends
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise SystemExit(result.exit_code)


@sweep.command("status")
@click.argument("sweep_file", metavar="SWEEP")
@json_option
@runs_option
def status_command(sweep_file: str, as_json: bool, runs_dir: str | None) -> None:
    """Show where SWEEP (a name, or its TOML file) stands, from its records."""
    from experiments.paths import runs_root
    from sweeps.status import saved_name, sweep_status

    runs = runs_root(runs_dir)
    status = sweep_status(runs, saved_name(runs, sweep_file))
    if as_json:
        click.echo(json.dumps(status.to_json(), indent=1))
    else:
        _print_status(status)


@sweep.command("cancel")
@click.argument("sweep_file", metavar="SWEEP")
@click.option("--wait", type=float, default=15.0, show_default=True, metavar="SECONDS", help="How long to wait for it.")
@runs_option
def cancel_command(sweep_file: str, wait: float, runs_dir: str | None) -> None:
    """End the running SWEEP (a name, or its TOML file) as Ctrl-C does: trainings save their state.

    `mixlab sweep run` goes on with it later.
    """
    from experiments.paths import runs_root
    from sweeps.cancel import cancel
    from sweeps.status import saved_name

    runs = runs_root(runs_dir)
    name = saved_name(runs, sweep_file)
    process = cancel(runs, name, wait)
    click.echo(f"sweep {name}: process {process} has ended; mixlab sweep run goes on with it")


@sweep.command("bench")
@click.argument("parts", nargs=-1, metavar="[PART]...")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Of `workers`.")
@click.option("--workers", type=int, metavar="N", help="Compared with one; on CUDA on one GPU. [default: 2; CUDA: 8]")
@click.option("--steps", type=int, metavar="N", help="Of a training. [default: 350, 100 in the sweep; CUDA: 2000]")
@click.option("--repeats", type=int, default=1, show_default=True, help="Of both sweeps of `workers`, in turn.")
@click.option("--trials", type=int, default=1000, show_default=True, help="Of `engine`, `tracked`; a tenth for `ray`.")
@click.option("--planned", type=int, default=10_000, show_default=True, help="Runs of `plan`.")
@json_option
def bench_command(
    parts: tuple[str, ...],
    device: str,
    workers: int | None,
    steps: int | None,
    repeats: int,
    trials: int,
    planned: int,
    as_json: bool,
) -> None:
    """Measure what sweeping itself costs here: PARTs plan, engine, tracked, ray, logging, workers.

    By default all but tracked and ray, which take minutes; with --device cuda, `workers` alone.
    Exits with 1 when a goal is missed.
    """
    from sweeps.bench import PARTS, SLOW_PARTS, Size, measure

    is_cuda = device == "cuda"
    parts = parts or (("workers",) if is_cuda else tuple(part for part in PARTS if part not in SLOW_PARTS))
    for part in parts:
        if part not in PARTS:
            raise click.UsageError(f"no part {part!r}; there are {', '.join(PARTS)}")
    size = Size(
        n_planned=planned,
        n_trials=trials,
        n_ray_trials=max(100, trials // 10),
        n_steps=steps or (2000 if is_cuda else 350),
        repeats=repeats,
        n_sweep_steps=steps or 100,
        many=workers or (8 if is_cuda else 2),
        device=device,
    )
    rows = []
    for row in measure(parts, size, lambda text: click.echo(text, err=True)):
        rows.append(row)
        if not as_json:
            verdict = "" if row.ok is None else "reached" if row.ok else "MISSED"
            click.echo(f"{row.part:8} {row.what:70} {row.value:10.4g} {row.unit:4} {row.goal:26} {verdict}".rstrip())
    if as_json:
        from dataclasses import asdict

        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
    raise SystemExit(1 if any(row.ok is False for row in rows) else 0)


def _load(sweep_file: str, overrides: tuple[str, ...]) -> SweepConfig:
    from mixers.config import parse_overrides
    from sweeps.definition import load_sweep

    return load_sweep(sweep_file, parse_overrides(overrides))


def _plan_json(planned: Plan) -> dict[str, Any]:
    sweep_config = planned.sweep
    return {
        "sweep": sweep_config.name,
        "question": sweep_config.question,
        "count": planned.count(),
        "n_runs": planned.n_runs,
        "budget": sweep_config.budget.model_dump(exclude_none=True),
        "metric": sweep_config.metric.model_dump(),
        "seeds": list(sweep_config.seeds),
        "match": planned.match_json(),
        "search": sweep_config.search.model_dump(),
        "arm_cells": [
            {
                "arm": arm_cell.arm,
                "cell": arm_cell.cell,
                "pattern": arm_cell.pattern,
                "factors": arm_cell.factors,
                "n_tuning": arm_cell.n_trials,
                "n_seeds": len(sweep_config.seeds),
                "trial_settings": list(arm_cell.trial_settings),
            }
            for arm_cell in planned.arm_cells
        ],
    }


def _print_plan(planned: Plan) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    sweep_config = planned.sweep
    limits = sweep_config.budget.model_dump(exclude_none=True, exclude={"tune_trials"})
    console = Console()
    console.print(Text(f"{sweep_config.name}: {sweep_config.question}", style="bold"))
    console.print(Text(planned.count()))
    console.print(Text("budget of every run: " + ", ".join(f"{name} = {n:,}" for name, n in limits.items())))
    for path, space in sweep_config.tune.items():
        tried = list(dict.fromkeys(settings[path] for settings in planned.arm_cells[0].trial_settings))
        known = tried or list(space.choice or space.ends())
        values = [f"{value:g}" if isinstance(value, float) else str(value) for value in known]
        spread = ", ".join(values) if tried or space.choice else " to ".join(values)
        console.print(Text(f"tuned: {path} in {spread}, chosen on {sweep_config.metric.select}"))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("arm", "pattern", "cells"):
        table.add_column(heading)
    for arm, pattern in planned.patterns.items():
        table.add_row(Text(arm), Text(pattern), Text("; ".join(planned.cells)))
    console.print(table)
    if sweep_config.match is not None:
        _print_match(console, planned)


def _print_match(console: Console, planned: Plan) -> None:
    from rich.table import Table
    from rich.text import Text

    match = planned.sweep.match
    words = f"held equal: {match.quantity} of the {match.of}, within {match.tolerance:.3g}"
    console.print(Text(words))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("arm", "cell", "solved"):
        table.add_column(heading)
    for heading in ("target", "reached", "off", "model", "mixers"):
        table.add_column(heading, justify="right", no_wrap=True)
    for arm_cell in planned.arm_cells:
        found = arm_cell.matched
        if found is None:
            table.add_row(Text(arm_cell.arm), Text(arm_cell.cell), Text("not held to it"))
            continue
        solved = f"{found.free}={found.value}" if found.free else "-"
        sizes = (f"{size:,.0f}" for size in (found.model, found.mixers))
        numbers = (f"{found.target:,.0f}", f"{found.reached:,.0f}", f"{100 * found.error:+.1f} %", *sizes)
        table.add_row(*(Text(text) for text in (arm_cell.arm, arm_cell.cell, solved, *numbers)))
    console.print(table)


def _print_status(status: SweepStatus) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sweeps.live import number_text, settings_text

    console = Console()
    console.print(Text(f"{status.name}: {status.question}", style="bold"))
    n_done = status.n_runs - status.n_missing
    running = "a driver is running it" if status.driver_runs else "no driver is running it"
    console.print(Text(f"{n_done} of {status.n_runs} runs have their result; {running}"))
    console.print(Text(f"best {status.select} of the tuning runs, mean {status.report} of the seeds"))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("arm", "cell"):
        table.add_column(heading)
    # Short enough for 80 columns.
    pruned = any(row.n_pruned for row in status.arm_cells)
    ends = ("div.", "fail", *(["prun"] if pruned else []), "miss")
    for heading in ("done", "now", *ends, "best\nselect", "mean\nreport"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("chosen")
    for row in status.arm_cells:
        ended = (row.n_diverged, row.n_failed, *([row.n_pruned] if pruned else []), row.n_missing)
        counts = [str(n or "-") for n in (row.n_running, *ended)]
        numbers = (number_text(row.best_select), number_text(row.mean_report))
        chosen = row.not_run or settings_text(row.settings or {})
        done = f"{row.n_finished}/{row.n_runs}"
        table.add_row(*(Text(text) for text in (row.arm, row.cell, done, *counts, *numbers, chosen)))
    console.print(table)
    for row in status.arm_cells:
        for point in row.front:
            values = ", ".join(f"{name} = {value:.6g}" for name, value in point["values"].items())
            console.print(Text(f"front: {row.arm} | {row.cell} | {values} | {settings_text(point['settings'])}"))
    for failure in status.failures:
        where = f"{failure.arm} | {failure.cell} | {failure.role} seed {failure.seed} | {failure.key}"
        console.print(Text(f"{failure.outcome}: {where}: {failure.reason}"))


commands = [sweep, sync]
