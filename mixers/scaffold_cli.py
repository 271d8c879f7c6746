"""``mixlab new``: a first version of a mixer, and the next commands to type."""

from __future__ import annotations

import shlex
from pathlib import Path

import click


@click.command("new")
@click.argument("name")
@click.option("--dir", "folder", default=".", metavar="DIR", help="Where to write; default: here.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
def new(name: str, folder: str, force: bool) -> None:
    """Write NAME.py, a small complete mixer to change, and test_NAME.py, which passes at once."""
    from mixers.scaffold import scaffold

    mixer, test = (shlex.quote(str(path)) for path in scaffold(name, Path(folder), force=force))
    click.echo(f"wrote {mixer} and {test}; next:")
    click.echo(f"  python -m pytest {test}")
    click.echo(f"  mixlab check {name} --plugin {mixer}")
    click.echo(f"  mixlab train mqar model.pattern={name} --plugin {mixer}")
