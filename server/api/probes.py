"""GET /health, /ready, /version and /metrics: for machines that watch the server. Never behind a key.

Must not know: requests.
"""

from __future__ import annotations

import importlib.metadata

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from motet.server.api.service import Service


def router(service: Service) -> APIRouter:
    """The endpoints, bound to a service."""
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> JSONResponse:
        """Whether the process should go on: the step thread lives and its steps succeed."""
        return _state(service.healthy, "healthy", "unhealthy")

    @routes.get("/ready")
    async def ready() -> JSONResponse:
        """Whether new requests should come here: the base is loaded and warm, and nothing drains."""
        return _state(
            service.ready and not service.draining and service.healthy,
            "ready",
            "draining" if service.draining else "not ready",
        )

    @routes.get("/version")
    async def version() -> dict[str, str]:
        """What answers here: for bug reports and benchmark results."""
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        base = service.base
        own = {"version": importlib.metadata.version("motet"), "base": base.name}
        return {**own, "dtype": base.dtype, "weights": base.weights, "device": base.device, **versions}

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return routes


def _state(good: bool, yes: str, no: str) -> JSONResponse:
    return JSONResponse({"status": yes if good else no}, 200 if good else 503)
