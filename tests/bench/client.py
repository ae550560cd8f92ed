"""One HTTP exchange over a raw socket. Knows nothing of workloads, statistics or when to send.

Each request opens its own connection: no pooled one can be found closed by the server in mid-run.
"""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Self
from urllib.parse import urlsplit

from tests.bench.tally import StreamTally
from tests.bench.timeline import Failure, FailureKind, Timeline
from tests.bench.wire import EventDecoder, ResponseDecoder, WireError
from tests.bench.workload import PlannedRequest

_READ_BYTES = 65_536
_ERROR_BODY_CHARS = 300


@dataclass(frozen=True)
class Endpoint:
    """Where the server is. `prefix` is what comes before /v1 in its paths, mostly nothing."""

    host: str
    port: int
    tls: bool = False
    prefix: str = ""
    api_key: str | None = None

    @classmethod
    def from_url(cls, url: str, api_key: str | None = None) -> Self:
        """Accepts the server's root or its /v1."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ValueError(f"url {url!r} is not http://HOST[:PORT] or https://HOST[:PORT]")
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls, prefix, api_key)

    @cached_property
    def tls_context(self) -> ssl.SSLContext | None:
        """Made once: loading the certificate store takes milliseconds."""
        return ssl.create_default_context() if self.tls else None

    def request_bytes(self, method: str, path: str, body: bytes = b"") -> bytes:
        lines = [
            f"{method} {self.prefix}{path} HTTP/1.1",
            f"host: {f'[{self.host}]' if ':' in self.host else self.host}:{self.port}",
            "connection: close",
            "content-type: application/json",
            f"content-length: {len(body)}",
        ]
        if self.api_key is not None:
            lines.append(f"authorization: Bearer {self.api_key}")
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def stream_completion(
    endpoint: Endpoint,
    request: PlannedRequest,
    due_s: float,
    timeout_s: float,
    allow_merged_chunks: bool = False,
) -> Timeline:
    """Sends one streaming completion and follows it to its end. Whatever goes wrong is in the timeline."""
    tally = StreamTally()
    sent_s = perf_counter()
    failure: Failure | None = None
    try:
        async with asyncio.timeout(timeout_s):
            failure = await _follow(endpoint, request, tally)
    except TimeoutError:
        failure = Failure(FailureKind.TIMEOUT, f"not finished in {timeout_s} s")
    except OSError as error:
        failure = Failure(FailureKind.CONNECTION, str(error) or type(error).__name__)
    except (WireError, LookupError, TypeError, AttributeError) as error:
        # the last three come from an event of an unknown shape
        failure = Failure(FailureKind.PROTOCOL, f"{type(error).__name__}: {error}")
    return Timeline(
        model=request.model,
        due_s=due_s,
        sent_s=sent_s,
        done_s=perf_counter() if tally.done_s is None else tally.done_s,
        chunk_times_s=tally.chunk_times_s,
        prompt_tokens=tally.prompt_tokens,
        cached_tokens=tally.cached_tokens,
        output_tokens=tally.output_tokens or 0,
        failure=tally.failure or failure or tally.verdict(request.output_tokens, allow_merged_chunks),
    )


async def get_json(endpoint: Endpoint, path: str, timeout_s: float = 10) -> object:
    """A small document.

    Raises:
        OSError: not reached in time, or a status other than 200.
        ValueError: not HTTP, or not JSON.
    """
    response = ResponseDecoder()
    body = bytearray()
    async with asyncio.timeout(timeout_s), _exchange(endpoint, endpoint.request_bytes("GET", path)) as reader:
        while not response.complete and (data := await reader.read(_READ_BYTES)):
            body += response.feed(data)
        response.feed_eof()
    if response.status != 200 or not response.complete:
        raise OSError(f"GET {path} answered {response.status}: {body[:_ERROR_BODY_CHARS].decode(errors='replace')}")
    document: object = json.loads(body)
    return document


async def _follow(endpoint: Endpoint, request: PlannedRequest, tally: StreamTally) -> Failure | None:
    response, events = ResponseDecoder(), EventDecoder()
    refusal = bytearray()
    message = endpoint.request_bytes("POST", "/v1/completions", request.body)
    async with _exchange(endpoint, message) as reader:
        while not response.complete and (data := await reader.read(_READ_BYTES)):
            now_s = perf_counter()
            body = response.feed(data)
            if response.status == 200:
                for event in events.feed(body):
                    tally.add(event, now_s)
            else:
                refusal += body
        response.feed_eof()
    if response.status is not None and response.status != 200:
        said = refusal[:_ERROR_BODY_CHARS].decode(errors="replace")
        return Failure(FailureKind.HTTP_STATUS, f"{response.status}: {said}")
    if not response.complete:
        return Failure(FailureKind.CLOSED_EARLY, f"body cut off after {len(tally.chunk_times_s)} chunks")
    return None


@contextlib.asynccontextmanager
async def _exchange(endpoint: Endpoint, message: bytes) -> AsyncIterator[asyncio.StreamReader]:
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=endpoint.tls_context)
    try:
        writer.write(message)
        await writer.drain()
        yield reader
    finally:
        writer.close()
        # the peer may be gone already, and what it said is judged elsewhere
        with contextlib.suppress(OSError):
            await writer.wait_closed()
