"""Publishing, rolling back and removing adapters, counted and logged, whichever endpoint asks.

Must not know: the shape of any request or response.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from motet.adapters.condition import NEW, Terms
from motet.adapters.errors import AdapterError
from motet.adapters.origin import Origin
from motet.adapters.standing import AdapterInfo
from motet.adapters.version import AdapterVersion
from motet.server.api.autoload import Autoload, Template
from motet.server.api.service import Service

logger = logging.getLogger(__name__)


async def publish(service: Service, name: str, origin: Origin, terms: Terms) -> AdapterInfo:
    """As `Registry.publish`, in a thread."""
    return await _load(service, name, lambda: service.registry.publish(name, origin, terms))


async def rollback(service: Service, name: str, to: str | None, terms: Terms) -> AdapterInfo:
    """As `Registry.rollback`, in a thread."""
    return await _load(service, name, lambda: service.registry.rollback(name, to, terms))


async def remove(service: Service, name: str, terms: Terms) -> AdapterVersion:
    """As `Registry.unload`, in a thread."""
    version = await asyncio.to_thread(service.registry.unload, name, terms)
    service.adapter_quotas.set(name, None)
    logger.info("adapter %s is unloaded", version.short)
    return version


def autoloading(service: Service, template: Template, wait_s: float) -> Autoload:
    """Loading adapters that requests name, from the template's sources."""

    async def load(name: str, source: str) -> None:
        await publish(service, name, Origin(source), Terms(NEW, actor="autoload"))

    return Autoload(template, load, service.knows, wait_s)


async def _load(service: Service, name: str, load: Callable[[], AdapterInfo]) -> AdapterInfo:
    try:
        info = await asyncio.to_thread(load)
    except AdapterError as error:
        service.metrics.loads.labels("refused").inc()
        logger.warning("adapter %r was refused: %s", name, error)
        raise
    service.apply_quotas([info])
    service.metrics.loads.labels("loaded").inc()
    logger.info("adapter %s is loaded", info.version.short)
    return info
