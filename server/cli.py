"""The composition root: `motet serve`, `adapters`, `train`, `convert`, `calibrate`, `export`, `verify`, `version`.

Must not know: how anything works; each command has its own module, and imports what it needs when it runs.
"""

from __future__ import annotations

import importlib.metadata
import sys

import click
from rich.markup import escape

from motet.server.commands.adapters import adapters
from motet.server.commands.calibrate import calibrate
from motet.server.commands.convert import convert
from motet.server.commands.export import export
from motet.server.commands.serving import serve
from motet.server.commands.terminal import errors
from motet.server.commands.training import train
from motet.server.commands.verify import verify
from motet.server.config import OptionError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Motet serves many adapters of one resident base model in one batch."""


@cli.command()
def version() -> None:
    """Print the version."""
    click.echo(importlib.metadata.version("motet"))


for command in (serve, adapters, train, convert, calibrate, export, verify):
    cli.add_command(command)


def main() -> None:
    """Entry point: known errors become one line and exit status 1."""
    try:
        cli(standalone_mode=True)
    except Exception as error:
        from motet.adapters.errors import AdapterError
        from motet.server.model.errors import ModelError

        if not isinstance(error, OptionError | ModelError | AdapterError):
            raise
        errors.print(f"[bold red]error[/bold red]  {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
