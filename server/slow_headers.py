"""Closes connections whose next request does not arrive: half a head would otherwise hold a socket for ever.

Must not know: what is served. Bodies have a limit of their own (motet.server.api.body_limits), and idle connections
between two requests that of the HTTP server.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_ANSWER = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class PatientProtocol(H11Protocol):
    """uvicorn's, with a limit on how long the head of a request may take."""

    head_timeout_s: float

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head is due."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_is_late)

    def data_received(self, data: bytes) -> None:
        """Part of a head, or of a body."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(_ANSWER)
            self.transport.close()


def patient_for(timeout_s: float) -> type[PatientProtocol]:
    """The protocol with its limit, as uvicorn takes it."""
    return type("PatientProtocol", (PatientProtocol,), {"head_timeout_s": timeout_s})
