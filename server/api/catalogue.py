"""/v1/adapters: every name with its state and versions; publish, roll back, remove; and who did so.

Must not know: methods, memory, requests in flight.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from motet.adapters.condition import Terms
from motet.adapters.errors import AdapterExistsError, VersionConflictError
from motet.adapters.origin import Origin
from motet.adapters.standing import AdapterInfo, Standing
from motet.adapters.version import Digest
from motet.server.api import publishing
from motet.server.api.actor import actor
from motet.server.api.conditions import condition_of, etag
from motet.server.api.schemas import PublishBody, RollbackBody
from motet.server.api.service import Service

MOST_AUDITED = 1000
"""Lines of one answer."""
MOST_WAIT_S = 600
WAIT_POLL_S = 0.05


def router(service: Service) -> APIRouter:
    """The endpoints, bound to a service. Their addresses take what others below /v1/adapters leave."""
    routes = APIRouter()
    registry = service.registry

    @routes.get("/v1/adapters")
    async def every() -> dict[str, Any]:
        standings = await asyncio.to_thread(registry.standings)
        return {"object": "list", "data": [_card(standing) for standing in standings]}

    @routes.get("/v1/audit")
    async def audit(
        limit: Annotated[int, Query(ge=1, le=MOST_AUDITED)] = 100, before: Annotated[int | None, Query(ge=1)] = None
    ) -> dict[str, Any]:
        """The latest lines first; `before` is the id of the last line of the page before."""
        lines = await asyncio.to_thread(registry.catalogue.audited, limit, before)
        return {"object": "list", "data": [asdict(line) for line in lines]}

    @routes.post("/v1/adapters/{name:path}/rollback")
    async def rollback(name: str, request: Request, body: RollbackBody | None = None) -> JSONResponse:
        terms = Terms(condition_of(request), actor=actor(request))
        info = await publishing.rollback(service, name, None if body is None else body.version, terms)
        return await _published(service, info)

    @routes.get("/v1/adapters/{name:path}")
    async def one(name: str) -> JSONResponse:
        return _whole(await asyncio.to_thread(registry.standing, name))

    @routes.put("/v1/adapters/{name:path}")
    async def publish(name: str, body: PublishBody, request: Request) -> JSONResponse:
        origin = Origin(body.source, body.initial_path, body.residual_path, body.trained_on_base, body.approximate)
        terms = Terms(
            condition_of(request),
            None if body.sha256 is None else Digest(body.sha256),
            body.pin,
            None if body.quota is None else body.quota.model_dump(exclude_none=True),
            body.preload,
            actor(request),
        )
        try:
            info = await publishing.publish(service, name, origin, terms)
        except AdapterExistsError as error:
            raise VersionConflictError(
                f"adapter {name!r} is published already; replace it without If-None-Match, or choose another name"
            ) from error
        return await _published(service, info)

    @routes.delete("/v1/adapters/{name:path}")
    async def remove(
        name: str, request: Request, wait_s: Annotated[float, Query(ge=0, le=MOST_WAIT_S)] = 0
    ) -> dict[str, Any]:
        version = await publishing.remove(service, name, Terms(condition_of(request), actor=actor(request)))
        deadline_s = time.monotonic() + wait_s
        while (leases := registry.draining(name)) and time.monotonic() < deadline_s:
            await asyncio.sleep(WAIT_POLL_S)
        return {"name": name, "version": version.digest, "leases": leases}

    return routes


async def _published(service: Service, info: AdapterInfo) -> JSONResponse:
    """The name as it is now, with the receipt of what was published just now."""
    standing = await asyncio.to_thread(service.registry.standing, info.version.name)
    return _whole(standing, info)


def _whole(standing: Standing, info: AdapterInfo | None = None) -> JSONResponse:
    info = info or standing.info
    receipt = None if info is None else _finite(asdict(info.receipt))
    digest = info.version.digest if info else standing.versions[0].digest if standing.versions else None
    headers = {} if digest is None else {"ETag": etag(digest)}
    return JSONResponse({**_card(standing), "version": digest, "receipt": receipt}, headers=headers)


def _card(standing: Standing) -> dict[str, Any]:
    info, leases = standing.info, standing.leases
    versions = [one.digest for one in standing.versions]
    receipt = None if info is None else info.receipt
    kept = [
        {"version": one.digest, "published_at": int(one.published_s), "leases": leases.get(one.digest, 0)}
        for one in standing.versions
    ]
    drained = [
        {"version": digest, "published_at": None, "leases": count}
        for digest, count in leases.items()
        if digest not in versions
    ]
    return {
        "name": standing.name,
        "object": "adapter",
        "state": standing.state,
        "error": standing.error,
        "version": versions[0] if versions else None,
        "method": None if receipt is None else receipt.method,
        "rank": None if receipt is None else receipt.ranks[1],
        "exact": None if receipt is None else receipt.exact,
        "bytes": dict(standing.bytes),
        "leases": sum(leases.values()),
        "pinned": standing.pinned,
        "quota": dict(standing.quota),
        "last_used_at": None if info is None or info.used_s is None else int(info.used_s),
        "versions": [*kept, *drained],
    }


def _finite(value: Any) -> Any:
    """As JSON can say it: null for a number that is not finite, such as the relative change of a weight of zeros."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
