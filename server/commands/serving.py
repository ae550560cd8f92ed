"""`motet serve`. Its options are generated from ServeConfig.

Must not know: how anything is served.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from motet.server.commands.terminal import console, facts, stage
from motet.server.config import ServeConfig


def _read_toml(context: click.Context, _: click.Parameter, path: str | None) -> None:
    """Make the file's values the defaults of the options they name."""
    if path is None:
        return
    try:
        values = tomllib.loads(Path(path).expanduser().read_text())
    except (OSError, ValueError) as error:  # the latter: no UTF-8, or no TOML
        raise click.BadParameter(f"{path!r} cannot be read: {error}") from error
    known = {field.name for field in dataclasses.fields(ServeConfig)}
    if unknown := values.keys() - known:
        raise click.BadParameter(f"{path!r} has the unknown option {sorted(unknown)[0]!r}; see motet serve --help")
    context.default_map = {**(context.default_map or {}), **values}


def serve_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One click option per field of ServeConfig, also read from MOTET_<FIELD>."""
    hints = typing.get_type_hints(ServeConfig)
    for field in reversed(dataclasses.fields(ServeConfig)):
        hint = hints[field.name]
        bare = typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
        several = typing.get_origin(hint) is tuple
        command = click.option(
            f"--{field.name.replace('_', '-')}",
            type=click.Choice(field.metadata["choices"]) if field.metadata["choices"] else str if several else bare,
            multiple=several,
            default=field.default,
            show_default=field.default not in (None, ()),
            envvar=f"MOTET_{field.name.upper()}",
            help=field.metadata["help"],
        )(command)
    return click.option(
        "--config",
        type=str,
        is_eager=True,
        expose_value=False,
        callback=_read_toml,
        envvar="MOTET_CONFIG",
        help="TOML file with any of these options; the command line and the environment go before it.",
    )(command)


@click.command()
@serve_options
def serve(**options: Any) -> None:
    """Serve the base model and its adapters over HTTP."""
    from motet.server import serve as serving

    config = ServeConfig(**options)
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    assembled = serving.assemble(config, stage)
    serving.run(config, assembled, lambda names: _summary(config, assembled, names))


def _summary(config: ServeConfig, assembled: Any, names: list[str]) -> None:
    loaded = assembled.loaded
    address = f"http://{config.host}:{config.port}"
    rows = (
        ("model", f"{loaded.name}  {len(loaded.base.targets)} targets, {loaded.parameter_bytes / 2**20:,.0f} MiB"),
        ("dtype", assembled.steps.info.dtype + (", linears in int8" if config.base_weights == "int8" else "")),
        ("device", str(loaded.device)),
        assembled.steps.summary,
        ("adapters", ", ".join(names) or "none"),
        ("catalogue", config.catalogue or "in memory: names end with the process; --catalogue FILE keeps them"),
        ("address", address),
    )
    console.print(facts(rows))
    console.print("[bold green]ready[/bold green]  try:")
    path = "chat/completions"
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}]}
    if assembled.steps.info.modality == "image":
        path, asked = "classify", {"input": "data:image/png;base64,…"}
    body = json.dumps({"model": names[0] if names else loaded.name, **asked}, ensure_ascii=False)
    command = f"curl {address}/v1/{path} -H 'content-type: application/json' -d '{body}'"
    console.print(command, soft_wrap=True, markup=False)
