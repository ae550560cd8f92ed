"""`motet export`: an adapter of any method as a folder that others read.

Must not know: how the folder is written.
"""

from __future__ import annotations

from pathlib import Path

import click

from motet.adapters.spec import Declared, LossyForm
from motet.server.commands import options
from motet.server.commands.client import base_of, lowered_of
from motet.server.commands.terminal import console, stage
from motet.server.config import ServeConfig


@click.command()
@click.argument("source", metavar="NAME_OR_FOLDER")
@click.option(
    "--to",
    "to",
    type=(click.Choice(["peft"]), click.Path(path_type=Path)),
    required=True,
    metavar="peft DIR",
    help="A plain LoRA folder as PEFT saves it, written to DIR.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type of the tensors.",
)
@options.gate
@options.declarations(Path)
@options.model
@options.url
def export(
    source: str,
    to: tuple[str, Path],
    dtype: str,
    gate: tuple[float, ...] | None,
    initial: Path | None,
    residual: Path | None,
    trained_on_base: bool,
    approximate: LossyForm | None,
    model: str | None,
    url: str,
) -> None:
    """Write an adapter as a plain LoRA folder: the one in FOLDER, or the one a server has loaded as NAME."""
    import torch

    from motet.adapters.base import Kind
    from motet.adapters.export import export_peft
    from motet.adapters.gates.fixed import explicit, fixed
    from motet.server import serve as serving

    declared, (_, folder) = Declared(initial, residual, trained_on_base, approximate), to
    if Path(source).is_dir():
        config = ServeConfig(model=model, dtype="auto", device="cpu")
        loaded, lowered, _ = serving.lower_alone(config, Path(source), declared, stage)
        base_name, modules = loaded.name, [*loaded.base.targets, *loaded.base.other_modules]
        target = loaded.base.of_kind(Kind.EMBEDDING)
        embedding = None if target is None else target.name
    else:
        options.require_nothing_declared(source, declared)
        _, lowered = lowered_of(url, source)
        base = base_of(url)
        base_name, modules, embedding = base["name"], [*base["targets"], *base["other_modules"]], base["embedding"]
    export_peft(
        lowered if gate is None else fixed(lowered, explicit(lowered.gate, gate)),
        folder,
        modules,
        embedding=embedding,
        dtype=getattr(torch, dtype),
        base_name=base_name,
        task_type="CAUSAL_LM",
    )
    console.print(f"wrote {folder}", markup=False, soft_wrap=True)
