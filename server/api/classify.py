"""POST /v1/classify: labels by an adapter's head, by a merge's class means, or by a base that is a classifier.

Must not know: how probabilities are computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from motet.adapters.errors import AdapterNotFoundError
from motet.adapters.heads import HeadFile
from motet.adapters.lease import Lease
from motet.server.api import served, uncertainty
from motet.server.api.errors import ApiError, bad_request
from motet.server.api.given import inputs_of
from motet.server.api.labelling import WAVE, Labeller, leased
from motet.server.api.merged import Merged
from motet.server.api.schemas import ClassifyBody
from motet.server.api.service import Service
from motet.server.api.visit import visit_of

MOST_INPUTS = 512


def router(service: Service) -> APIRouter:
    """The endpoint, bound to a service."""
    routes = APIRouter()

    @routes.post("/v1/classify")
    async def classify(body: ClassifyBody, request: Request, response: Response) -> dict[str, Any]:
        service.require_open()
        takes = service.base.modality
        given = inputs_of(body.input, takes)
        if not 1 <= len(given) <= MOST_INPUTS:
            raise bad_request(f"input has {len(given)} {takes}s; 1 to {MOST_INPUTS} are possible", "input")
        at_once = min(len(given), WAVE)
        header, caller = request.headers.get(uncertainty.HEADER), visit_of(request).caller
        if (merged := service.known_merge(body.model, caller)) is not None:
            versions = [merged.pool]
            _asked(body, header, None, len(given))
            with service.counted(caller, merged.pool.name, merged.pool.digest, at_once) as ticket:
                rows, tokens = await _by_labels(service, merged, None, body, given)
                ticket.tokens = tokens
        else:
            async with leased(service, body.model, caller) as labeller:
                versions = labeller.versions
                if labeller.head is None:
                    _asked(body, header, None, len(given))
                with service.counted(caller, *labeller.counted, at_once) as ticket:
                    if labeller.head is not None:
                        rows, tokens = await _by_head(labeller, labeller.head, body, given, header)
                    else:
                        rows, tokens = await _by_labels(service, None, labeller.lease, body, given)
                    ticket.tokens = tokens
        response.headers.update(served.header(versions))
        return {
            "object": "list",
            "model": body.model,
            **served.fields(versions),
            "data": [{"index": index, **row} for index, row in enumerate(rows)],
            "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
        }

    return routes


async def _by_head(
    labeller: Labeller, head: HeadFile, body: ClassifyBody, given: Mapping[str, str], header: str | None
) -> tuple[list[dict[str, Any]], int]:
    asked = _asked(body, header, head, len(given))
    prompts = await labeller.read(given)
    answers, _ = await labeller.by_head(prompts, None if asked is None else asked.samples, body.seed)
    rows = [_row(head.labels, answer.p_C.tolist()) for answer in answers]
    if asked is not None:
        rows = [
            {**row, "uncertainty": uncertainty.of_head(head, answer)} for row, answer in zip(rows, answers, strict=True)
        ]
    return rows, sum(len(prompt.tokens) for prompt in prompts)


async def _by_labels(
    service: Service, merged: Merged | None, lease: Lease | None, body: ClassifyBody, given: Mapping[str, str]
) -> tuple[list[dict[str, Any]], int]:
    """By those of a merge, or of a base that is a classifier."""
    try:
        if merged is None:
            labels: Sequence[str] = service.base.labels
            probabilities_NC, tokens = await service.classifying.classify(lease, given)
        else:
            labels = merged.labels
            probabilities_NC, tokens = await service.merging.classify(merged, given)
    except AdapterNotFoundError as error:
        message = f"model {body.model!r} does not classify: {error}"
        raise ApiError(404, message, code="model_not_found", param="model") from error
    return [_row(labels, row_C.tolist()) for row_C in probabilities_NC], tokens


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
