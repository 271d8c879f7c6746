"""``mixlab mixers``: what is registered. ``mixlab check``: what keeps the contract."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mixers.errors import UserError
from mixers.scaffold_cli import new

if TYPE_CHECKING:
    import torch

REFERENCE_WIDTH = 64
REFERENCE_TOKENS = 512
CHECK_WIDTH = 16
ROW_KEYS = (
    "name", "family", "default_slot", "causal", "state_scope", "state_growth", "devices", "impl", "params",
    "state_bytes", "reference", "source", "module", "problem",
)  # fmt: skip
# What goes into a file or a pipe is never cut to a narrow terminal.
PIPE_WIDTH = 100
STATUS_STYLES = {"passed": "green", "failed": "bold red", "stale_excuse": "bold red", "excused": "yellow"}


def plugin_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--plugin", "plugins", multiple=True, metavar="FILE", help="Python file that registers mixers; repeatable."
    )(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")(command)


def load_plugins(plugins: tuple[str, ...]) -> dict[str, str]:
    """Run the files that the user named, if any: mixer -> its file."""
    if not plugins:
        return {}
    from mixers import registry

    return {name: plugin for plugin in plugins for name in registry.load_plugin(plugin)}


@click.command("mixers")
@json_option
@plugin_option
@click.option("--fla", "of_fla", is_flag=True, help="List the layers of flash-linear-attention instead: fla:NAME.")
def mixers_command(as_json: bool, plugins: tuple[str, ...], of_fla: bool) -> None:
    """List the registered mixers: family, slot, state, devices, parameters, source.

    What can't be imported or built is listed as broken, and its reason printed to stderr.
    """
    from mixers import fla_layers, registry
    from mixers.contract.runner import raised

    from_plugin = load_plugins(plugins)
    if of_fla:
        list_fla_layers(as_json)
        return
    problems = {name: f"entry point {name!r} was left out: {why}" for name, why in registry.problems().items()}
    rows = []
    for name in registry.names():
        try:
            rows.append(describe(name))
        except Exception as error:  # noqa: BLE001  a stranger's mixer may raise anything; the others are listed
            why = str(error) if isinstance(error, UserError) else raised(error)
            problem = f"mixer {name!r} can't be built and run with its default options: {' '.join(why.split())}"
            if name in from_plugin:
                raise UserError(f"--plugin {from_plugin[name]}: {problem}") from None
            problems[name] = problem
    rows += [{**dict.fromkeys(ROW_KEYS), "name": name, "problem": why} for name, why in problems.items()]
    rows.sort(key=lambda row: row["name"])
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        _print_table(rows)
        if n_layers := len(fla_layers.layer_names()):
            click.echo(f"and {n_layers} layers of flash-linear-attention, on CUDA: mixlab mixers --fla")
    for problem in problems.values():
        click.echo(f"mixlab: {problem}", err=True)


def list_fla_layers(as_json: bool) -> None:
    """The layers that flash-linear-attention brings, as mixers; an error where it isn't installed."""
    from mixers import fla_layers
    from mixers.implementations import FLA_INSTALL

    rows = [fla_layers.describe_layer(name) for name in fla_layers.layer_names()]
    if not rows:
        raise UserError(f"mixers: --fla: needs the package flash-linear-attention, not installed here; {FLA_INSTALL}")
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Layers of flash-linear-attention, on CUDA only; state bytes: measured on a GPU; FLOPs: unknown",
        box=None,
        padding=(0, 1, 0, 0),
        header_style="bold underline",
    )
    for column in ("mixer", "state", "continues", "needs", "note"):
        table.add_column(column, overflow="fold")
    for row in rows:
        growth = row["state_growth"].replace("window_size", "linear, or window")
        continues = fla_layers.CONTINUES[row["continues"]]
        table.add_row(row["name"], growth, continues, ", ".join(row["needs"]), row["note"])
    Console().print(table)


def describe(name: str) -> dict[str, Any]:
    """One mixer as JSON values; parameters and state are measured on its default options at a reference size."""
    import torch

    from mixers import registry

    cls = registry.get(name)
    mixer = registry.build(name, {"d_model": REFERENCE_WIDTH})
    with torch.no_grad():
        tokens = torch.zeros(1, REFERENCE_TOKENS, REFERENCE_WIDTH)
        state = mixer.eval()(tokens, return_state=True).state
    return {
        "name": name,
        "family": cls.family,
        "default_slot": cls.default_slot,
        "causal": cls.traits.causal,
        "state_scope": mixer.state_scope,
        "state_growth": mixer.state_growth,
        "devices": list(cls.traits.devices),
        "impl": mixer.impl,
        "params": sum(parameter.numel() for parameter in mixer.parameters()),
        "state_bytes": mixer.full_state_bytes(state),
        "reference": {"d_model": REFERENCE_WIDTH, "n_tokens": REFERENCE_TOKENS},
        "source": cls.source,
        "module": cls.__module__,
        "problem": None,
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"Mixers, default options, d_model={REFERENCE_WIDTH}; state after {REFERENCE_TOKENS} tokens",
        box=None,
        padding=(0, 1, 0, 0),
        header_style="bold underline",
    )
    table.add_column("mixer", no_wrap=True)
    table.add_column("family")
    for column in ("slot", "state", "devices", "runs as"):
        table.add_column(column, no_wrap=True)
    for column in ("params", "state\nbytes"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("arXiv", overflow="fold")
    for row in rows:
        if row["problem"]:
            table.add_row(row["name"], "[bold red]broken[/]", *["-"] * 7)
            continue
        shared = ", shared" if row["state_scope"] == "shared" else ""
        table.add_row(
            row["name"],
            row["family"],
            row["default_slot"],
            row["state_growth"] + shared,
            " ".join(row["devices"]),
            row["impl"],
            f"{row['params']:,}",
            f"{row['state_bytes']:,}",
            row["source"].rpartition("arXiv:")[2],
        )
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    console.print(table)


@click.command("check")
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--all", "check_all", is_flag=True, help="Every registered mixer.")
@click.option("-o", "--option", "options", multiple=True, metavar="KEY=VALUE", help="An option of them; repeatable.")
@click.option("--device", default="cpu", show_default=True, help="Where they run: cpu or cuda.")
@click.option(
    "--dtype",
    type=click.Choice(["float64", "float32", "bfloat16"]),
    default="float64",
    show_default=True,
    help="What they compute in; most kernels don't have float64.",
)
@click.option("--seed", default=0, show_default=True, help="Of weights and inputs.")
@json_option
@plugin_option
@click.pass_context
def check_command(
    context: click.Context,
    names: tuple[str, ...],
    check_all: bool,
    options: tuple[str, ...],
    device: str,
    dtype: str,
    seed: int,
    as_json: bool,
    plugins: tuple[str, ...],
) -> None:
    """Run the contract suite on mixers, with d_model=16 and their other options' defaults unless given.

    Exits with 1 when a check fails.
    """
    import torch

    from mixers import contract, registry
    from mixers.config import parse_overrides

    load_plugins(plugins)
    if bool(names) == check_all:
        raise UserError("check: name one or more mixers, or give --all")
    place = contract.require_device(device)
    names = tuple(registry.names()) if check_all else tuple(dict.fromkeys(names))
    classes = {name: registry.get(name) for name in names}
    fitting = {name: cls for name, cls in classes.items() if place.type in cls.traits.devices}
    for name in sorted(set(classes) - set(fitting)):
        why = f"mixer {name!r} runs on {', '.join(classes[name].traits.devices)} only, and the suite on {place.type}"
        if not check_all:
            raise UserError(f"check: {why}; leave it out, or give --device")
        click.echo(f"mixlab: check: {why}: left out", err=True)
    given = {"d_model": CHECK_WIDTH, **parse_overrides(options)}
    working = {name: _resolved(name, given, place, getattr(torch, dtype)) for name in fitting}
    rows = []
    for name, cls in fitting.items():
        report = contract.check_mixer(
            lambda name=name: registry.build(name, given),
            excuses=contract.declared_excuses(cls),
            seed=seed,
            device=place,
            dtype=getattr(torch, dtype),
        )
        checks = [vars(result) for result in report.results]
        row = {"name": name, "ok": report.ok, "impl": working[name], "device": str(place), "dtype": dtype}
        rows.append({**row, "d_model": given["d_model"], "options": given, "seed": seed, "checks": checks})
        if not as_json:
            _print_checks(rows[-1], with_passed=len(fitting) == 1)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    if not all(row["ok"] for row in rows):
        context.exit(1)


def _resolved(name: str, options: dict[str, Any], device: torch.device, dtype: torch.dtype) -> str:
    """The implementation that the suite will meet; a bad option, or one that can't run so, is said before it runs."""
    from mixers import registry

    try:
        return registry.build(name, options).to(device, dtype).impl
    except UserError:
        raise
    except Exception:  # noqa: BLE001  a stranger's mixer may raise anything: the suite reports it as a finding
        return "unknown"


def _print_checks(row: dict[str, Any], with_passed: bool) -> None:
    """One mixer's checks; of many mixers, only those that say something."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    checks = row["checks"]
    n_passed = sum(check["status"] == "passed" for check in checks)
    seconds = sum(check["seconds"] for check in checks)
    verdict = "keeps the contract" if row["ok"] else "breaks the contract"
    table = Table(box=None, padding=(0, 1, 0, 2), show_header=False)
    table.add_column("check", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("message", overflow="fold")
    for check in checks:
        if with_passed or check["status"] != "passed":
            style = STATUS_STYLES.get(check["status"], "dim")
            status = f"[{style}]{check['status'].replace('_', ' ')}[/]"
            table.add_row(check["name"], status, escape(check["message"].removeprefix(f"{check['name']}: ")))
    console = Console()
    console.print(
        f"[bold]{row['name']}[/] {verdict}: {n_passed} of {len(checks)} checks passed in {seconds:.1f} s "
        f"({row['impl']}, {row['device']}, {row['dtype']})"
    )
    if table.row_count:
        console.print(table)


commands = [mixers_command, check_command, new]
