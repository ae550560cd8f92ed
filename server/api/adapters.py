"""Administration at run time: loading and unloading with vLLM's bodies and status codes, reading back what is served.

Must not know: methods, memory, requests in flight.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response

from motet.adapters.base import Kind
from motet.adapters.errors import AdapterError
from motet.adapters.lowered_file import dump
from motet.adapters.source import confine
from motet.adapters.spec import Declared, LossyForm
from motet.server.api.schemas import LoadAdapterBody, UnloadAdapterBody
from motet.server.api.service import Service

logger = logging.getLogger(__name__)


def router(service: Service) -> APIRouter:
    """The endpoints, bound to a service."""
    routes = APIRouter()

    @routes.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadAdapterBody) -> PlainTextResponse:
        try:
            folder, declared = _places(service, body)
            info = await asyncio.to_thread(
                service.registry.load, body.lora_name, folder, declared, replace=body.load_inplace
            )
        except AdapterError as error:
            service.metrics.loads.labels("refused").inc()
            logger.warning("adapter %r was refused: %s", body.lora_name, error)
            raise
        service.metrics.loads.labels("loaded").inc()
        logger.info("adapter %s is loaded", info.version.short)
        lossy = f" {info.receipt.error}." if info.receipt.error else ""
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.{lossy}")

    @routes.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadAdapterBody) -> PlainTextResponse:
        info = service.registry.unload(body.lora_name)
        logger.info("adapter %s is unloaded", info.version.short)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @routes.get("/v1/base")
    async def base() -> dict[str, Any]:
        """The base model as adapters see it."""
        model = service.registry.base
        return {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "dtype": service.base.dtype,
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


def _places(service: Service, body: LoadAdapterBody) -> tuple[Path, Declared]:
    """The folders the body names, each confined.

    Raises:
        UnsafePathError, SourceNotFoundError: one is not below the adapter roots.
        ConfigError: there is no such lossy form.
    """
    folder, initial, residual = (
        None if path is None else confine(Path(path), service.adapter_roots)
        for path in (body.lora_path, body.initial_path, body.residual_path)
    )
    assert folder is not None
    form = None if body.approximate is None else LossyForm.parse(body.approximate)
    return folder, Declared(initial, residual, body.trained_on_base, form)
