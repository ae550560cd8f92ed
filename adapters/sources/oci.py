"""Adapters in OCI registries: a manifest by its digest, its layers by theirs.

    files with titles       one layer each, as `oras push` makes them
    one tar layer           plain or gzip: the adapter's folder

Must not know: where files are kept, what they mean.

Source: OCI distribution 1.1 and image manifest 1.1; Docker's token authentication.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from motet.adapters.bounded import parse_object
from motet.adapters.errors import CorruptSourceError, InvalidSourceError, SourceNotFoundError
from motet.adapters.sources.address import Address
from motet.adapters.sources.remote import Opened, RemoteFile
from motet.adapters.sources.selection import belongs, require_no_pickle
from motet.adapters.sources.web import Web

MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
TITLE = "org.opencontainers.image.title"
TOKENS = "MOTET_OCI_TOKENS"
"""Environment: HOST=TOKEN, several separated by spaces."""
MOST_MANIFEST = 1 << 20
MOST_LAYERS = 256
_LOCAL = ("localhost", "127.0.0.1", "[::1]")
"""Hosts that are spoken to without TLS, as docker does."""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class RegistryPlace:
    """One manifest of a registry."""

    def __init__(self, address: Address, web: Web) -> None:
        self._address, self._web = address, web
        plain = address.host.partition(":")[0] in _LOCAL or address.host.startswith("[::1]")
        self._origin = f"{'http' if plain else 'https'}://{address.host}"
        self._token = _tokens().get(address.host)
        self.revision: str | None = None

    def files(self) -> Sequence[RemoteFile]:
        """The layers that belong to an adapter."""
        layers = self._manifest().get("layers")
        if not isinstance(layers, list) or len(layers) > MOST_LAYERS:
            raise InvalidSourceError(f"the manifest has no layers, or more than {MOST_LAYERS}; push an adapter's files")
        found = [file for layer in layers if (file := self._file(layer)) is not None]
        require_no_pickle(file.name for file in found)
        tars = [file for file in found if file.name.endswith(".tar")]
        if tars and len(tars) + sum(belongs(file.name) for file in found) > 1:
            raise InvalidSourceError(
                "the manifest has several tar layers, or one beside files; push one, or files alone"
            )
        files = tars or [file for file in found if belongs(file.name)]
        if len({file.name for file in files}) != len(files):
            raise InvalidSourceError("the manifest has two layers of one title; push each file once")
        return files

    def open(
        self,
        file: RemoteFile,
        start: int,
        tag: str | None,  # noqa: ARG002 - as Remote says
    ) -> contextlib.AbstractContextManager[Opened]:
        """As Remote says; what goes by its digest needs no tag."""
        return self._web.ranged(file.place, start, None, self._headers(), self._origin)

    def _manifest(self) -> dict[str, Any]:
        address, expected = self._address, frozenset((200, 401))
        url = f"{self._origin}/v2/{address.path}/manifests/{address.revision}"
        asked = {"Accept": ", ".join(MANIFESTS)}
        for _ in range(2):
            with self._web.get(url, {**asked, **self._headers()}, expected, self._origin) as response:
                content = self._web.whole(response, MOST_MANIFEST)
                if response.status_code == 200:
                    self.revision = f"sha256:{hashlib.sha256(content).hexdigest()}"
                    if address.fixed and self.revision != address.revision:
                        raise CorruptSourceError(f"the manifest has digest {self.revision}, not {address.revision}")
                    return parse_object("the manifest", content)
                challenge = response.headers.get("www-authenticate", "")
            if self._token is not None:
                break
            self._token = self._ask_token(challenge)
        raise SourceNotFoundError(
            f"the registry answers 401: set {TOKENS} to {address.host}=TOKEN where the server runs"
        )

    def _ask_token(self, challenge: str) -> str:
        """A token for nobody in particular, from where the registry sends for it."""
        said = dict(re.findall(r'(\w+)="([^"]*)"', challenge[:4096]))
        if not challenge.lower().startswith("bearer ") or "realm" not in said:
            raise SourceNotFoundError("the registry answers 401 and names no place that gives tokens")
        service = f"service={said['service']}&" if re.fullmatch(r"[A-Za-z0-9.:_ -]+", said.get("service", "")) else ""
        url = f"{said['realm']}?{service}scope=repository:{self._address.path}:pull"
        with self._web.get(url, home=self._origin) as response:
            answer = parse_object("the token", self._web.whole(response, MOST_MANIFEST))
        token = answer.get("token") or answer.get("access_token")
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise SourceNotFoundError("the registry's place for tokens gives none")
        return token

    def _headers(self) -> Mapping[str, str]:
        return {} if self._token is None else {"Authorization": f"Bearer {self._token}"}

    def _file(self, layer: object) -> RemoteFile | None:
        """What a layer is; None for the empty one."""
        fields = layer if isinstance(layer, dict) else {}
        kind, digest, size = fields.get("mediaType"), fields.get("digest"), fields.get("size")
        if not isinstance(kind, str) or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise InvalidSourceError("the manifest has a layer without a media type or a sha256 digest")
        if type(size) is not int or size < 0:
            raise InvalidSourceError(f"the manifest's layer {digest[:19]} has no size")
        if kind == "application/vnd.oci.empty.v1+json":
            return None
        notes = fields.get("annotations")
        title = notes.get(TITLE) if isinstance(notes, dict) else None
        tar = kind.endswith((".tar", ".tar+gzip", "diff.tar.gzip")) or str(title).endswith((".tar", ".tar.gz", ".tgz"))
        name = "layer.tar" if tar else title
        if not isinstance(name, str):
            raise InvalidSourceError(f"the manifest's layer {digest[:19]} is no tar and has no title {TITLE!r}")
        place = f"{self._origin}/v2/{self._address.path}/blobs/{digest}"
        return RemoteFile(name, place, size, digest, digest.removeprefix("sha256:"))


def _tokens() -> dict[str, str]:
    pairs = (pair.partition("=") for pair in os.environ.get(TOKENS, "").split())
    return {host.lower(): token for host, _, token in pairs}
