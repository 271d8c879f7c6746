"""``mixlab doctor``: the findings as a page, or as JSON."""

from __future__ import annotations

import json
from typing import Any

import click

from mixers.cli import json_option, load_plugins, plugin_option

GIB = 2**30
# Packages whose versions decide what runs; the others are listed by --json.
SHOWN_PACKAGES = ("python", "torch", "triton", "flash-linear-attention", "flash-attn", "mlflow", "optuna")


@click.command()
@json_option
@click.option("--runs", "runs_dir", metavar="DIR", help="Where records would live; default $MIXLAB_RUNS or ./runs.")
@plugin_option
def doctor(as_json: bool, runs_dir: str | None, plugins: tuple[str, ...]) -> None:
    """What this machine can run, what each mixer runs as, and what to install. Creates nothing.

    Exits with 1 when something required is broken.
    """
    from experiments.doctor import diagnose
    from experiments.paths import runs_root

    load_plugins(plugins)
    findings = diagnose(runs_root(runs_dir))
    if as_json:
        click.echo(json.dumps(findings, indent=1))
    else:
        _print_findings(findings)
    if findings["broken"]:
        raise SystemExit(1)


def _print_findings(findings: dict[str, Any]) -> None:
    machine, store = findings["machine"], findings["store"]
    versions = findings["versions"]
    click.echo(", ".join(f"{name} {versions.get(name) or '-'}" for name in SHOWN_PACKAGES))
    memory = "unknown" if machine["free_memory_bytes"] is None else _gib(machine["free_memory_bytes"])
    click.echo(f"cores {machine['n_cores']}, free memory {memory}, free disk {_gib(machine['free_disk_bytes'])}")
    for device in findings["devices"]:
        click.echo(f"device {device['name']}{_gpu(device)}")
    if len(findings["devices"]) == 1:
        click.echo("no CUDA device: everything runs on the CPU")
    if store and not store["error"]:
        click.echo(f"store {store['uri']}: {store['status']}")
    if findings["mixers"]:
        _print_mixers(findings)
    for item in findings["missing"]:
        gain = "to gain speed" if item["useful_here"] else "of use with an NVIDIA GPU only"
        click.echo(f"missing {' and '.join(item['packages'])} ({item['serves']}), {gain}:\n  {item['command']}")
    for line in findings["broken"]:
        click.echo(f"BROKEN {line}")
    if not findings["broken"]:
        click.echo("nothing required is broken")


def _print_mixers(findings: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    devices = [device["name"] for device in findings["devices"]]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold underline")
    for column in ("mixer", *(f"runs on {device} as" for device in devices)):
        table.add_column(column, overflow="fold")
    for mixer in findings["mixers"]:
        if mixer["error"] is None:
            table.add_row(mixer["name"], *(mixer["impl"].get(device) or "-" for device in devices))
    Console().print(table)


def _gpu(device: dict[str, Any]) -> str:
    if "gpu" not in device:
        return ""
    free = (
        f", {_gib(device['free_memory_bytes'])} of {_gib(device['memory_bytes'])} free" if not device["error"] else ""
    )
    return f": {device['gpu']}{free}"


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.1f} GiB"
