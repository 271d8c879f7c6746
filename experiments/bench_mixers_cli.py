"""``mixlab bench [MIXER...]``: the cost of every mixer, measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mixers.cli import load_plugins, plugin_option

if TYPE_CHECKING:
    from experiments.bench.mixers import Report

STDOUT = "-"
QUICK = {"d_model": 64, "tokens": (64, 128, 256), "train_tokens": 128, "kernel_tokens": 256, "flop_tokens": 64,
         "repeats": 3, "case_s": 0.2, "memory": False}  # fmt: skip


@click.command("mixers")
@click.argument("mixers", nargs=-1, metavar="[MIXER]...")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("-o", "--option", "options", multiple=True, metavar="KEY=VALUE", help="An option of all; repeatable.")
@click.option("--d-model", type=int, help="D. [default: 256; on CUDA 1024]")
@click.option(
    "--tokens", type=int, multiple=True, help="T of prefill and decoding; repeatable. [default: 512 to 4096; on CUDA "
    "512 to 131072]",
)  # fmt: skip
@click.option("--train-tokens", type=int, help="T of training. [default: 1024; on CUDA 4096]")
@click.option("--train-batch", type=int, help="B of training. [default: 1; on CUDA 4]")
@click.option("--kernel-tokens", type=int, help="T next to the kernels. [default: 2048; on CUDA 16384]")
@click.option(
    "--precision", type=click.Choice(["float32", "bf16"]), help="bf16: autocast. [default: float32; on CUDA bf16]"
)
@click.option("--repeats", type=int, help="Calls of each, interleaved; fewer for slow ones. [default: 5]")
@click.option("--case-s", type=float, help="Seconds after which a case is not repeated. [default: 0.5]")
@click.option("--limit-s", type=float, help="Seconds after which no case is started: what is left is said.")
@click.option("--threads", type=int, help="CPU threads. [default: torch's]")
@click.option("--memory/--no-memory", default=None, help="On the CPU: peak memory, each in a process of its own.")
@click.option("--untuned", is_flag=True, help="On CUDA: Triton kernels as their first fitting configuration.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--quick", is_flag=True, help="Small sizes, no memory: does it run here, and roughly how fast?")
@click.option("--runs", "runs_dir", metavar="DIR", help="Whose trainings wait; default $MIXLAB_RUNS or ./runs.")
@click.option(
    "--json", "json_to", is_flag=False, flag_value=STDOUT, metavar="[FILE]",
    help="JSON on standard output, or into FILE after every group.",
)  # fmt: skip
@plugin_option
def bench_mixers(json_to: str | None, quick: bool, runs_dir: str | None, **options: Any) -> None:
    """What each MIXER costs: state and weights, FLOPs, prefill, decoding, training, memory; next to its kernel.

    MIXER is written as in patterns: softmax, 'softmax(window=64)', fla:gla. None: every registered one that runs on
    the device. Ctrl-C keeps what is finished.
    """
    from experiments.bench import mixers as benchmark
    from experiments.bench.mixers_table import print_group, print_growth, print_machine
    from experiments.bench.table import console_on
    from experiments.errors import UserError
    from experiments.paths import runs_root

    load_plugins(options["plugins"])
    given = {name: value for name, value in options.items() if value not in (None, ())}
    file = None if json_to in (None, STDOUT) else Path(json_to)
    if file is not None and not file.parent.is_dir():
        raise UserError(f"bench: --json {file}: there is no folder {file.parent}")
    report, layers = benchmark.start(benchmark.Settings(**(QUICK if quick else {}) | given, quick=quick))
    progress, console = console_on(stderr=True), console_on(stderr=json_to == STDOUT)
    print_machine(console, report.machine, report.energy)

    def say(text: str) -> None:
        progress.print(text, style="dim", markup=False, highlight=False)

    was_interrupted = False
    try:
        for kind, rows in benchmark.measure(report, layers, say, runs_root(runs_dir)):
            print_group(console, kind, rows)
            if file is not None:
                replace(file, _values(report))
    except KeyboardInterrupt:
        was_interrupted = True
    print_growth(console, report.layers, report.growths())
    if file is not None:
        replace(file, _values(report, was_interrupted))
    elif json_to == STDOUT:
        click.echo(json.dumps(_values(report, was_interrupted), indent=1))
    if was_interrupted:
        raise KeyboardInterrupt


def _values(report: Report, was_interrupted: bool = False) -> dict[str, Any]:
    from dataclasses import asdict

    from experiments.bench.mixers import SCHEMA

    return {
        "benchmark": "mixers",
        "schema": SCHEMA,
        "interrupted": was_interrupted,
        "settings": asdict(report.settings),
        "machine": report.machine,
        "energy": report.energy,
        "layers": report.layers,
        "rows": report.rows,
        "kernels": report.kernels,
        "growth": report.growths(),
    }


def replace(file: Path, values: dict[str, Any]) -> None:
    """Write at once, so that a reader never meets half a file."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(values, indent=1))
    part.replace(file)
