"""The command line: `motet serve`, `motet adapters …`, `motet version`. Composition root of the server.

Must not know: how anything works; it reads options, calls, and prints. `serve`'s options are generated from
ServeConfig.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import sys
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from motet.server.config import OptionError, ServeConfig

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

DEFAULT_URL = "http://127.0.0.1:8000"


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


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Motet serves many adapters of one resident base model in one batch."""


@cli.command()
@serve_options
def serve(**options: Any) -> None:
    """Serve the base model and its adapters over HTTP."""
    from motet.server import serve as serving

    config = ServeConfig(**options)
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    assembled = serving.assemble(config, _stage)
    serving.run(config, assembled, lambda: _summary(config, assembled))


def _stage(text: str) -> None:
    console.print(f"[dim]·[/dim] {escape(text)}")


def _summary(config: ServeConfig, assembled: Any) -> None:
    loaded, registry = assembled.loaded, assembled.registry
    names = [info.version.name for info in registry.published()]
    address = f"http://{config.host}:{config.port}"
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in (
        ("model", f"{loaded.name}  {len(loaded.base.targets)} targets, {loaded.parameter_bytes / 2**20:,.0f} MiB"),
        ("dtype", str(loaded.dtype).removeprefix("torch.")),
        ("device", str(loaded.device)),
        ("KV blocks", f"{assembled.blocks:,} of {config.block_size} positions"),
        ("adapters", ", ".join(names) or "none"),
        ("address", address),
    ):
        table.add_row(f"[dim]{key}[/dim]", value)
    console.print(table)
    console.print("[bold green]ready[/bold green]  try:")
    body = json.dumps(
        {"model": names[0] if names else loaded.name, "messages": [{"role": "user", "content": "Hello!"}]}
    )
    command = f"curl {address}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"
    console.print(command, soft_wrap=True, markup=False)


@cli.group()
def adapters() -> None:
    """List, load, unload and inspect adapters."""


def _server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(command)
    return click.option("--url", default=DEFAULT_URL, show_default=True, envvar="MOTET_URL", help="The server.")(
        command
    )


def _call(method: str, url: str, path: str, key_variable: str, body: dict[str, Any] | None = None) -> httpx.Response:
    """Call the server; its errors become ours."""
    key = os.environ.get(key_variable, "").strip() or os.environ.get("MOTET_ADMIN_KEY", "").strip()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = httpx.request(method, url.rstrip("/") + path, headers=headers, json=body, timeout=600)
    except httpx.HTTPError as error:
        raise click.ClickException(f"no answer from {url}: {error}; is the server running, is --url right?") from error
    if response.is_error:
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = response.text
        raise click.ClickException(f"{response.status_code}: {message}")
    return response


@adapters.command(name="list")
@_server_options
def list_adapters(url: str, as_json: bool) -> None:
    """List the adapters a server has loaded."""
    models = _call("GET", url, "/v1/models", "MOTET_API_KEY").json()["data"]
    rows = [model for model in models if model["parent"] is not None]
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = Table("adapter", "method", "rank", "MiB", "version", box=None, pad_edge=False)
    for row in rows:
        adapter = row["adapter"]
        size = f"{adapter['bytes'] / 2**20:.1f}"
        table.add_row(row["id"], adapter["method"], str(adapter["rank"]), size, adapter["version"][:12])
    console.print(table)


@adapters.command()
@click.argument("name")
@click.argument("path")
@click.option("--replace", is_flag=True, help="Move a loaded name to the new version; running requests finish first.")
@_server_options
def load(name: str, path: str, replace: bool, url: str, as_json: bool) -> None:
    """Load the adapter at PATH (below one of the server's adapter roots) as NAME."""
    body = {"lora_name": name, "lora_path": path, "load_inplace": replace}
    _call("POST", url, "/v1/load_lora_adapter", "MOTET_ADMIN_KEY", body)
    model = _call("GET", url, f"/v1/models/{name}", "MOTET_API_KEY").json()
    click.echo(json.dumps(model) if as_json else f"loaded {name} ({model['adapter']['version'][:12]})")


@adapters.command()
@click.argument("name")
@_server_options
def unload(name: str, url: str, as_json: bool) -> None:
    """Unload the adapter NAME; requests that use it finish."""
    _call("POST", url, "/v1/unload_lora_adapter", "MOTET_ADMIN_KEY", {"lora_name": name})
    click.echo(json.dumps({"unloaded": name}) if as_json else f"unloaded {name}")


@adapters.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", default=None, envvar="MOTET_MODEL", help="The base model; by default the default model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def inspect(folder: Path, model: str | None, as_json: bool) -> None:
    """Print the load receipt of the adapter in FOLDER, without a server."""
    from motet.server import serve as serving

    quiet: Callable[[str], None] = (lambda _: None) if as_json else _stage
    facts = serving.inspect(ServeConfig(model=model, dtype="auto", device="cpu"), folder, quiet)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(facts)))
        return
    norms = sorted(facts.relative_norms.items(), key=lambda item: item[1])
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in (
        ("method", facts.method),
        ("form", facts.form),
        ("ranks", str(facts.ranks[0]) if facts.ranks[0] == facts.ranks[1] else f"{facts.ranks[0]} to {facts.ranks[1]}"),
        ("targets", f"{facts.targets_matched} of {facts.targets_expected} expected"),
        ("scaling", facts.scaling),
        ("bytes", f"{facts.resident_bytes:,}"),
        ("result", "exact" if facts.exact else "approximate"),
        ("digest", facts.digest),
    ):
        table.add_row(f"[dim]{key}[/dim]", value)
    console.print(table)
    norm_table = Table("target", "‖ΔW‖/‖W‖", box=None, pad_edge=False)
    for name, norm in norms:
        norm_table.add_row(name, f"{norm:.4f}")
    console.print(norm_table)


@cli.command()
def version() -> None:
    """Print the version."""
    click.echo(importlib.metadata.version("motet"))


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
