"""What is known of an HTTP request before its body is read: who asks, and until when they wait.

Must not know: bodies, models.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from fastapi import Request

from motet.server.api.keys import Caller


@dataclass(frozen=True, slots=True)
class Visit:
    """One request.

    Attributes:
        until_s: on the monotonic clock; None waits for ever.
    """

    caller: Caller
    until_s: float | None = None

    @property
    def over(self) -> bool:
        """Whether its deadline has passed."""
        return self.until_s is not None and time.monotonic() >= self.until_s


def visit_of(request: Request) -> Visit:
    """As the application's middleware and the key's check left it."""
    return Visit(request.state.caller, getattr(request.state, "until_s", None))
