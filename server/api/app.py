"""The ASGI application: one router file per family of endpoints, and the key each family needs.

Must not know: how the service was put together.
"""

from __future__ import annotations

from fastapi import Depends, FastAPI, Request

from motet.server.api import adapters, catalogue, chat, classify, completions, decisions, errors, merges, models, probes
from motet.server.api.service import Service


def create_app(service: Service) -> FastAPI:
    """An application that answers with the service."""
    app = FastAPI(title="Motet", docs_url=None, redoc_url=None)
    errors.install(app)

    async def inference(request: Request) -> None:
        service.require_inference_key(request.headers.get("authorization"))

    async def administration(request: Request) -> None:
        service.require_admin_key(request.headers.get("authorization"))

    async def oversight(request: Request) -> None:
        service.require_oversight_key(request.headers.get("authorization"))

    app.include_router(merges.oversight(service), dependencies=[Depends(oversight)])
    for family in (completions, chat, merges, classify, decisions, models):
        app.include_router(family.router(service), dependencies=[Depends(inference)])
    for family in (adapters, catalogue):  # in this order, for /v1/adapters/{name}/lowered
        app.include_router(family.router(service), dependencies=[Depends(administration)])
    app.include_router(probes.router(service))
    return app
