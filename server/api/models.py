"""GET /v1/models: the base model and its adapters.

Must not know: where adapters come from.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from motet.adapters.standing import AdapterInfo
from motet.server.api.service import Service
from motet.server.api.uncertainty import offered
from motet.server.api.visit import visit_of


def router(service: Service) -> APIRouter:
    """The endpoints, bound to a service."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        caller = visit_of(request).caller
        seen = [info for info in service.registry.published() if caller.may_see(info.version.name)]
        adapters = [_adapter(service, info) for info in seen]
        return {"object": "list", "data": [_base(service), *adapters]}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        if name == service.base.name:
            return _base(service)
        service.require_visible(name, visit_of(request).caller)
        return _adapter(service, service.registry.get(name))

    return routes


def _base(service: Service) -> dict[str, Any]:
    return _card(service, service.base.name, service.base.created_s, None)


def _adapter(service: Service, info: AdapterInfo) -> dict[str, Any]:
    version, receipt = info.version, info.receipt
    card = _card(service, version.name, int(info.published_s), service.base.name)
    card["adapter"] = {
        "version": version.digest,
        "method": receipt.method,
        "rank": receipt.ranks[1],
        "state": "ready",
        "bytes": receipt.resident_bytes,
        "exact": receipt.exact,
        "error": None if receipt.error is None else {"summary": str(receipt.error), **asdict(receipt.error)},
        "uncertainty": offered(info.head),
    }
    return card


def _card(service: Service, name: str, created_s: int, parent: str | None) -> dict[str, Any]:
    takes = service.base.modality
    return {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": "motet",
        "root": name,
        "parent": parent,
        "max_model_len": service.base.max_length if takes == "text" else None,
        "input_modalities": [takes],
    }
