"""`motet convert`: makes files that training leaves as pickles loadable, once, offline.

Must not know: formats. The server itself never reads a pickle.
"""

from __future__ import annotations

from pathlib import Path

import click

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def convert() -> None:
    """Convert what training left as a pickle; only tensors are read from it."""


@convert.command(name="corda-cache")
@click.argument("cache", type=FILE)
@click.argument("adapter", type=FOLDER)
@click.argument("out", type=click.Path(path_type=Path))
def corda_cache(cache: Path, adapter: Path, out: Path) -> None:
    """Write OUT: the CorDA folder ADAPTER with its start from CACHE, CorDA's file of singular values."""
    from motet.adapters.convert import corda_cache as write

    write(cache, adapter, out)
    click.echo(f"wrote {out}")
