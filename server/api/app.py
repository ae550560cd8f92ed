"""The ASGI application: one router file per family of endpoints.

Must not know: how the service was put together.
"""

from __future__ import annotations

from fastapi import FastAPI

from motet.server.api import adapters, chat, completions, errors, models, probes
from motet.server.api.service import Service


def create_app(service: Service) -> FastAPI:
    """An application that answers with the service."""
    app = FastAPI(title="Motet", docs_url=None, redoc_url=None)
    errors.install(app)
    for family in (completions, chat, models, adapters, probes):
        app.include_router(family.router(service))
    return app
