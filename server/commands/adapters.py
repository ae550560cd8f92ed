"""`motet adapters …`: list, publish, roll back, delete and inspect adapters.

Must not know: what adapters are made of.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
from rich.table import Table

from motet.adapters.spec import Declared, LossyForm
from motet.server.commands import options
from motet.server.commands.client import address_of, call
from motet.server.commands.terminal import console, facts, stages
from motet.server.config import ServeConfig

if_match = click.option("--if-match", help="Refuse unless the name is at the version of this digest.")


def _condition(digest: str | None) -> dict[str, str]:
    return {} if digest is None else {"If-Match": f'"{digest}"'}


@click.group()
def adapters() -> None:
    """List, publish, roll back, delete and inspect adapters."""


@adapters.command(name="list")
@options.url
@options.as_json
def list_adapters(url: str, as_json: bool) -> None:
    """List the adapters a server has loaded."""
    models = call("GET", url, "/v1/models", "MOTET_API_KEY").json()["data"]
    rows = [model for model in models if model["parent"] is not None]
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = Table("adapter", "method", "rank", "MiB", "version", "result", box=None, pad_edge=False)
    for row in rows:
        adapter = row["adapter"]
        size = f"{adapter['bytes'] / 2**20:.1f}"
        result = adapter["error"]["summary"] if adapter["error"] else "exact" if adapter["exact"] else "approximate"
        table.add_row(row["id"], adapter["method"], str(adapter["rank"]), size, adapter["version"][:12], result)
    console.print(table)


@adapters.command()
@click.argument("name")
@click.argument("path")
@click.option("--replace", is_flag=True, help="Move a loaded name to the new version; running requests finish first.")
@options.declarations(str)
@options.url
@options.as_json
def load(
    name: str,
    path: str,
    replace: bool,
    initial: str | None,
    residual: str | None,
    trained_on_base: bool,
    approximate: LossyForm | None,
    url: str,
    as_json: bool,
) -> None:
    """Load the adapter at PATH as NAME. PATH is any source that the server allows, or a folder of its own."""
    body = {
        "lora_name": name,
        "lora_path": path,
        "load_inplace": replace,
        "initial_path": initial,
        "residual_path": residual,
        "trained_on_base": trained_on_base,
        "approximate": None if approximate is None else str(approximate),
    }
    call("POST", url, "/v1/load_lora_adapter", "MOTET_ADMIN_KEY", body)
    model = call("GET", url, f"/v1/models/{name}", "MOTET_API_KEY").json()
    error = model["adapter"]["error"]
    said = f"loaded {name} ({model['adapter']['version'][:12]})" + (f", {error['summary']}" if error else "")
    click.echo(json.dumps(model) if as_json else said)


@adapters.command()
@click.argument("name")
@options.url
@options.as_json
def unload(name: str, url: str, as_json: bool) -> None:
    """Unload the adapter NAME; requests that use it finish."""
    call("POST", url, "/v1/unload_lora_adapter", "MOTET_ADMIN_KEY", {"lora_name": name})
    click.echo(json.dumps({"unloaded": name}) if as_json else f"unloaded {name}")


@adapters.command()
@click.argument("name")
@click.argument("source")
@click.option("--new", is_flag=True, help="Refuse where the name is published already.")
@if_match
@click.option("--sha256", help="The digest that the source must have.")
@click.option("--pin/--no-pin", default=None, help="Keep it in memory, or no longer.")
@options.declarations(str)
@options.url
@options.as_json
def publish(
    name: str,
    source: str,
    new: bool,
    if_match: str | None,
    sha256: str | None,
    pin: bool | None,
    initial: str | None,
    residual: str | None,
    trained_on_base: bool,
    approximate: LossyForm | None,
    url: str,
    as_json: bool,
) -> None:
    """Let NAME mean the adapter at SOURCE; requests that run finish on the version before."""
    body = {
        "source": source,
        "sha256": sha256,
        "pin": pin,
        "initial_path": initial,
        "residual_path": residual,
        "trained_on_base": trained_on_base,
        "approximate": None if approximate is None else str(approximate),
    }
    headers = {**_condition(if_match), **({"If-None-Match": "*"} if new else {})}
    card = call("PUT", url, address_of(name), "MOTET_ADMIN_KEY", body, headers).json()
    click.echo(json.dumps(card) if as_json else f"{name} is at version {card['version'][:12]}")


@adapters.command()
@click.argument("name")
@click.option("--to", help="First digits, twelve at least, of a kept version; by default the one before the current.")
@if_match
@options.url
@options.as_json
def rollback(name: str, to: str | None, if_match: str | None, url: str, as_json: bool) -> None:
    """Let NAME mean a version that it meant before."""
    body, headers = {} if to is None else {"version": to}, _condition(if_match)
    card = call("POST", url, f"{address_of(name)}/rollback", "MOTET_ADMIN_KEY", body, headers).json()
    click.echo(json.dumps(card) if as_json else f"{name} is at version {card['version'][:12]}")


@adapters.command()
@click.argument("name")
@if_match
@click.option("--wait", "wait_s", type=float, default=0, help="Seconds to wait for requests that run.")
@options.url
@options.as_json
def delete(name: str, if_match: str | None, wait_s: float, url: str, as_json: bool) -> None:
    """Take NAME away, and its versions; requests that use it finish."""
    path = f"{address_of(name)}?wait_s={wait_s}"
    gone = call("DELETE", url, path, "MOTET_ADMIN_KEY", headers=_condition(if_match)).json()
    running = f"; {gone['leases']} requests still run" if gone["leases"] else ""
    click.echo(json.dumps(gone) if as_json else f"deleted {name} ({gone['version'][:12]}){running}")


@adapters.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@options.declarations(Path)
@options.model
@options.as_json
def inspect(
    folder: Path,
    initial: Path | None,
    residual: Path | None,
    trained_on_base: bool,
    approximate: LossyForm | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Print the load receipt of the adapter in FOLDER, without a server."""
    from motet.server import serve as serving

    config = ServeConfig(model=model, dtype="auto", device="cpu")
    declared = Declared(initial, residual, trained_on_base, approximate)
    _, _, receipt = serving.lower_alone(config, folder, declared, stages(as_json))
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(receipt)))
        return
    low, high = receipt.ranks
    rows = (
        ("method", receipt.method),
        ("form", receipt.form),
        ("ranks", str(low) if low == high else f"{low} to {high}"),
        ("targets", f"{receipt.targets_matched} of {receipt.targets_expected} expected"),
        ("scaling", receipt.scaling),
        *(
            []
            if receipt.gate is None
            else [("gate", f"{len(receipt.gate)} factors; norms at {receipt.gate[0]:.4g} each")]
        ),
        ("bytes", f"{receipt.resident_bytes:,}"),
        ("result", "exact" if receipt.exact else str(receipt.error or "approximate")),
        *([("head", f"{receipt.head}, {receipt.head_bytes:,} bytes")] if receipt.head else []),
        ("digest", receipt.digest),
    )
    console.print(facts(rows))
    norms = sorted(receipt.relative_norms.items(), key=lambda item: item[1])
    missed = receipt.error.change.targets if receipt.error else {}
    norm_table = Table("target", "‖ΔW‖/‖W‖", *(["missed of ΔW"] if missed else []), box=None, pad_edge=False)
    for name, norm in norms:
        norm_table.add_row(name, f"{norm:.4f}", *([f"{missed[name]:.1%}"] if name in missed else []))
    console.print(norm_table)
