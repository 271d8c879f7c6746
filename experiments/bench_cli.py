"""``mixlab bench``: what implementations cost, measured next to each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from experiments.bench.case import IMPLEMENTATIONS, SCENES
from experiments.bench_mixers_cli import STDOUT, bench_mixers, replace

if TYPE_CHECKING:
    from experiments.bench.fwpkm import Report

QUICK = {"n": (64,), "repeats": 3, "width": 128, "chunk": 128, "memory": False}


class _MixersUnlessNamed(click.Group):
    """A group whose command ``mixers`` runs unless the first word is another of its commands, or asks for help."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        if not arguments or arguments[0] not in {*self.commands, *context.help_option_names}:
            arguments = [bench_mixers.name or "", *arguments]
        return super().parse_args(context, arguments)


@click.group(cls=_MixersUnlessNamed, subcommand_metavar="[COMMAND | MIXER...] [OPTIONS]")
def bench() -> None:
    """Measure what mixers cost, next to each other in one run.

    Without a COMMAND it is `mixers`: `mixlab bench softmax kda`, or `mixlab bench` for all. A MIXER that is called
    like a command is named after it: `mixlab bench mixers fwpkm`.
    """


bench.add_command(bench_mixers)


@bench.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--n", type=int, multiple=True, help="Sub-keys per half (n*n slots); repeatable. [default: 128 256 512]")
@click.option("--tokens", type=int, help="T of prefill, train, scopes and layer. [default: by scene and device]")
@click.option("--batch", type=int, help="B of prefill, train and scopes. [default: by scene and device]")
@click.option("--chunk", type=int, help="C. [default: 512]")
@click.option("--width", type=int, help="K and V. [default: 512]")
@click.option("--impl", type=click.Choice(IMPLEMENTATIONS), multiple=True, help="Only these; repeatable.")
@click.option("--scene", type=click.Choice(SCENES), multiple=True, help="Only these; repeatable.")
@click.option("--repeats", type=int, help="Calls of each, interleaved; fewer for slow ones. [default: 5]")
@click.option("--threads", type=int, help="CPU threads. [default: torch's]")
@click.option("--memory/--no-memory", default=None, help="On the CPU: peak memory of a first call.")
@click.option("--model", "model_size", type=click.Choice(["small", "paper"]), help="[default: small; on CUDA: paper]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--quick", is_flag=True, help="Small sizes, no memory: does it run here, and roughly how fast?")
@click.option(
    "--json", "json_to", is_flag=False, flag_value=STDOUT, metavar="[FILE]",
    help="JSON on standard output, or into FILE after every group.",
)  # fmt: skip
def fwpkm(json_to: str | None, quick: bool, **options: Any) -> None:
    """Fast-weight product-key memory: dense, reference, sparse and triton implementations.

    Beside them: the package fast-weight-product-key-memory and `floor`, the distances and row accesses alone. An
    implementation is first compared with the float64 reference; one that differs is not timed, and the command exits
    with 1. Ctrl-C keeps what is finished.
    """
    from experiments.bench import fwpkm as benchmark
    from experiments.bench.goals import goals
    from experiments.bench.table import console_on, print_goals, print_group, print_machine
    from experiments.errors import UserError

    given = {name: value for name, value in options.items() if value not in (None, ())}
    settings = benchmark.Settings(**(QUICK if quick else {}) | given, quick=quick)
    settings.check()
    file = None if json_to in (None, STDOUT) else Path(json_to)
    if file is not None and not file.parent.is_dir():
        raise UserError(f"bench: --json {file}: there is no folder {file.parent}")
    progress, console = console_on(stderr=True), console_on(stderr=json_to == STDOUT)
    report = benchmark.start(settings)
    print_machine(console, report.machine, report.copy_bytes_per_s)

    def say(text: str) -> None:
        progress.print(text, style="dim", markup=False, highlight=False)

    was_interrupted = False
    try:
        for title, rows in benchmark.measure(report, say):
            print_group(console, title, rows)
            if file is not None:
                replace(file, _values(report))
    except KeyboardInterrupt:
        was_interrupted = True
    print_goals(console, goals(report.rows, settings.device))
    if file is not None:
        replace(file, _values(report, was_interrupted))
    elif json_to == STDOUT:
        click.echo(json.dumps(_values(report, was_interrupted), indent=1))
    if was_interrupted:
        raise KeyboardInterrupt
    if any(row["status"] == "wrong" for row in report.rows):
        raise SystemExit(1)


def _values(report: Report, was_interrupted: bool = False) -> dict[str, Any]:
    from dataclasses import asdict

    from experiments.bench.fwpkm import isolation
    from experiments.bench.goals import goals

    return {
        "benchmark": "fwpkm",
        "interrupted": was_interrupted,
        "settings": asdict(report.settings),
        "machine": report.machine,
        "copy_bytes_per_s": report.copy_bytes_per_s,
        "isolation": isolation(report.settings),
        "rows": report.rows,
        "goals": goals(report.rows, report.settings.device),
    }
