"""Options that several commands share.

Must not know: what the commands do with them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from motet.adapters.errors import ConfigError
from motet.adapters.spec import Declared, LossyForm

DEFAULT_URL = "http://127.0.0.1:8000"

Command = Callable[..., Any]

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
model = click.option(
    "--model", default=None, envvar="MOTET_MODEL", help="The base model; by default the default model."
)


def url(command: Command) -> Command:
    """--url of a running server."""
    return click.option("--url", default=DEFAULT_URL, show_default=True, envvar="MOTET_URL", help="The server.")(
        command
    )


def _form(_: click.Context, __: click.Parameter, text: str | None) -> LossyForm | None:
    try:
        return None if text is None else LossyForm.parse(text)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from error


def _weights(_: click.Context, __: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(weight) for weight in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no list of numbers like 0.5,0.3,0.2") from error


gate = click.option(
    "--gate",
    callback=_weights,
    metavar="WEIGHTS",
    help="The gate of an adapter that has one, fixed: a weight for each factor, like 0.5,0.3,0.2.",
)


def declarations(places: type[Path] | type[str]) -> Callable[[Command], Command]:
    """--initial, --residual, --trained-on-base and --approximate.

    Args:
        places: Path for folders on this machine, str for folders on the server's.
    """
    folder = click.Path(exists=True, file_okay=False, path_type=Path) if places is Path else str

    def add(command: Command) -> Command:
        for option in (
            click.option(
                "--approximate",
                callback=_form,
                metavar="FORM",
                help="Serve replaced weights in a lossy form: svd-R, pairs of rank R, or 1bit, one bit a weight.",
            ),
            click.option(
                "--trained-on-base", is_flag=True, help="The pair is the whole change, whatever it looks like."
            ),
            click.option(
                "--residual", type=folder, metavar="DIR", help="The model it was trained on, where not the base."
            ),
            click.option("--initial", type=folder, metavar="DIR", help="The adapter as it was before training."),
        ):
            command = option(command)
        return command

    return add


def require_nothing_declared(name: str, declared: Declared) -> None:
    """Refuse declarations about an adapter that a server has loaded already, with its own."""
    if declared != Declared():
        raise click.UsageError(
            f"{name!r} is no folder here, so it is asked from the server, which has its declarations; leave out "
            "--initial, --residual, --trained-on-base and --approximate, or give the folder"
        )
