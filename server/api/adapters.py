"""Loading and unloading adapters at run time, with the bodies and status codes of vLLM's endpoints.

Must not know: formats, memory, requests in flight.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from motet.adapters.errors import AdapterError
from motet.adapters.source import confine
from motet.server.api.schemas import LoadAdapterBody, UnloadAdapterBody
from motet.server.api.service import Service

logger = logging.getLogger(__name__)


def router(service: Service) -> APIRouter:
    """The endpoints, bound to a service."""
    routes = APIRouter()

    @routes.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadAdapterBody) -> PlainTextResponse:
        try:
            folder = confine(Path(body.lora_path), service.adapter_roots)
            info = await asyncio.to_thread(service.registry.load, body.lora_name, folder, replace=body.load_inplace)
        except AdapterError as error:
            service.metrics.loads.labels("refused").inc()
            logger.warning("adapter %r was refused: %s", body.lora_name, error)
            raise
        service.metrics.loads.labels("loaded").inc()
        logger.info("adapter %s is loaded", info.version.short)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadAdapterBody) -> PlainTextResponse:
        info = service.registry.unload(body.lora_name)
        logger.info("adapter %s is unloaded", info.version.short)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return routes
