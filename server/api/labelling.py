"""Labels of prompts, by the head of their adapter or by the log-probabilities of the tokens that name labels.

Must not know: HTTP, questions, what prompts are made of.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from motet.adapters.errors import GateError
from motet.adapters.gates.instance import InstanceGate
from motet.adapters.heads import HeadFile
from motet.adapters.lease import Lease
from motet.adapters.version import AdapterVersion
from motet.server.api import uses
from motet.server.api.heads import Asking
from motet.server.api.inputs import Prompt
from motet.server.api.keys import Caller
from motet.server.api.schemas import MOST_SEED
from motet.server.api.scoring import FEATURE, Question
from motet.server.api.service import Service
from motet.server.api.text import Tokenizer
from motet.server.engine.types import Applied, Sampling, TokenEvent
from motet.server.heads.predictive import Predictive

WAVE = 64
"""Prompts that one request has in the engine at a time, so that a large one does not fill the queue for others."""


@dataclass(frozen=True, slots=True, eq=False)
class Labeller:
    """The base, or one version of an adapter as it is, for one request.

    Attributes:
        lease: the request's; None for the base.
    """

    service: Service
    lease: Lease | None

    @property
    def versions(self) -> list[AdapterVersion]:
        """The adapter's, or none."""
        return [] if self.lease is None else [self.lease.version]

    @property
    def counted(self) -> tuple[str, str]:
        """Name and version that its work is counted to; the base has no version."""
        if self.lease is None:
            return self.service.base.name, ""
        return self.lease.version.name, self.lease.version.digest

    @property
    def head(self) -> HeadFile | None:
        """The adapter's."""
        return None if self.lease is None else self.lease.resident.head

    @property
    def tokenizer(self) -> Tokenizer:
        """The adapter's, where it has one of its own."""
        own = None if self.lease is None else self.lease.resident.own
        tokenizer = self.service.tokenizer if own is None else own.tokenizer
        assert tokenizer is not None, "whoever asks made sure that the base takes texts"
        return tokenizer

    async def read(self, given: Mapping[str, str]) -> list[Prompt]:
        """Texts, or whatever else the base takes, as /v1/classify is given them.

        Raises:
            GateError: a text has no token, or too many.
            InputError: another input cannot be read.
        """
        if self.service.base.modality != "text":
            return await self.service.classifying.inputs.read(given)
        return [Prompt(self.encoded(text, field)) for field, text in given.items()]

    def encoded(self, text: str, field: str) -> list[int]:
        """Token ids of a text as /v1/completions makes them.

        Raises:
            GateError: there are none, or too many.
        """
        return self.fitting(self.tokenizer(text, add_special_tokens=True)["input_ids"], field)

    def fitting(self, prompt: list[int], field: str) -> list[int]:
        """The prompt itself.

        Raises:
            GateError: it has no token, or more than the base model takes.
        """
        most = self.service.merging.scorer.most_tokens
        if not 1 <= len(prompt) <= most:
            raise GateError(field, f"{field} has {len(prompt)} tokens; 1 to {most} are possible: shorten it")
        return prompt

    async def by_head(
        self, prompts: Sequence[Prompt], samples: int | None = None, seed: int | None = None
    ) -> tuple[list[Predictive], int]:
        """The head's answers, and how many tokens the prefix cache spared.

        Args:
            samples: draws of Monte Carlo answers; None is exact.
            seed: of the draws; None draws one.

        Raises:
            GateError: the adapter needs a gate.
            ScoringError: a step failed.
            HeadError: the head's logits are no distribution.
        """
        assert self.head is not None
        events = await self._first_tokens(prompts, FEATURE)
        seed = random.getrandbits(63) if seed is None else seed % MOST_SEED
        answers = [self.service.heads.ask(Asking(self.head, event.feature, samples, seed)) for event in events]
        return await asyncio.gather(*answers), sum(event.cached_tokens for event in events)

    async def by_tokens(self, labels: tuple[int, ...], prompts: Sequence[Prompt]) -> tuple[list[list[float]], int]:
        """Log-probabilities of tokens as the first one of each answer, and how many tokens the prefix cache spared.

        Raises:
            GateError: the adapter needs a gate.
            ScoringError: a step failed.
        """
        events = await self._first_tokens(prompts, Sampling(max_tokens=1, temperature=0, label_tokens=labels))
        found = [[logprob for _, logprob in event.logprobs.top] for event in events if event.logprobs is not None]
        return found, sum(event.cached_tokens for event in events)

    async def _first_tokens(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[TokenEvent]:
        registry, applied, vocabulary = self.service.registry, list[Applied](), None
        if self.lease is not None:
            if isinstance(self.lease.resident.gate, InstanceGate):
                name = self.lease.version.name
                raise GateError(
                    "model", f"adapter {name!r} answers by its user, whom only /v1/completions and chat are told"
                )
            applied.append(await uses.gated(self.lease, None))
            vocabulary = self.lease.resident.vocabulary
        questions = [
            Question(prompt.tokens, lambda: uses.renewed(registry, applied), vocabulary, prompt.given)
            for prompt in prompts
        ]
        scorer, events = self.service.merging.scorer, list[TokenEvent]()
        for at in range(0, len(questions), WAVE):
            events += await scorer.first_tokens(questions[at : at + WAVE], sampling)
        return events


@contextlib.asynccontextmanager
async def leased(service: Service, model: str, caller: Caller) -> AsyncIterator[Labeller]:
    """What the name means now, until the block is left.

    Raises:
        ApiError: there is no such model.
    """
    await service.prepare(caller, model)
    lease = service.resolve(model, caller)
    try:
        yield Labeller(service, lease)
    finally:
        if lease is not None:
            service.registry.release(lease)
