"""`motet verify`: is what is served what the adapter's dense float32 merge computes?

Must not know: how anything is computed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from motet.adapters.spec import Declared, LossyForm
from motet.server.commands import options
from motet.server.commands.terminal import console, stages
from motet.server.config import ServeConfig

if TYPE_CHECKING:
    from motet.server.commands.comparison import Comparison

GOLDEN_TOLERANCE = 1.0
"""Nats, written unless --tolerance is given. Measured on the default model with an example adapter, over 300 positions:
serving in bfloat16 moves a log-probability by up to 0.40, the adapter itself by up to 13."""


@click.command()
@click.argument("source", metavar="NAME_OR_FOLDER")
@click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="A prompt to compare on; repeatable.")
@click.option(
    "--prompts",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='JSON Lines of prompts: "text", {"prompt": "text"} or {"tokens": [1, 2]}.',
)
@click.option("--tolerance", type=click.FloatRange(min=0), help="Nats; a larger difference ends with exit status 1.")
@click.option(
    "--write-golden",
    "golden_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the merge's log-probabilities to this golden.json; for a FOLDER only.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="What to serve a FOLDER in.",
)
@options.gate
@options.declarations(Path)
@options.model
@options.url
@options.as_json
def verify(
    source: str,
    texts: tuple[str, ...],
    file: Path | None,
    tolerance: float | None,
    golden_file: Path | None,
    dtype: str,
    gate: tuple[float, ...] | None,
    initial: Path | None,
    residual: Path | None,
    trained_on_base: bool,
    approximate: LossyForm | None,
    model: str | None,
    url: str,
    as_json: bool,
) -> None:
    """Compare served log-probabilities with those of a dense float32 merge.

    A NAME is verified as the server at --url serves it; --model must be that server's base model. The adapter in a
    FOLDER is served in this process.
    """
    from motet.server.commands import comparison

    declared, report = Declared(initial, residual, trained_on_base, approximate), stages(as_json)
    if Path(source).is_dir():
        config = ServeConfig(model=model, dtype=dtype)
        compared = comparison.of_folder(config, Path(source), declared, gate, texts, file, report)
    else:
        options.require_nothing_declared(source, declared)
        if golden_file is not None:
            raise click.UsageError(f"--write-golden needs the adapter's folder, and {source!r} is none here")
        compared = comparison.of_name(url, source, model, gate, texts, file, report)
    if golden_file is not None:
        comparison.write_golden(compared, golden_file, GOLDEN_TOLERANCE if tolerance is None else tolerance)
    if as_json:
        click.echo(json.dumps(_body(compared)))
    else:
        _print(compared)
    if tolerance is not None and not compared.adapter <= tolerance:
        raise click.ClickException(
            f"the served log-probabilities are up to {compared.adapter:.4g} nats from the dense float32 merge, more "
            f"than --tolerance {tolerance:g}; compare with the base model's {compared.base:.4g} to tell rounding from "
            "a wrong adapter"
        )


def _body(compared: Comparison) -> dict[str, Any]:
    return {
        "adapter": compared.version,
        "base": compared.base_name,
        "fingerprint": compared.fingerprint,
        "dtype": compared.dtype,
        "gate": compared.gate,
        "max_difference": {"adapter": compared.adapter, "base": compared.base},
        "prompts": [
            {"tokens": len(prompt.tokens), "adapter": prompt.adapter, "base": prompt.base}
            for prompt in compared.prompts
        ],
    }


def _print(compared: Comparison) -> None:
    table = Table("prompt", "tokens", "max |Δlogprob|", "of the base", box=None, pad_edge=False)
    for index, prompt in enumerate(compared.prompts):
        table.add_row(str(index), str(len(prompt.tokens)), f"{prompt.adapter:.2e}", f"{prompt.base:.2e}")
    tokens = sum(len(prompt.tokens) for prompt in compared.prompts)
    table.add_row("all", str(tokens), f"{compared.adapter:.2e}", f"{compared.base:.2e}")
    console.print(f"{compared.version} in {compared.dtype}, in nats from the dense float32 merge", markup=False)
    console.print(table)
