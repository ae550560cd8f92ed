"""How large a request's body may be, and how long it may take to arrive: decided before anything of it is parsed.

Must not know: what bodies mean.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyRefusedError(HTTPException):
    """A body is too large or too slow. An HTTPException, because frameworks hand on no other while they read a body."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(status, message, {"Connection": "close"})
        self.code = code


class BodyLimits:
    """ASGI middleware: reading the body raises `BodyRefusedError`.

    Args:
        most_bytes: of one body.
        timeout_s: from the moment somebody reads it until it is complete.
    """

    def __init__(self, app: ASGIApp, most_bytes: int, timeout_s: float) -> None:
        self._app, self._most_bytes, self._timeout_s = app, most_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        body = _Body(receive, self._most_bytes, self._timeout_s, int(announced) if announced.isdecimal() else 0)
        await self._app(scope, body.receive, send)


class _Body:
    def __init__(self, receive: Receive, most_bytes: int, timeout_s: float, announced_bytes: int) -> None:
        self._receive, self._most_bytes, self._timeout_s = receive, most_bytes, timeout_s
        self._bytes, self._announced_bytes = 0, announced_bytes
        self._until_s: float | None = None
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        self._require_small(self._announced_bytes)
        if self._until_s is None:
            self._until_s = asyncio.get_running_loop().time() + self._timeout_s
        try:
            async with asyncio.timeout_at(self._until_s):
                message = await self._receive()
        except TimeoutError as error:
            text = f"the request's body did not arrive within {self._timeout_s:g} s; send it faster or in parts"
            raise BodyRefusedError(408, text, "request_timeout") from error
        self._bytes += len(message.get("body", b""))
        self._require_small(self._bytes)
        self._complete = not message.get("more_body", False)
        return message

    def _require_small(self, count: int) -> None:
        if count > self._most_bytes:
            raise BodyRefusedError(
                413,
                f"the request's body has {count:,} bytes or more; at most {self._most_bytes:,} are read: send less, or "
                "raise --max-body",
                "request_too_large",
            )
