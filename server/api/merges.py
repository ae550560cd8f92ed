"""Merges of a pool: made from a support set, listed, looked up, deleted. A merge's id is a model of its own.

Must not know: how merges are made.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from motet.adapters.errors import AdapterNotFoundError
from motet.adapters.trimming import Trimmed
from motet.server.api.merge_asks import ask_of
from motet.server.api.merged import Merged
from motet.server.api.schemas import MergeBody
from motet.server.api.service import Service
from motet.server.api.visit import visit_of


def router(service: Service) -> APIRouter:
    """Making merges, and looking one up whose id is known."""
    routes = APIRouter()

    @routes.post("/v1/adapters/{pool:path}/merges")
    async def make(pool: str, body: MergeBody, request: Request) -> dict[str, Any]:
        service.require_open()
        merging, caller = service.merging, visit_of(request).caller
        service.require_visible(pool, caller)
        version = service.registry.get(pool).version
        with service.counted(caller, pool, version.digest):
            return _card(await merging.make(pool, ask_of(body, merging.inputs.modality), body.expires_s, caller))

    @routes.get("/v1/adapters/{pool:path}/merges/{name:path}")
    async def one(pool: str, name: str, request: Request) -> dict[str, Any]:
        service.require_visible(pool, visit_of(request).caller)
        return _card(_known(service, pool, name))

    return routes


def oversight(service: Service) -> APIRouter:
    """What concerns everybody's merges: listing them, and deleting one."""
    routes = APIRouter()

    @routes.get("/v1/adapters/{pool:path}/merges")
    async def every(pool: str, request: Request) -> dict[str, Any]:
        service.require_visible(pool, visit_of(request).caller)
        return {"object": "list", "data": [_card(merged) for merged in service.merging.of(pool)]}

    @routes.delete("/v1/adapters/{pool:path}/merges/{name:path}")
    async def delete(pool: str, name: str, request: Request) -> Response:
        service.require_visible(pool, visit_of(request).caller)
        await service.merging.delete(_known(service, pool, name).name)
        return Response(status_code=204)

    return routes


def _known(service: Service, pool: str, name: str) -> Merged:
    merged = service.merging.get(name)
    if merged.pool.name != pool:
        raise AdapterNotFoundError(f"merge {name!r} is of pool {merged.pool.name!r}, not of {pool!r}")
    return merged


def _card(merged: Merged) -> dict[str, Any]:
    scores = merged.scores
    return {
        "id": merged.name,
        "object": "adapter.merge",
        "pool": merged.pool.name,
        "version": merged.pool.digest,
        "alpha": list(merged.alpha),
        "members": [
            {
                "member": member,
                "intra": None if scores is None else float(scores.intra_P[member]),
                "inter": None if scores is None else float(scores.inter_P[member]),
                "score": None if scores is None else float(scores.score_P[member]),
                "alpha": alpha,
            }
            for member, alpha in enumerate(merged.alpha)
        ],
        "trim": None if merged.trimmed is None else _trim(merged.trimmed),
        "labels": list(merged.labels),
        "created": int(merged.created_s),
        "expires_at": int(merged.expires_s),
    }


def _trim(trimmed: Trimmed) -> dict[str, Any]:
    """With the relative error ‖W' - W'_p‖/‖W'‖ over the pool's targets."""
    smallest, largest = trimmed.ranks
    return {
        "share": trimmed.share,
        "ranks": {"smallest": smallest, "largest": largest},
        "error": {"largest": trimmed.largest, "mean": trimmed.mean},
    }
