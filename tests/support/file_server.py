"""A web server on this machine that can misbehave, a hub and a registry made of it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Page:
    """What a path answers.

    Attributes:
        ranges: whether a part can be asked for.
        etag: sent; None sends none.
        cut_at: the connection ends after this many bytes of the body, once for each number.
        length: announced instead of the true one; "" announces none and ends the connection after the body.
        drip_s: pause between single bytes, of the body or of the header.
    """

    content: bytes = b""
    status: int = 200
    ranges: bool = True
    etag: str | None = "own"
    cut_at: list[int] = field(default_factory=list)
    length: str | None = None
    drip_s: float = 0
    drip_header: bool = False
    location: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


Answer = Callable[[str, dict[str, str]], Page | None]


class FileServer:
    """Pages by path; `asked` are (path with query, headers in lower case) in their order."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.answer: Answer | None = None
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.sent_bytes = 0
        self._http = _Quiet(("127.0.0.1", 0), _handler(self))
        self.host = f"127.0.0.1:{self._http.server_port}"
        self.url = f"http://{self.host}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))

    @contextmanager
    def running(self) -> Iterator[FileServer]:
        self._thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._thread.join()
            self._http.server_close()

    def put(self, path: str, content: bytes, **more: Any) -> Page:
        self.pages[path] = Page(content, **more)
        return self.pages[path]

    def put_folder(self, path: str, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            self.put(f"{path}/{name}", content)

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients that go away are what is tested."""


def _handler(server: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            server.asked.append((self.path, headers))
            page = server.answer(self.path, headers) if server.answer else None
            page = page or server.pages.get(unquote(urlsplit(self.path).path))
            try:
                self._send(page or Page(b"nothing", 404), headers)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        do_HEAD = do_GET

        def _send(self, page: Page, headers: dict[str, str]) -> None:
            etag = f'"{hashlib.sha256(page.content).hexdigest()}"' if page.etag == "own" else page.etag
            content, status, start = page.content, page.status, 0
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
            fresh = headers.get("if-range", etag) == etag
            if part and page.ranges and status == 200 and fresh:
                start = int(part[1])
                stop = min(int(part[2]) + 1 if part[2] else len(content), len(content))
                status = 206 if start < len(content) else 416
                content = content[start:stop]
            lines = [f"HTTP/1.1 {status} X"]
            length = str(len(content)) if page.length is None else page.length
            lines += [f"Content-Length: {length}"] if length else ["Connection: close"]
            lines += [f"ETag: {etag}"] if etag else []
            lines += [f"Location: {page.location}"] if page.location is not None else []
            if status == 206:
                lines.append(f"Content-Range: bytes {start}-{start + len(content) - 1}/{len(page.content)}")
            lines += [f"{name}: {value}" for name, value in page.headers.items()]
            self._write("\r\n".join([*lines, "", ""]).encode(), page.drip_s if page.drip_header else 0)
            if self.command == "HEAD":
                return
            cut = page.cut_at.pop(0) if page.cut_at else None
            self._write(content[:cut], page.drip_s)
            self.close_connection = not length or cut is not None or len(content) != int(length or 0)

        def _write(self, content: bytes, pause_s: float) -> None:
            pieces = [content[i : i + 1] for i in range(len(content))] if pause_s else [content]
            for piece in pieces:
                self.wfile.write(piece)
                self.wfile.flush()
                server.sent_bytes += len(piece)
                time.sleep(pause_s)

    return Handler


@contextmanager
def hub(repositories: dict[str, dict[str, dict[str, bytes]]], branches: dict[str, str]) -> Iterator[FileServer]:
    """The routes of a model hub that reading a repository takes: name → commit → files; branch → commit."""
    server = FileServer()

    def answer(path: str, _: dict[str, str]) -> Page | None:
        parts = urlsplit(path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)/?(.*)", parts.path):
            name, what, revision, folder = found.groups()
            commit = branches.get(revision, revision)
            files = repositories.get(name, {}).get(commit)
            if files is None:
                code = "RevisionNotFound" if name in repositories else "RepoNotFound"
                return Page(b"{}", 404, headers={"X-Error-Code": code, "X-Error-Message": "not there"})
            if what == "revision":
                return _json({"id": name, "sha": commit, "siblings": [], "private": False, "tags": []})
            return _json(_tree(files, unquote(folder), "recursive=true" in parts.query))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", parts.path):
            name, revision, file = found.groups()
            content = repositories.get(name, {}).get(branches.get(revision, revision), {}).get(file)
            return None if content is None else Page(content)
        return None

    server.answer = answer
    with server.running():
        yield server


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    inside = {name: content for name, content in files.items() if name.startswith(f"{folder}/" if folder else "")}
    below = {name: name.removeprefix(folder).strip("/") for name in inside}
    folders = sorted({name.rpartition("/")[0] for name in inside if "/" in below[name]})
    entries: list[dict[str, Any]] = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": one} for one in folders]
    for name, content in inside.items():
        if recursive or "/" not in below[name]:
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "oid": oid, "size": len(content), "path": name}
            if name.endswith(".safetensors"):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 100}
            entries.append(entry)
    return entries


def _json(value: Any) -> Page:
    return Page(json.dumps(value).encode(), headers={"Content-Type": "application/json"}, etag=None)


@contextmanager
def oci_registry(token: str | None = None) -> Iterator[FileServer]:
    """A registry; with a token, what it gives to those who ask for one."""
    server = FileServer()

    def answer(path: str, headers: dict[str, str]) -> Page | None:
        if path.startswith("/token?"):
            return _json({"token": token})
        if path.startswith("/v2/") and token is not None and headers.get("authorization") != f"Bearer {token}":
            challenge = f'Bearer realm="{server.url}/token",service="here",scope="x"'
            return Page(b"{}", 401, headers={"WWW-Authenticate": challenge})
        return None

    server.answer = answer
    with server.running():
        yield server


def push(server: FileServer, repository: str, layers: list[tuple[str, str | None, bytes]], tag: str = "latest") -> str:
    """Layers of (media type, title, content) as a manifest, whose digest is returned."""
    described = []
    for kind, title, content in layers:
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        server.put(f"/v2/{repository}/blobs/{digest}", content)
        notes = {} if title is None else {"annotations": {"org.opencontainers.image.title": title}}
        described.append({"mediaType": kind, "digest": digest, "size": len(content), **notes})
    manifest = json.dumps({"schemaVersion": 2, "layers": described}).encode()
    digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    server.put(f"/v2/{repository}/manifests/{digest}", manifest)
    server.put(f"/v2/{repository}/manifests/{tag}", manifest)
    return digest
