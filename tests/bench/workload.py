"""A run lowered to bytes before it starts, so that the client only sends. Knows nothing of sockets."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.bench.arrivals import OpenLoop, Pacing
from tests.bench.assignment import Assignment, assign
from tests.bench.prompts import PromptShape


@dataclass(frozen=True)
class Workload:
    models: tuple[str, ...]
    pacing: Pacing
    requests: int
    prompt: PromptShape
    output_tokens: int
    seed: int
    warmup: int = 0
    assignment: Assignment = Assignment.ROUND_ROBIN
    alpha: float = 1.0
    extra_body: Mapping[str, object] = field(default_factory=dict)
    fields_of: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Model → what its requests say instead, where naming it is not enough."""

    def __post_init__(self) -> None:
        if self.requests < 1 or self.warmup < 0 or self.output_tokens < 1:
            raise ValueError(
                f"requests {self.requests} and output tokens {self.output_tokens} must be at least 1, "
                f"warm-up {self.warmup} at least 0"
            )


@dataclass(frozen=True)
class PlannedRequest:
    model: str
    body: bytes
    output_tokens: int


@dataclass(frozen=True)
class Plan:
    """Every request of a run; `offsets_s` are the send times of an open loop, None for a closed one."""

    warmup: tuple[PlannedRequest, ...]
    measured: tuple[PlannedRequest, ...]
    offsets_s: tuple[float, ...] | None


def plan(workload: Workload) -> Plan:
    """Lowers a workload.

    Note: warm-up goes round all models in turn, so a warm-up of len(models) touches each adapter once.
    """
    seed, pacing = workload.seed, workload.pacing
    models = assign(
        workload.models,
        workload.requests,
        workload.assignment,
        workload.alpha,
        random.Random(f"{seed}/assignment"),
    )
    # Assignment and arrivals draw from separate streams: changing one leaves the other as it was.
    arrivals = random.Random(f"{seed}/arrivals")
    return Plan(
        warmup=tuple(
            _lower(workload, workload.models[i % len(workload.models)], f"warmup/{i}") for i in range(workload.warmup)
        ),
        measured=tuple(_lower(workload, model, f"measured/{i}") for i, model in enumerate(models)),
        offsets_s=tuple(pacing.offsets_s(workload.requests, arrivals)) if isinstance(pacing, OpenLoop) else None,
    )


def _lower(workload: Workload, model: str, key: str) -> PlannedRequest:
    body = {
        "model": model,
        "prompt": workload.prompt.build(workload.seed, key),
        "max_tokens": workload.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **workload.extra_body,
        **workload.fields_of.get(model, {}),
    }
    return PlannedRequest(model, json.dumps(body).encode(), workload.output_tokens)
