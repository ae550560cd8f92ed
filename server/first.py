"""What is served from the start: what the catalogue has, and what the options name.

Must not know: the base model's parts, the engine, HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from motet.adapters.base import BaseModel
from motet.adapters.catalogue import Catalogue
from motet.adapters.registry import Registry
from motet.adapters.spec import Declared
from motet.server.config import OptionError, ServeConfig

Named = tuple[str, Path, Declared]
"""An adapter of the options."""


def require_possible(config: ServeConfig, adapters: Sequence[Named]) -> None:
    """Look at the options before anything is loaded.

    Raises:
        OptionError: a name is given twice, or no version would be kept.
    """
    names = [name for name, _, _ in adapters]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise OptionError(f"--adapter names {twice[0]!r} twice; give each adapter a name of its own")
    if config.versions_kept < 1:
        raise OptionError(
            f"--versions-kept {config.versions_kept} is too few: the current version counts; give 1 or more"
        )


def open_catalogue(config: ServeConfig, base: BaseModel) -> Catalogue:
    """The one that the options name, or one in memory.

    Raises:
        CatalogueError: it cannot be opened, or is another base model's.
    """
    file = None if config.catalogue is None else Path(config.catalogue).expanduser()
    return Catalogue(file, base.fingerprint, config.versions_kept)


def publish_first(registry: Registry, adapters: Sequence[Named], report: Callable[[str], None]) -> None:
    """Serve what the catalogue has, and what the options name; those mean their folders after every start.

    Raises:
        AdapterError: an adapter of the options cannot be served.
    """

    def loading(name: str) -> None:
        report(f"loading adapter {name}")

    registry.restore(loading, besides={name for name, _, _ in adapters})
    for standing in registry.standings():
        if standing.error is not None:
            report(f"adapter {standing.name} is not served: {standing.error}")
    for name, folder, declared in adapters:
        loading(name)
        registry.load(name, folder, declared, replace=True)
