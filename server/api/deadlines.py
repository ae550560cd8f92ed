"""A deadline for each request: when it passes, whatever is done for the request is cancelled, and the answer is 504.

Cancelling is what happens as well when a client goes away: generations end, waiting or running, and give back what they
hold. A stream that has begun gets the error as its last event.

Must not know: endpoints.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from motet.server.api.errors import error_body

HEADER = "X-Request-Timeout-S"


class Deadlines:
    """ASGI middleware.

    Args:
        most_s: for requests that say nothing, and the most that one may say; None is no bound.
        exempt: of a method and a path, whether the request goes on to its end: it may say nothing.
    """

    def __init__(self, app: ASGIApp, most_s: float | None, exempt: Callable[[str, str], bool]) -> None:
        self._app, self._most_s, self._exempt = app, most_s, exempt

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            exempt = self._exempt(scope["method"], scope["path"])
            timeout_s = self._timeout_s(Headers(scope=scope).get(HEADER), exempt)
        except ValueError as error:
            await answer.refuse(400, str(error), "invalid_request", HEADER)
            return
        if timeout_s is not None:
            scope.setdefault("state", {})["until_s"] = time.monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s) as timeout:
                await self._app(scope, receive, answer.send)
        except TimeoutError:
            if not timeout.expired():
                raise
            await answer.refuse(504, f"the request took longer than its {timeout_s:g} s", "deadline_exceeded")

    def _timeout_s(self, given: str | None, exempt: bool) -> float | None:
        if given is None:
            return None if exempt else self._most_s
        if exempt:
            raise ValueError(f"{HEADER} has no meaning here: what was begun would be finished all the same; remove it")
        try:
            timeout_s = float(given)
        except ValueError:
            timeout_s = math.nan
        most_s = math.inf if self._most_s is None else self._most_s
        if not 0 < timeout_s <= most_s or math.isinf(timeout_s):
            limit = "" if self._most_s is None else f" up to {most_s:g}, the server's limit"
            raise ValueError(f"{HEADER} is {given[:40]!r}; it must be a number of seconds above 0{limit}")
        return timeout_s


class _Answer:
    """What was sent of a response, so that an error can still follow it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started: Mapping[str, str] | None = None
        self._ended = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = Headers(raw=message["headers"])
        self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def refuse(self, status: int, message: str, code: str, param: str | None = None) -> None:
        content = json.dumps(error_body(status, message, code, param))
        if self._started is None:
            head = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
            await self.send({"type": "http.response.start", "status": status, "headers": head})
            await self.send({"type": "http.response.body", "body": content.encode()})
        elif not self._ended:
            events = self._started.get("content-type", "").startswith("text/event-stream")
            last: dict[str, Any] = {"body": f"data: {content}\n\n".encode()} if events else {}
            await self.send({"type": "http.response.body", **last})
