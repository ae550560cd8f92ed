"""If-Match and If-None-Match: on what a change of an adapter's name depends. An adapter's ETag is its digest.

Must not know: what is changed.
"""

from __future__ import annotations

import re

from fastapi import Request

from motet.adapters.condition import ANY, KNOWN, NEW, Condition
from motet.adapters.version import Digest
from motet.server.api.errors import bad_request

_DIGEST = re.compile(r'"?([0-9a-f]{64})"?')


def condition_of(request: Request) -> Condition:
    """What the headers ask for.

    Raises:
        ApiError: they ask for something else than one digest, or anything, or nothing.
    """
    if_match, if_none_match = request.headers.get("if-match"), request.headers.get("if-none-match")
    if if_none_match is not None:
        if if_match is not None or if_none_match != "*":
            raise bad_request(
                f"If-None-Match {if_none_match!r} is not honoured: it may be *, for a name that is not published yet, "
                "and without If-Match",
                "If-None-Match",
            )
        return NEW
    if if_match is None:
        return ANY
    if if_match == "*":
        return KNOWN
    match = _DIGEST.fullmatch(if_match)
    if match is None:
        raise bad_request(
            f"If-Match {if_match!r} is not honoured: it may be * or the ETag of one version, 64 hexadecimal digits",
            "If-Match",
        )
    return Condition(digest=Digest(match[1]))


def etag(digest: str) -> str:
    """The header's value."""
    return f'"{digest}"'
