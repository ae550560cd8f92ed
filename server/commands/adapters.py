"""`motet adapters …`: list, load, unload and inspect adapters.

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
from motet.server.commands.client import call
from motet.server.commands.terminal import console, facts, stages
from motet.server.config import ServeConfig


@click.group()
def adapters() -> None:
    """List, load, unload and inspect adapters."""


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
    """Load the adapter at PATH as NAME. All folders are the server's, below one of its adapter roots."""
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
