"""Adapter folders and archives of web servers.

Must not know: how HTTP is spoken. A web server has no list of its files: those that an adapter may have are asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from motet.adapters.checkpoint import MODEL_CONFIG, WHOLE
from motet.adapters.errors import SourceNotFoundError
from motet.adapters.golden import GOLDEN_FILE
from motet.adapters.heads import HEAD_CONFIG, HEAD_WEIGHTS
from motet.adapters.source import CONFIG_FILE, GATE_FILE, INITIAL_FOLDERS, WEIGHTS_FILE
from motet.adapters.sources.address import Address
from motet.adapters.sources.remote import Opened, RemoteFile
from motet.adapters.sources.web import Web
from motet.adapters.tokens import LIMITS as TOKENIZER_FILES

BESIDE = (GATE_FILE, HEAD_CONFIG, HEAD_WEIGHTS, GOLDEN_FILE, *TOKENIZER_FILES)
INITIAL = tuple(f"{folder}/{name}" for folder in INITIAL_FOLDERS for name in (CONFIG_FILE, WEIGHTS_FILE))


class WebPlace:
    """One folder or archive."""

    revision: str | None = None

    def __init__(self, address: Address, web: Web) -> None:
        self._address, self._web = address, web

    def files(self) -> Sequence[RemoteFile]:
        """The archive; or what a folder must have, and what it may have."""
        address = self._address
        if address.is_archive:
            return [RemoteFile(address.path.rpartition("/")[2], address.uri, sha256=address.sha256)]
        needed, optional = (CONFIG_FILE, WEIGHTS_FILE), (*BESIDE, *INITIAL)
        if not self._has(CONFIG_FILE) and self._has(MODEL_CONFIG):
            needed, optional = (MODEL_CONFIG, WHOLE), BESIDE
        return [
            *(RemoteFile(name, f"{address.uri}/{name}") for name in needed),
            *(RemoteFile(name, f"{address.uri}/{name}", optional=True) for name in optional),
        ]

    def open(self, file: RemoteFile, start: int, tag: str | None) -> contextlib.AbstractContextManager[Opened]:
        """As Remote says."""
        return self._web.ranged(file.place, start, tag)

    def _has(self, name: str) -> bool:
        try:
            with self._web.get(f"{self._address.uri}/{name}"):
                return True
        except SourceNotFoundError:
            return False
