"""POST /v1/completions.

Must not know: how tokens are computed.
"""

from __future__ import annotations

import functools
import itertools
import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from motet.server.api import served, uncertainty
from motet.server.api.answer import answer_at_once, answer_streaming
from motet.server.api.errors import bad_request
from motet.server.api.job import Choice, Job, Piece, require_known
from motet.server.api.samplings import Wanted
from motet.server.api.schemas import CompletionBody
from motet.server.api.service import Service
from motet.server.api.text import Tokenizer, token_text
from motet.server.api.visit import visit_of
from motet.server.api.voice import Voice
from motet.server.engine.types import TokenLogprobs

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default of this endpoint."""


def router(service: Service) -> APIRouter:
    """The endpoint, bound to a service."""
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise bad_request("best_of is honoured only where it equals n: answers are not ranked", "best_of")
        visit = visit_of(request)
        async with service.voice(body, visit.caller) as voice:
            prompts = prompts_of(voice, body)
            wanted = Wanted(
                max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
                logprobs=body.logprobs,
                prompt_logprobs=body.logprobs if body.echo else None,
                uncertainty=uncertainty.resolve(
                    body.uncertainty,
                    request.headers.get(uncertainty.HEADER),
                    voice.head,
                    voice.model,
                    prompts=len(prompts),
                    draws=body.max_tokens != 0,
                ),
            )
            job = Job(service, voice, body, prompts, wanted, visit)
            response = _Completion(voice.tokenizer, body, job)
        if not body.stream:
            return await answer_at_once(request, job, response.whole)
        options = body.stream_options
        usage = response.usage if options is not None and options.include_usage else None
        return answer_streaming(job, list, response.chunk, usage)

    return routes


def prompts_of(voice: Voice, body: CompletionBody) -> Sequence[Sequence[int]]:
    """Token ids of each prompt: a string, strings, token ids, or lists of them."""
    given = body.prompt
    several: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not several:
        raise bad_request("prompt is an empty list; give at least one prompt", "prompt")
    prompts = [
        voice.tokenizer(one, add_special_tokens=body.add_special_tokens)["input_ids"] if isinstance(one, str) else one
        for one in several
    ]
    for prompt in prompts:
        if not prompt:
            raise bad_request("prompt is empty; give at least one token", "prompt")
        require_known(prompt, voice, "prompt")
    return prompts


class _Completion:
    """Bodies of one response."""

    def __init__(self, tokenizer: Tokenizer, body: CompletionBody, job: Job) -> None:
        self._tokenizer, self._body, self._job = tokenizer, body, job
        self._frame = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
            **served.fields(job.versions),
            "system_fingerprint": job.system_fingerprint,
            **({} if job.merge is None else {"merge": job.merge}),
        }
        self._begun: set[int] = set()
        self._offsets = dict.fromkeys(range(len(job.choices)), 0)
        self._continuous = bool(body.stream_options and body.stream_options.continuous_usage_stats)

    def whole(self) -> dict[str, Any]:
        """The body of an answer at once."""
        choices = [
            self._choice(choice, self._echo(choice) + choice.text, choice.logprobs) for choice in self._job.choices
        ]
        return {**self._frame, "choices": choices, "usage": self._job.usage()}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """One streamed event; the first of a choice carries the echoed prompt."""
        choice = piece.choice
        text = piece.text if choice.index in self._begun else self._echo(choice) + piece.text
        chosen = [] if piece.logprobs is None else [piece.logprobs]
        event = {**self._frame, "choices": [self._choice(choice, text, chosen)]}
        return {**event, "usage": self._job.usage()} if self._continuous else event

    def usage(self) -> dict[str, Any]:
        """The event after the last token."""
        return {**self._frame, "choices": [], "usage": self._job.usage()}

    def _echo(self, choice: Choice) -> str:
        if not self._body.echo:
            return ""
        return self._tokenizer.decode(choice.prompt, skip_special_tokens=self._body.skip_special_tokens)

    def _choice(self, choice: Choice, text: str, chosen: Sequence[TokenLogprobs]) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None:
            tokens: list[TokenLogprobs | int] = [*chosen]
            if self._body.echo and choice.index not in self._begun:
                tokens = [*_echoed(choice), *chosen]
            texts = [token_text(self._tokenizer, t if isinstance(t, int) else t.token) for t in tokens]
            offset = self._offsets[choice.index]
            ends = list(itertools.accumulate((len(one) for one in texts), initial=offset))
            self._offsets[choice.index] = ends[-1]
            logprobs = {
                "tokens": texts,
                "token_logprobs": [None if isinstance(t, int) else t.logprob for t in tokens],
                "top_logprobs": [None if isinstance(t, int) else _top(self._tokenizer, t) for t in tokens],
                "text_offset": ends[:-1],
            }
        self._begun.add(choice.index)
        said = {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish}
        of_token = functools.partial(token_text, self._tokenizer)
        return uncertainty.add(said, self._job.inquiry.asked, choice.uncertainty, chosen, of_token)


def _echoed(choice: Choice) -> list[TokenLogprobs | int]:
    """What is known of each prompt token: nothing of the first, and nothing of markers, which are no tokens."""
    reported = zip(choice.prompt[1:], choice.prompt_logprobs, strict=True)
    return [choice.prompt[0], *(one if one.token == token else token for token, one in reported)]


def _top(tokenizer: Tokenizer, position: TokenLogprobs) -> dict[str, float]:
    """Text → log-probability; where texts coincide, the most likely token's. Includes the token that stands there."""
    found: dict[str, float] = {}
    for token, logprob in (*position.top, (position.token, position.logprob)):
        found.setdefault(token_text(tokenizer, token), logprob)
    return found
