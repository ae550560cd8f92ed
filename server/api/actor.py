"""Who asks, for the audit trail.

Must not know: which keys are valid.
"""

from __future__ import annotations

from fastapi import Request

from motet.server.api.visit import visit_of


def actor(request: Request) -> str:
    """The label of the request's key; never the key."""
    return visit_of(request).caller.label
