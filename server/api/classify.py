"""POST /v1/classify: the labels of an adapter's head, or of a merge's support set by the nearness to their class means.

Must not know: how probabilities are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request

from motet.adapters.errors import AdapterNotFoundError
from motet.adapters.heads import HeadFile
from motet.server.api import uncertainty
from motet.server.api.errors import ApiError, bad_request
from motet.server.api.labelling import leased
from motet.server.api.merged import Merged
from motet.server.api.schemas import ClassifyBody
from motet.server.api.service import Service

MOST_INPUTS = 512


def router(service: Service) -> APIRouter:
    """The endpoint, bound to a service."""
    routes = APIRouter()

    @routes.post("/v1/classify")
    async def classify(body: ClassifyBody, request: Request) -> dict[str, Any]:
        service.require_open()
        texts = [body.input] if isinstance(body.input, str) else body.input
        if not 1 <= len(texts) <= MOST_INPUTS:
            raise bad_request(f"input has {len(texts)} texts; 1 to {MOST_INPUTS} are possible", "input")
        header = request.headers.get(uncertainty.HEADER)
        if (merged := service.merging.find(body.model)) is not None:
            rows, tokens = await _by_merge(service, merged, body, texts, header)
        else:
            rows, tokens = await _by_head(service, body, texts, header)
        return {
            "object": "list",
            "model": body.model,
            "data": [{"index": index, **row} for index, row in enumerate(rows)],
            "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
        }

    return routes


async def _by_merge(
    service: Service, merged: Merged, body: ClassifyBody, texts: Sequence[str], header: str | None
) -> tuple[list[dict[str, Any]], int]:
    _asked(body, header, None, len(texts))
    try:
        probabilities_NC, tokens = await service.merging.classify(merged, texts)
    except AdapterNotFoundError as error:
        raise _no_classifier(body.model, str(error)) from error
    return [_row(merged.labels, row_C.tolist()) for row_C in probabilities_NC], tokens


async def _by_head(
    service: Service, body: ClassifyBody, texts: Sequence[str], header: str | None
) -> tuple[list[dict[str, Any]], int]:
    async with leased(service, body.model) as labeller:
        if (head := labeller.head) is None:
            raise _no_classifier(
                body.model, "it is no merge, and no adapter with a head; GET /v1/models lists the labels of heads"
            )
        asked = _asked(body, header, head, len(texts))
        prompts = [labeller.encoded(text, f"input.{place}") for place, text in enumerate(texts)]
        answers, _ = await labeller.by_head(prompts, None if asked is None else asked.samples, body.seed)
    rows = [_row(head.labels, answer.p_C.tolist()) for answer in answers]
    if asked is not None:
        rows = [
            {**row, "uncertainty": uncertainty.of_head(head, answer)} for row, answer in zip(rows, answers, strict=True)
        ]
    return rows, sum(map(len, prompts))


def _asked(body: ClassifyBody, header: str | None, head: HeadFile | None, prompts: int) -> uncertainty.Asked | None:
    asked = uncertainty.resolve(body.uncertainty, header, head, f"model {body.model!r}", prompts=prompts, draws=False)
    if body.seed is not None and (asked is None or asked.samples is None):
        raise bad_request("seed is that of samples, and uncertainty asks for none; remove it", "seed")
    return asked


def _row(labels: Sequence[str], probabilities: list[float]) -> dict[str, Any]:
    return {
        "label": labels[probabilities.index(max(probabilities))],
        "probs": dict(zip(labels, probabilities, strict=True)),
        "num_classes": len(labels),
    }


def _no_classifier(model: str, why: str) -> ApiError:
    return ApiError(404, f"model {model!r} does not classify: {why}", code="model_not_found", param="model")
