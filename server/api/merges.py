"""Merges of a pool: made from a support set, listed, looked up, deleted. A merge's id is a model of its own.

Must not know: how merges are made.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from motet.adapters.errors import AdapterNotFoundError
from motet.server.api.merge_asks import ask_of
from motet.server.api.merged import Merged
from motet.server.api.schemas import MergeBody
from motet.server.api.service import Service


def router(service: Service) -> APIRouter:
    """The endpoints, bound to a service."""
    routes = APIRouter()
    merging = service.merging

    def known(pool: str, name: str) -> Merged:
        merged = merging.get(name)
        if merged.pool.name != pool:
            raise AdapterNotFoundError(f"merge {name!r} is of pool {merged.pool.name!r}, not of {pool!r}")
        return merged

    @routes.post("/v1/adapters/{pool:path}/merges")
    async def make(pool: str, body: MergeBody) -> dict[str, Any]:
        service.require_open()
        return _card(await merging.make(pool, ask_of(body, merging.inputs.modality), body.expires_s))

    @routes.get("/v1/adapters/{pool:path}/merges")
    async def every(pool: str) -> dict[str, Any]:
        return {"object": "list", "data": [_card(merged) for merged in merging.of(pool)]}

    @routes.get("/v1/adapters/{pool:path}/merges/{name:path}")
    async def one(pool: str, name: str) -> dict[str, Any]:
        return _card(known(pool, name))

    @routes.delete("/v1/adapters/{pool:path}/merges/{name:path}")
    async def delete(pool: str, name: str) -> Response:
        merging.delete(known(pool, name).name)
        return Response(status_code=204)

    return routes


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
        "labels": list(merged.labels),
        "created": int(merged.created_s),
        "expires_at": int(merged.expires_s),
    }
