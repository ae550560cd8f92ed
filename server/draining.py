"""An HTTP server that finishes what it has begun before it ends.

Must not know: what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator

import uvicorn

from motet.server.api.service import Service

DRAIN_POLL_S = 0.05


class DrainingServer(uvicorn.Server):
    """Answers what it has begun before it goes.

    The first signal closes the door (/ready and new requests answer 503) and lets running requests finish within the
    drain timeout; the second ends the process at once.
    """

    def __init__(
        self, settings: uvicorn.Config, service: Service, drain_timeout_s: float, ready: Callable[[], None]
    ) -> None:
        super().__init__(settings)
        self._service, self._drain_timeout_s, self._ready = service, drain_timeout_s, ready
        self._drain: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals in the loop, and do not raise them again afterwards: a drained exit is a good one."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if self.started:
            self._service.ready = True
            self._ready()

    def _on_signal(self) -> None:
        if self._drain is not None:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._drain = asyncio.create_task(self._finish_running())

    async def _finish_running(self) -> None:
        deadline_s = time.monotonic() + self._drain_timeout_s
        while len(self._service.streams) and time.monotonic() < deadline_s:
            await asyncio.sleep(DRAIN_POLL_S)
        self.should_exit = True
