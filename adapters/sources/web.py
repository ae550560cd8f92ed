"""HTTP: a GET that follows redirects to allowed places only, and ends when its fetch must.

Must not know: what is fetched, where files are kept. fsspec's HTTP is not used because it follows redirects on its own
and unpacks encodings.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from motet.adapters.errors import (
    CorruptSourceError,
    ForbiddenSourceError,
    SourceError,
    SourceNotFoundError,
    SourceUnavailableError,
)
from motet.adapters.sources.address import AllowList
from motet.adapters.sources.remote import Deadline, Opened

MOST_REDIRECTS = 5
PATIENCE_S = 10.0
"""How long a server may say nothing."""
METADATA = frozenset(map(ipaddress.ip_address, ("169.254.169.254", "fd00:ec2::254", "100.100.100.200", "fd20:ce::254")))
"""Where clouds answer machines about themselves."""
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_ABSENT = frozenset((401, 403, 404, 410))
_OK = frozenset((200,))


class Web:
    """The client of one fetch.

    Args:
        allowed: the places it may speak to.
        deadline: after it every connection is cut, however slowly the other end drips.
        trust: whose certificates are believed.
    """

    def __init__(self, allowed: AllowList, deadline: Deadline, trust: ssl.SSLContext) -> None:
        self._allowed = allowed
        self.deadline = deadline
        self._sockets: list[socket.socket] = []
        self._client = httpx.Client(follow_redirects=False, headers={"Accept-Encoding": "identity"}, verify=trust)
        self._watch = threading.Timer(deadline.left_s(), self.cut)
        self._watch.daemon = True

    def __enter__(self) -> Web:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.cancel()
        self._client.close()

    @contextlib.contextmanager
    def get(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        expected: frozenset[int] = _OK,
        home: str | None = None,
    ) -> Iterator[httpx.Response]:
        """The answer to a GET, its body still to be read by `body`.

        Args:
            headers: of them, Authorization is sent to the first server only.
            expected: statuses of an answer.
            home: an origin that is allowed because the source is.

        Raises:
            ForbiddenSourceError: a redirect leads to a place that is not allowed.
            SourceNotFoundError: there is nothing, or nothing for us.
            SourceUnavailableError: no other answer comes.
        """
        given = dict(headers or {})
        for _ in range(MOST_REDIRECTS + 1):
            with self._told():
                if home is None or origin(url) != home:
                    self._allowed.require_url(url)
                response = self._send(url, given)
            with contextlib.closing(response):
                if response.status_code not in _REDIRECTS:
                    _require_expected(response.status_code, expected)
                    yield response
                    return
                with self._told():
                    to = str(response.url.join(response.headers.get("location", "")))
                    if origin(to) != origin(url):
                        given.pop("Authorization", None)
                url = to
        raise SourceUnavailableError(f"the source sends on more than {MOST_REDIRECTS} times; give the place it ends at")

    def body(self, response: httpx.Response) -> Iterator[bytes]:
        """What arrives, as it arrives.

        Raises:
            SourceUnavailableError: it breaks off, or takes too long.
        """
        with self._told():
            for chunk in response.iter_raw():
                yield chunk
                self.deadline.left_s()

    def whole(self, response: httpx.Response, most_bytes: int) -> bytes:
        """A short body.

        Raises:
            CorruptSourceError: it is longer than `most_bytes`.
        """
        content = bytearray()
        for chunk in self.body(response):
            content += chunk
            if len(content) > most_bytes:
                raise CorruptSourceError(f"the source answers with more than {most_bytes:,} bytes where few are needed")
        return bytes(content)

    @contextlib.contextmanager
    def ranged(
        self, url: str, start: int, tag: str | None, headers: Mapping[str, str] | None = None, home: str | None = None
    ) -> Iterator[Opened]:
        """A file from `start` on, where the server can and the file still has this tag; else from its beginning."""
        asked = dict(headers or {})
        if start:
            asked["Range"] = f"bytes={start}-"
            if tag is not None:
                asked["If-Range"] = tag
        with self.get(url, asked, frozenset((200, 206, 416) if start else (200,)), home) as response:
            if response.status_code != 416:
                yield self._opened(response, start)
                return
        with self.get(url, headers, home=home) as response:  # there is nothing from `start` on: the file has changed
            yield self._opened(response, 0)

    def _opened(self, response: httpx.Response, start: int) -> Opened:
        if "content-encoding" in response.headers:
            raise CorruptSourceError("the source encodes what it was asked for as it is; serve the file plainly")
        tag = response.headers.get("etag")
        tag = None if tag is None or tag.startswith("W/") else tag
        if response.status_code == 206:
            part = re.fullmatch(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15})", response.headers.get("content-range", ""))
            if part is None or int(part[1]) != start:
                raise SourceUnavailableError("the source sends another part than it was asked for; ask again")
            return Opened(self.body(response), start, int(part[2]), tag)
        length = response.headers.get("content-length", "")
        return Opened(self.body(response), 0, int(length) if re.fullmatch(r"\d{1,15}", length) else None, tag)

    def _send(self, url: str, headers: Mapping[str, str]) -> httpx.Response:
        patience_s = min(PATIENCE_S, self.deadline.left_s())

        def look(event: str, info: Mapping[str, Any]) -> None:
            if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
                _require_no_metadata(url, info["return_value"])
                self._sockets.append(info["return_value"].get_extra_info("socket"))

        request = self._client.build_request(
            "GET", url, headers=dict(headers), timeout=patience_s, extensions={"trace": look}
        )
        return self._client.send(request, stream=True)

    def cut(self) -> None:
        """End the fetch now; from any thread."""
        self.deadline.end()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of the client as ours; their texts may hold addresses with secrets and are left out."""
        try:
            yield
        except SourceError:
            raise
        except httpx.TimeoutException as error:
            self.deadline.left_s()
            raise SourceUnavailableError(f"the source says nothing for {PATIENCE_S:g} s; ask again later") from error
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, ValueError) as error:
            self.deadline.left_s()
            raise SourceUnavailableError(
                f"the source breaks off or cannot be reached ({type(error).__name__}); ask again"
            ) from error


def origin(url: str) -> str:
    """Scheme, host and port."""
    parts = httpx.URL(url)
    return f"{parts.scheme}://{parts.netloc.decode('ascii')}"


def _require_expected(status: int, expected: frozenset[int]) -> None:
    if status in expected:
        return
    if status in _ABSENT:
        raise SourceNotFoundError(f"the source answers {status}: there is nothing, or nothing for this server")
    raise SourceUnavailableError(f"the source answers {status}; ask again later")


def _require_no_metadata(url: str, stream: Any) -> None:
    """Refuse link-local addresses, where clouds keep credentials, unless the source was allowed by that very number."""
    address = ipaddress.ip_address(str(stream.get_extra_info("server_addr")[0]).partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    if (address.is_link_local or address in METADATA) and httpx.URL(url).host != str(address):
        stream.close()
        raise ForbiddenSourceError(
            "the source's host has a link-local address, where machines keep credentials; allow that number itself "
            "with --adapter-source if it is meant"
        )
