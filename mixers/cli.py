"""``mixlab mixers``: what is registered."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from mixers.scaffold_cli import new

REFERENCE_WIDTH = 64
REFERENCE_TOKENS = 512


def plugin_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--plugin", "plugins", multiple=True, metavar="FILE", help="Python file that registers mixers; repeatable."
    )(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")(command)


def load_plugins(plugins: tuple[str, ...]) -> None:
    """Run the files that the user named, if any."""
    if plugins:
        from mixers import registry

        for plugin in plugins:
            registry.load_plugin(plugin)


@click.command("mixers")
@json_option
@plugin_option
def mixers_command(as_json: bool, plugins: tuple[str, ...]) -> None:
    """List the registered mixers: family, slot, state, devices, source."""
    from mixers import registry

    load_plugins(plugins)
    rows = [describe(name) for name in registry.names()]
    problems = registry.problems()
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        _print_table(rows)
    for name, why in problems.items():
        click.echo(f"mixlab: entry point {name!r} was left out: {why}", err=True)


def describe(name: str) -> dict[str, Any]:
    """One mixer as JSON values; parameters and state are measured on its default options at a reference size."""
    import torch

    from mixers import registry
    from mixers.base import state_bytes

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
        "state_bytes": state_bytes(state),
        "reference": {"d_model": REFERENCE_WIDTH, "n_tokens": REFERENCE_TOKENS},
        "source": cls.source,
        "module": cls.__module__,
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
    for column in ("slot", "state", "runs as"):
        table.add_column(column, no_wrap=True)
    for column in ("params", "state\nbytes"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("arXiv", overflow="fold")
    for row in rows:
        shared = ", shared" if row["state_scope"] == "shared" else ""
        table.add_row(
            row["name"],
            row["family"],
            row["default_slot"],
            row["state_growth"] + shared,
            row["impl"],
            f"{row['params']:,}",
            f"{row['state_bytes']:,}",
            row["source"].rpartition("arXiv:")[2],
        )
    Console().print(table)


commands = [mixers_command, new]
