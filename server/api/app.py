"""The ASGI application: one router file per family of endpoints, and the key each family needs.

Must not know: how the service was put together.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Depends, FastAPI, Request
from starlette.middleware.cors import CORSMiddleware

from motet.server.api import adapters, catalogue, chat, classify, completions, decisions, errors, merges, models, probes
from motet.server.api.body_limits import BodyLimits
from motet.server.api.deadlines import Deadlines
from motet.server.api.service import Service


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Of one HTTP request, whatever it asks.

    Attributes:
        body_bytes, body_timeout_s: of its body, and for it to arrive.
        timeout_s: for its answer; None is no bound.
        cors_origins: pages of which may ask from a browser.
    """

    body_bytes: int = 16 << 20
    body_timeout_s: float = 30.0
    timeout_s: float | None = None
    cors_origins: tuple[str, ...] = ()


DEFAULT_LIMITS = RequestLimits()


def create_app(service: Service, limits: RequestLimits = DEFAULT_LIMITS) -> FastAPI:
    """An application that answers with the service."""
    app = FastAPI(title="Motet", docs_url=None, redoc_url=None)
    errors.install(app)
    app.add_middleware(BodyLimits, most_bytes=limits.body_bytes, timeout_s=limits.body_timeout_s)
    app.add_middleware(Deadlines, most_s=limits.timeout_s, exempt=_publishes)
    if limits.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=limits.cors_origins, allow_methods=["*"], allow_headers=["*"], max_age=600
        )

    async def inference(request: Request) -> None:
        request.state.caller = service.require_inference_key(request.headers.get("authorization"))

    async def administration(request: Request) -> None:
        request.state.caller = service.require_admin_key(request.headers.get("authorization"))

    async def oversight(request: Request) -> None:
        request.state.caller = service.require_oversight_key(request.headers.get("authorization"))

    app.include_router(merges.oversight(service), dependencies=[Depends(oversight)])
    for family in (completions, chat, merges, classify, decisions, models):
        app.include_router(family.router(service), dependencies=[Depends(inference)])
    for family in (adapters, catalogue):  # in this order, for /v1/adapters/{name}/lowered
        app.include_router(family.router(service), dependencies=[Depends(administration)])
    app.include_router(probes.router(service))
    return app


def _publishes(method: str, path: str) -> bool:
    """Whether a request changes which adapters there are: that happens in threads, which nobody can cancel."""
    if path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        return True
    return path.startswith("/v1/adapters/") and (method != "GET" and "/merges" not in path)
