"""POST /v1/classify: the labels of a merge's support set by nearness to their class means, or of a classifier's own.

Must not know: how probabilities are computed.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from motet.adapters.errors import AdapterNotFoundError
from motet.server.api.errors import ApiError, bad_request
from motet.server.api.given import inputs_of
from motet.server.api.schemas import ClassifyBody
from motet.server.api.service import Service

MOST_INPUTS = 512


def router(service: Service) -> APIRouter:
    """The endpoint, bound to a service."""
    routes = APIRouter()

    @routes.post("/v1/classify")
    async def classify(body: ClassifyBody) -> dict[str, Any]:
        service.require_open()
        takes = service.base.modality
        given = inputs_of(body.input, takes)
        if not 1 <= len(given) <= MOST_INPUTS:
            raise bad_request(f"input has {len(given)} {takes}s; 1 to {MOST_INPUTS} are possible", "input")
        merged = service.merging.find(body.model)
        try:
            if merged is None:
                labels = service.base.labels
                probabilities_NC, tokens = await service.classifying.classify(body.model, given)
            else:
                labels = merged.labels
                probabilities_NC, tokens = await service.merging.classify(merged, given)
        except AdapterNotFoundError as error:
            message = f"model {body.model!r} does not classify: {error}"
            raise ApiError(404, message, code="model_not_found", param="model") from error
        return {
            "object": "list",
            "model": body.model,
            "data": [
                {
                    "index": index,
                    "label": labels[int(row_C.argmax())],
                    "probs": dict(zip(labels, row_C.tolist(), strict=True)),
                    "num_classes": len(labels),
                }
                for index, row_C in enumerate(probabilities_NC)
            ],
            "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
        }

    return routes
