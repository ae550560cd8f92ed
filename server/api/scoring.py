"""Log-probabilities of given tokens, and features of prompts, computed like any request's; and the golden checks.

Must not know: HTTP, text. For log-probabilities the engine is asked for one token that nobody looks at: those of the
prompt come with it. For features it is asked for none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from motet.adapters.errors import GoldenError
from motet.adapters.golden import GOLDEN_FILE, Golden, compare
from motet.adapters.lease import Lease
from motet.adapters.publishing import Check
from motet.server.api.base_info import BaseInfo
from motet.server.engine.engine import Engine
from motet.server.engine.stream import Streams
from motet.server.engine.types import Applied, FinishReason, GivenInput, Sampling, TokenEvent

SAMPLING = Sampling(max_tokens=1, temperature=0, prompt_logprobs=0)
FEATURE = Sampling(max_tokens=0, temperature=0, feature=True)


class ScoringError(Exception):
    """The prompts cannot be computed; the message says why."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and what it is computed with.

    Attributes:
        applied: gives adapters with leases of their own; the engine ends them.
        vocabulary: of the adapter, where it is not the base's.
        given: position in the prompt → what stands there instead of the token's embedding.
    """

    prompt: Sequence[int]
    applied: Callable[[], Sequence[Applied]]
    vocabulary: int | None = None
    given: Mapping[int, GivenInput] = field(default_factory=dict)


class Scorer:
    """Asks the engine. For the event loop that the streams belong to."""

    def __init__(self, base: BaseInfo, engine: Engine, streams: Streams) -> None:
        self._base, self._engine, self._streams = base, engine, streams

    @property
    def most_tokens(self) -> int:
        """Of one prompt."""
        return self._base.max_length - 1

    async def logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        lease: Callable[[], Lease | None],
        vocabulary: int | None = None,
        gate: tuple[float, ...] | None = None,
    ) -> list[list[float]]:
        """Natural log-probabilities of each prompt's tokens from the second on.

        Args:
            vocabulary: of the adapter, where it is not the base's.
            lease: gives a lease of its own to every prompt; the engine ends it. None is the base model.
            gate: factors of a gated adapter.

        Raises:
            ScoringError: a prompt does not fit the base model, or its step failed.
        """
        if self._base.modality != "text":
            raise ScoringError("the base model takes images: there are no log-probabilities of tokens")

        def applied() -> Sequence[Applied]:
            held = lease()
            return () if held is None else (Applied(held, gate),)

        found: list[list[float]] = [[] for _ in prompts]
        async for index, event in self._events([Question(prompt, applied, vocabulary) for prompt in prompts], SAMPLING):
            found[index] += [position.logprob for position in event.prompt_logprobs]
        return found

    async def features(self, questions: Sequence[Question]) -> torch.Tensor:
        """[N, D] float32: what the output head reads at the last token of each prompt.

        Raises:
            ScoringError: a prompt does not fit the base model, or its step failed.
        """
        return torch.stack([event.feature for event in await self.first_tokens(questions, FEATURE)])

    async def class_logits(self, questions: Sequence[Question]) -> torch.Tensor:
        """[N, C] float32: what a base that is a classifier says of each prompt.

        Raises:
            ScoringError: a prompt does not fit the base model, or its step failed.
        """
        return torch.stack([event.class_logits for event in await self.first_tokens(questions, FEATURE)])

    async def first_tokens(self, questions: Sequence[Question], sampling: Sampling) -> list[TokenEvent]:
        """What the engine says of each prompt's end: with the first token drawn, or with the feature alone.

        Raises:
            ScoringError: a prompt does not fit the base model, or its step failed.
        """
        events = self._events(questions, sampling)
        found = {index: event async for index, event in events if event.token is not None or event.feature is not None}
        return [found[index] for index in range(len(questions))]

    async def _events(self, questions: Sequence[Question], sampling: Sampling) -> AsyncIterator[tuple[int, TokenEvent]]:
        """Number of the question and what the engine says of it; all are submitted at once."""
        for index, question in enumerate(questions):
            self._require_possible(index, question.prompt, question.vocabulary or self._base.vocabulary)
        stream = self._streams.open(len(questions))
        number = {generation: index for index, generation in enumerate(stream.generations)}
        try:
            for generation, question in zip(stream.generations, questions, strict=True):
                self._engine.submit(generation, question.prompt, sampling, question.applied(), question.given)
            async for event in stream:
                if event.finish in (FinishReason.ERROR, FinishReason.CANCELLED):
                    raise ScoringError(event.error or "the server is stopping; try again when it runs")
                yield number[event.generation], event
        finally:
            for generation in stream.unfinished:
                self._engine.cancel(generation)
            self._streams.close(stream)

    def _require_possible(self, index: int, prompt: Sequence[int], vocabulary: int) -> None:
        if not self._engine.alive:
            raise ScoringError("the engine does not run; start the server again")
        if len(prompt) > self.most_tokens:
            raise ScoringError(
                f"prompt {index} has {len(prompt)} tokens; the base model takes {self.most_tokens}: shorten it"
            )
        if (largest := max(prompt)) >= vocabulary:
            raise ScoringError(
                f"prompt {index} has token {largest}; the model's tokens are 0 to {vocabulary - 1}: the prompt is of "
                "another tokenizer"
            )


def golden_check(scorer: Scorer, loop: asyncio.AbstractEventLoop) -> Check:
    """The check for a registry whose loads run in other threads than the loop's."""

    def check(golden: Golden, lease: Callable[[], Lease]) -> None:
        work = scorer.logprobs([prompt.tokens for prompt in golden.prompts], lease, golden.vocabulary, golden.gate)
        try:
            served = asyncio.run_coroutine_threadsafe(work, loop).result()
        except ScoringError as error:
            raise GoldenError(f"{GOLDEN_FILE} cannot be checked: {error}") from error
        compare(golden, served)

    return check
