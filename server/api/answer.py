"""The frame both completion endpoints share: answer at once or stream, and stop when the client is gone.

Must not know: what the chunks contain.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from motet.server.api import served
from motet.server.api.errors import INTERNAL, ApiError, error_body
from motet.server.api.job import Job, Piece
from motet.server.api.uncertainty import SCORE_HEADER

logger = logging.getLogger(__name__)

CLIENT_CLOSED = 499
"""Status for the log when the client went away before the answer; nobody receives it."""


def _score(job: Job) -> dict[str, str]:
    """The one choice's, where it was asked for."""
    only = job.choices[0].uncertainty if len(job.choices) == 1 else None
    return {} if only is None else {SCORE_HEADER: f"{only['score']:.6f}"}


async def answer_at_once(request: Request, job: Job, body: Callable[[], dict[str, Any]]) -> Response:
    """Wait for every choice, then send one JSON body; cancel when the client disconnects."""

    async def collect() -> None:
        async for _ in job:
            pass
        await job.settle(job.choices)

    async with job:
        work, gone = asyncio.create_task(collect()), asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=CLIENT_CLOSED)
            work.result()
        finally:
            work.cancel()
            gone.cancel()
    return JSONResponse(body(), headers={**served.header(job.versions), **_score(job)})


def answer_streaming(
    job: Job,
    first: Callable[[], list[dict[str, Any]]],
    chunk: Callable[[Piece], dict[str, Any]],
    usage: Callable[[], dict[str, Any]] | None,
) -> Response:
    """Send one server-sent event per token, then the usage if asked for, then [DONE].

    Args:
        first: events before the first token.
        usage: the last event's body; None sends none.
    """

    async def events() -> AsyncIterator[str]:
        try:
            async with job:
                for event in first():
                    yield _event(event)
                async for piece in job:
                    if piece.finish is not None:
                        await job.settle([piece.choice])
                    yield _event(chunk(piece))
                if usage is not None:
                    yield _event(usage())
        except ApiError as error:
            yield _event(error_body(error.status, error.message, error.code, error.param))
            return
        except Exception:
            logger.exception("a stream failed")
            yield _event(error_body(500, INTERNAL))
            return
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers=served.header(job.versions))


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
