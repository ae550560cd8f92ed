"""The labels of a base that is a classifier, by the base's own head or by the one an adapter puts in its place.

Must not know: HTTP, how logits are computed.

Shapes: N inputs, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from motet.adapters.errors import AdapterNotFoundError
from motet.adapters.lease import Lease
from motet.adapters.registry import Registry
from motet.server.api import uses
from motet.server.api.base_info import BaseInfo
from motet.server.api.inputs import Inputs
from motet.server.api.scoring import Question, Scorer


@dataclass(frozen=True, slots=True, eq=False)
class Classifying:
    """For the event loop that the scorer belongs to."""

    base: BaseInfo
    registry: Registry
    scorer: Scorer
    inputs: Inputs

    async def classify(self, lease: Lease | None, given: Mapping[str, str]) -> tuple[torch.Tensor, int]:
        """[N, C] float32 probabilities of the base's labels, and the number of tokens read.

        Args:
            lease: the caller's, on an adapter; None is the base.
            given: field of the request → input.

        Raises:
            AdapterNotFoundError: the base has no classifier.
            GateError: the adapter needs a gate.
            InputError: an input cannot be read.
            ScoringError: a step failed.
        """
        if not self.base.labels:
            raise AdapterNotFoundError(
                f"it is no merge that is known, and the base model {self.base.name!r} has no classifier; merge a pool, "
                "again where the merge has expired, and use the merge's name"
            )
        applied = [] if lease is None else [await uses.gated(lease, None)]
        prompts = await self.inputs.read(given)
        questions = [
            Question(prompt.tokens, lambda: uses.renewed(self.registry, applied), given=prompt.given)
            for prompt in prompts
        ]
        logits_NC = await self.scorer.class_logits(questions)
        return logits_NC.double().softmax(1).float(), sum(len(prompt.tokens) for prompt in prompts)
