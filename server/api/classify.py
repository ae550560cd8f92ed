"""POST /v1/classify: the labels of a merge's support set, by the nearness of texts to their class means.

Must not know: how probabilities are computed.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from motet.adapters.errors import AdapterNotFoundError
from motet.server.api.errors import ApiError, bad_request
from motet.server.api.schemas import ClassifyBody
from motet.server.api.service import Service

MOST_INPUTS = 512


def router(service: Service) -> APIRouter:
    """The endpoint, bound to a service."""
    routes = APIRouter()

    @routes.post("/v1/classify")
    async def classify(body: ClassifyBody) -> dict[str, Any]:
        service.require_open()
        texts = [body.input] if isinstance(body.input, str) else body.input
        if not 1 <= len(texts) <= MOST_INPUTS:
            raise bad_request(f"input has {len(texts)} texts; 1 to {MOST_INPUTS} are possible", "input")
        try:
            merged = service.merging.get(body.model)
            probabilities_NC, tokens = await service.merging.classify(merged, texts)
        except AdapterNotFoundError as error:
            message = f"model {body.model!r} does not classify: {error}"
            raise ApiError(404, message, code="model_not_found", param="model") from error
        return {
            "object": "list",
            "model": merged.name,
            "data": [
                {
                    "index": index,
                    "label": merged.labels[int(row_C.argmax())],
                    "probs": dict(zip(merged.labels, row_C.tolist(), strict=True)),
                    "num_classes": len(merged.labels),
                }
                for index, row_C in enumerate(probabilities_NC)
            ],
            "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
        }

    return routes
