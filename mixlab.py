"""The ``mixlab`` command: mounts each package's sub-commands, nothing else."""

from __future__ import annotations

import os
import sys

import click

import analysis.cli
import experiments.cli
import mixers.cli
import sweeps.cli
from experiments.errors import UserError
from experiments.records import is_full


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mixlab")
def cli() -> None:
    """Compare sequence-mixing layers: what they remember, at what cost."""


for package in (mixers.cli, experiments.cli, sweeps.cli, analysis.cli):
    for command in package.commands:
        cli.add_command(command)


def main() -> None:
    """Run the command line. A user's mistake is one line on stderr and exit code 2; Ctrl-C exits with 130."""
    # Of processes that we start: a folder `experiments` where the user stands must not be taken for ours.
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        status = cli.main(standalone_mode=False)
    except UserError as error:
        click.echo(f"mixlab: {error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("mixlab: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of a pipe, such as head, has left: nothing more to say.
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if not is_full(error):
            raise
        click.echo(f"mixlab: {error}; free some space and start the same command again: it goes on", err=True)
        sys.exit(2)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
