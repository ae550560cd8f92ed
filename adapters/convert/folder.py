"""A folder that appears whole or not at all: what every conversion writes its result into.

Must not know: what is converted.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from motet.adapters.errors import AdapterExistsError


def require_new(out_folder: Path) -> None:
    """Refuse to write over something, before any work is done.

    Raises:
        AdapterExistsError: the folder is there already.
    """
    if out_folder.exists():
        raise AdapterExistsError(f"folder {out_folder.name!r} is there already; name another one")


@contextmanager
def new_folder(out_folder: Path) -> Iterator[Path]:
    """An empty folder beside the place; moved there when the block ends, removed when it raises."""
    out_folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_folder.parent) as scratch:
        made = Path(scratch) / out_folder.name
        made.mkdir()
        yield made
        os.rename(made, out_folder)
