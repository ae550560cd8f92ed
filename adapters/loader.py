"""The thread that moves adapters between tiers, so that the step thread never does.

Must not know: what is moved, or why. It runs at the lowest priority: while steps keep all processors busy it gets what
they leave.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

LOWEST = 19
"""Linux's nice value; there it belongs to the thread."""


def yield_to_steps() -> None:
    """Give the calling thread the lowest priority, where the system has priorities of threads."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)


class Loader:
    """One thread, started when there is first something to do.

    Args:
        turn: does one thing, or waits until there is one; False ends the thread.
    """

    def __init__(self, turn: Callable[[], bool]) -> None:
        self._turn = turn
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, unless it runs. May be called from any thread."""
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="motet-loader", daemon=True)
                    self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the thread, which `turn` brings about."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        yield_to_steps()
        while self._turn():
            pass
