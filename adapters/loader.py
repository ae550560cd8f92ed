"""The threads that lower adapters and move them between tiers, so that the step thread never does.

Must not know: what is moved, or why. They run at low priorities: while steps keep all processors busy they get what
those leave.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

MOVING, LOWERING = 19, 15
"""Linux's nice values, which there belong to threads. Moving an adapter takes milliseconds of a processor, lowering one
tenths of a second, which at 19 become half a minute beside steps that keep all processors busy (docs/adr/0013)."""


def yield_to_steps(nice: int) -> None:
    """Lower the calling thread's priority, where the system has priorities of threads."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


class Background:
    """One thread for lowering, which others wait for; what is given to it is done in its order."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "motet-background", yield_to_steps, (LOWERING,))

    def run(self, work: Callable[[], T]) -> T:
        """The result of the work, or what it raises. May be called from any thread but the background's."""
        return self._executor.submit(work).result()


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
        yield_to_steps(MOVING)
        while self._turn():
            pass
