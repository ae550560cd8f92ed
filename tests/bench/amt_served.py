"""A server of one pool in this process, asked over its HTTP interface. Knows nothing of how a pool computes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import torch

from motet.server import serve
from motet.server.api.app import create_app
from motet.server.config import ServeConfig

NAME = "pool"


class Served:
    """A client of the server."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def classified(
        self, support: Sequence[tuple[str, str]], texts: Sequence[str]
    ) -> tuple[list[float], list[str], torch.Tensor]:
        """The weights that a support set gives, and under them labels and probabilities [N, C] of texts."""
        body = {"support": [{"text": text, "label": label} for text, label in support]}
        made = await self._client.post(f"/v1/adapters/{NAME}/merges", json=body)
        assert made.is_success, made.text
        card = made.json()
        told = await self._client.post("/v1/classify", json={"model": card["id"], "input": list(texts)})
        assert told.is_success, told.text
        rows = told.json()["data"]
        probabilities = [[row["probs"][label] for label in card["labels"]] for row in rows]
        return card["alpha"], [row["label"] for row in rows], torch.tensor(probabilities)


@asynccontextmanager
async def served(model: Path, pool: Path) -> AsyncIterator[Served]:
    """A server in float32 with the pool, its cache of lowered adapters off."""
    config = ServeConfig(str(model), "base", "float32", "cpu", kv_memory="256MiB", adapter_cache="off")
    assembled = serve.assemble(config, lambda _: None)
    async with serve.opened(config, assembled, golden=False) as service:
        service.registry.load(NAME, pool)
        service.ready = True
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://pool", timeout=None) as client:
            yield Served(client)
