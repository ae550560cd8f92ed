"""One request's way through the engine: submit its generations, turn their events into text, clean up.

Must not know: the shape of any response.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from motet.server.api import uses
from motet.server.api.errors import ApiError, bad_request
from motet.server.api.inquiry import Inquiry
from motet.server.api.samplings import Wanted, copy_for, sampling_of, stops_of
from motet.server.api.schemas import GenerationBody
from motet.server.api.service import Service
from motet.server.api.text import Detokenizer
from motet.server.api.visit import Visit
from motet.server.api.voice import Voice
from motet.server.engine.types import FinishReason, TokenEvent, TokenLogprobs

MOST_GENERATIONS = 1024
"""Generations of one request: prompts times answers to each."""


@dataclass(slots=True, eq=False)
class Choice:
    """One generation of the request, as far as it has come.

    Attributes:
        prompt: as it was given, markers of items included.
        prompt_logprobs: of prompt tokens 1, 2, …; token 0 has none. At a marker's place they are of its stand-in.
        uncertainty: of the whole generation, once `settle` found it.
    """

    index: int
    prompt: Sequence[int]
    detokenizer: Detokenizer
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    cached_tokens: int = 0
    latest_s: float | None = None
    uncertainty: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """A step of one choice: at most one token, the text that became final, perhaps the end."""

    choice: Choice
    text: str
    logprobs: TokenLogprobs | None
    finish: str | None


class Job:
    """A submitted request.

    Use as ``async with Job(...) as job: async for piece in job``; leaving the block cancels what still runs, so a
    client that goes away frees its blocks and leases.
    """

    def __init__(
        self,
        service: Service,
        voice: Voice,
        body: GenerationBody,
        prompts: Sequence[Sequence[int]],
        wanted: Wanted,
        visit: Visit,
    ) -> None:
        self._service = service
        self._visit = visit
        self._arrival_s = time.perf_counter()
        copies = body.n or 1
        if len(prompts) * copies > MOST_GENERATIONS:
            raise bad_request(
                f"{len(prompts)} prompts with n={copies} are {len(prompts) * copies} generations; at most "
                f"{MOST_GENERATIONS} are possible in one request",
                "n",
            )
        placed = [voice.placed(prompt) for prompt in prompts]
        samplings = [sampling_of(service.base.max_length, voice, body, prompt, wanted) for prompt in prompts]
        stops = stops_of(body)
        self.drop_drawn = wanted.max_tokens == 0
        self.inquiry = Inquiry(wanted.uncertainty, service.heads, body.seed)
        self.prompts = prompts
        most = copies * sum(len(prompt) + one.max_tokens for prompt, one in zip(prompts, samplings, strict=True))
        self._version = voice.applied[0].lease.version.digest if voice.applied else ""
        self._series = service.metrics.by_adapter.of(voice.names[0])
        try:
            self._admitted = service.admission.enter(visit.caller, voice.names, most, len(prompts) * copies)
        except ApiError:
            self._series.finished(self._version, "refused")
            raise
        # Nothing from here to the submission may refuse the request: nobody would end the stream.
        self.versions = [one.lease.version for one in voice.applied]
        self.system_fingerprint = service.fingerprint(voice.applied)
        self.merge = voice.merge
        self._stream = service.streams.open(len(prompts) * copies)
        self.choices = [
            Choice(
                index=index,
                prompt=prompts[index // copies],
                detokenizer=Detokenizer(
                    voice.tokenizer,
                    prompts[index // copies],
                    stops,
                    skip_special_tokens=body.skip_special_tokens,
                    include_stop=body.include_stop_str_in_output,
                ),
            )
            for index in range(len(prompts) * copies)
        ]
        self._include_stop = body.include_stop_str_in_output
        self._min_tokens = body.min_tokens
        self._by_generation = dict(zip(self._stream.generations, self.choices, strict=True))
        # Every generation has its own leases on the versions that the names meant.
        for generation, choice in zip(self._stream.generations, self.choices, strict=True):
            sampling = copy_for(samplings[choice.index // copies], choice.index % copies)
            applied = uses.renewed(service.registry, voice.applied)
            tokens, given = placed[choice.index // copies]
            service.engine.submit(generation, tokens, sampling, applied, given, voice.names[0] if applied else None)

    async def __aenter__(self) -> Job:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for generation in self._stream.unfinished:
            self._service.engine.cancel(generation)
        self._service.streams.close(self._stream)
        self.inquiry.close()
        finished = all(choice.finish for choice in self.choices)
        failed = kind is not None and issubclass(kind, Exception)  # a cancelled task is none
        outcome = "failed" if failed else "finished" if finished else "deadline" if self._visit.over else "cancelled"
        ticket = self._admitted[0]
        ticket.tokens, ticket.generations = self._used(), len(self.choices)
        self._service.admission.leave(*self._admitted)
        drawn = sum(len(choice.tokens) for choice in self.choices)
        self._series.finished(self._version, outcome, prompt=self.prompt_tokens, cached=self.cached_tokens, drawn=drawn)
        self._service.metrics.requests.labels(outcome).inc()
        self._service.metrics.prompt_tokens.inc(self.prompt_tokens)
        self._service.metrics.cached_tokens.inc(self.cached_tokens)
        self._service.metrics.whole.observe(time.perf_counter() - self._arrival_s)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        open_choices = len(self.choices)
        async for event in self._stream:
            choice = self._by_generation[event.generation]
            if choice.finish is not None:
                continue  # a stop string ended it; the engine has not heard yet
            if event.finish in (FinishReason.ERROR, FinishReason.CANCELLED):
                raise ApiError(500, event.error or "the server stopped the request", code="generation_failed")
            choice.prompt_logprobs += event.prompt_logprobs
            if event.token is None:
                continue
            piece = self._take(choice, event, event.token)
            yield piece
            if piece.finish is not None:
                open_choices -= 1
                if event.finish is None:
                    self._service.engine.cancel(event.generation)
                if open_choices == 0:
                    return

    def _take(self, choice: Choice, event: TokenEvent, token: int) -> Piece:
        self._time(choice, event)
        self.inquiry.hear(self._prompt_of(choice), event.feature)
        choice.cached_tokens = event.cached_tokens
        if self.drop_drawn:
            choice.finish = FinishReason.LENGTH
            return Piece(choice, "", None, choice.finish)
        choice.tokens.append(token)
        if event.logprobs is not None:
            choice.logprobs.append(event.logprobs)
        text, stopped = "", False
        if event.finish is not FinishReason.STOP or self._include_stop:
            piece = choice.detokenizer.add(token, may_stop=len(choice.tokens) >= self._min_tokens)
            text, stopped = piece.text, piece.stopped
        if stopped:
            choice.finish = FinishReason.STOP
        elif event.finish is not None:
            choice.finish = event.finish
            text += choice.detokenizer.flush()
        choice.text += text
        return Piece(choice, text, event.logprobs, choice.finish)

    async def settle(self, choices: Sequence[Choice]) -> None:
        """Find out the uncertainty of choices that are complete, where it was asked for."""
        for choice in choices:
            choice.uncertainty = await self.inquiry.found(self._prompt_of(choice), choice.logprobs)
            if choice.uncertainty is not None:
                self._series.uncertainty.observe(choice.uncertainty["score"])

    def _prompt_of(self, choice: Choice) -> int:
        return choice.index // (len(self.choices) // len(self.prompts))

    def _time(self, choice: Choice, event: TokenEvent) -> None:
        now_s, metrics = time.perf_counter(), self._service.metrics
        metrics.generated_tokens.inc()
        if choice.latest_s is None:
            metrics.first_token.observe(now_s - self._arrival_s)
            self._series.first_token.observe(now_s - self._arrival_s)
            self._series.queue.observe(event.queue_s)
        else:
            metrics.between_tokens.observe(now_s - choice.latest_s)
            self._series.between_tokens.observe(now_s - choice.latest_s)
        choice.latest_s = now_s

    def _used(self) -> int:
        """Tokens that count against quotas: every copy reads its prompt."""
        return sum(len(choice.prompt) + len(choice.tokens) for choice in self.choices)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def cached_tokens(self) -> int:
        copies = len(self.choices) // len(self.prompts)
        return sum(choice.cached_tokens for choice in self.choices[::copies])

    def usage(self) -> dict[str, object]:
        """OpenAI's usage object, for what has been generated so far."""
        completion = sum(len(choice.tokens) for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def require_known(prompt: Sequence[int], voice: Voice, param: str) -> None:
    """Refuse token ids that the model does not have."""
    if (largest := max(prompt)) >= voice.prompt_vocabulary:
        raise bad_request(
            f"{param} has token {largest}; the tokens of {voice.model} are 0 to {voice.vocabulary - 1}", param
        )
