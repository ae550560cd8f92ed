"""Loading and unloading with vLLM's bodies and status codes, and reading back what is served.

Must not know: methods, memory, requests in flight.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from motet.adapters.base import Kind
from motet.adapters.condition import ANY, NEW, Terms
from motet.adapters.lowered_file import dump
from motet.adapters.origin import Origin
from motet.server.api import publishing
from motet.server.api.actor import actor
from motet.server.api.schemas import LoadAdapterBody, UnloadAdapterBody
from motet.server.api.service import Service


def router(service: Service) -> APIRouter:
    """The endpoints, bound to a service."""
    routes = APIRouter()

    @routes.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadAdapterBody, request: Request) -> PlainTextResponse:
        origin = Origin(body.lora_path, body.initial_path, body.residual_path, body.trained_on_base, body.approximate)
        terms = Terms(ANY if body.load_inplace else NEW, actor=actor(request))
        info = await publishing.publish(service, body.lora_name, origin, terms)
        lossy = f" {info.receipt.error}." if info.receipt.error else ""
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.{lossy}")

    @routes.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadAdapterBody, request: Request) -> PlainTextResponse:
        await publishing.remove(service, body.lora_name, Terms(actor=actor(request)))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @routes.get("/v1/base")
    async def base() -> dict[str, Any]:
        """The base model as adapters see it."""
        model = service.registry.base
        return {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "dtype": service.base.dtype,
            "weights": service.base.weights,
            "targets": list(model.targets),
            "other_modules": sorted(model.other_modules),
            "embedding": None if (embedding := model.of_kind(Kind.EMBEDDING)) is None else embedding.name,
        }

    @routes.get("/v1/adapters/{name:path}/lowered")
    async def lowered(name: str) -> Response:
        """The effects of the published version, as `motet.adapters.lowered_file` writes them."""

        def content() -> tuple[str, bytes]:
            version, effects = service.registry.lowered(name)
            return f"{version.name}@{version.digest}", dump(effects)

        version, body = await asyncio.to_thread(content)
        return Response(body, media_type="application/octet-stream", headers={"X-Motet-Adapter": version})

    return routes
