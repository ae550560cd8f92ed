"""POST /v1/chat/completions.

Must not know: how tokens are computed.
"""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from jinja2 import TemplateError

from motet.server.api import served, uncertainty
from motet.server.api.answer import answer_at_once, answer_streaming
from motet.server.api.errors import bad_request
from motet.server.api.job import Choice, Job, Piece, require_known
from motet.server.api.samplings import Wanted
from motet.server.api.schemas import ChatBody
from motet.server.api.service import Service
from motet.server.api.text import Tokenizer, token_bytes, token_text
from motet.server.api.visit import visit_of
from motet.server.api.voice import Voice
from motet.server.engine.types import TokenLogprobs

RESERVED = frozenset(
    "conversation tools chat_template add_generation_prompt continue_final_message tokenize padding truncation "
    "max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs".split()
)
"""What chat_template_kwargs may not set: it is set here, or would cut or pad the prompt."""


def router(service: Service) -> APIRouter:
    """The endpoint, bound to a service."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        if body.top_logprobs is not None and not body.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        visit = visit_of(request)
        async with service.voice(body, visit.caller) as voice:
            wanted = Wanted(
                max_tokens=limit,
                logprobs=(body.top_logprobs or 0) if body.logprobs else None,
                uncertainty=uncertainty.resolve(
                    body.uncertainty, request.headers.get(uncertainty.HEADER), voice.head, voice.model, draws=limit != 0
                ),
            )
            job = Job(service, voice, body, [prompt_of(voice, body)], wanted, visit)
            response = _Chat(voice.tokenizer, body, job)
        if not body.stream:
            return await answer_at_once(request, job, response.whole)
        options = body.stream_options
        usage = response.usage if options is not None and options.include_usage else None
        return answer_streaming(job, response.first, response.chunk, usage)

    return routes


def prompt_of(voice: Voice, body: ChatBody) -> Sequence[int]:
    """The conversation in the model's own chat template, as token ids."""
    if not voice.tokenizer.chat_template:
        raise bad_request(f"{voice.model} has no chat template; use /v1/completions", "messages")
    if body.continue_final_message and body.add_generation_prompt:
        raise bad_request("continue_final_message needs add_generation_prompt: false", "continue_final_message")
    extra = body.chat_template_kwargs or {}
    if taken := RESERVED & extra.keys():
        raise bad_request(f"chat_template_kwargs may not set {sorted(taken)[0]!r}", "chat_template_kwargs")
    messages = [
        {
            "role": message.role,
            "content": message.content
            if isinstance(message.content, str)
            else "".join(part.text for part in message.content or ()),
            **({"name": message.name} if message.name else {}),
        }
        for message in body.messages
    ]
    try:
        encoded = voice.tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            **extra,
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise bad_request(f"the chat template refuses these messages: {error}", "messages") from error
    prompt: list[int] = list(encoded["input_ids"])
    if not prompt:
        raise bad_request("the chat template renders these messages to nothing", "messages")
    require_known(prompt, voice, "messages")
    return prompt


class _Chat:
    """Bodies of one response."""

    def __init__(self, tokenizer: Tokenizer, body: ChatBody, job: Job) -> None:
        self._tokenizer, self._body, self._job = tokenizer, body, job
        self._frame = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": body.model,
            **served.fields(job.versions),
            "system_fingerprint": job.system_fingerprint,
            **({} if job.merge is None else {"merge": job.merge}),
        }
        self._continuous = bool(body.stream_options and body.stream_options.continuous_usage_stats)

    def whole(self) -> dict[str, Any]:
        """The body of an answer at once."""
        choices = [
            self._with_uncertainty(
                choice,
                {
                    "index": choice.index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._logprobs(choice.logprobs),
                    "finish_reason": choice.finish,
                },
                choice.logprobs,
            )
            for choice in self._job.choices
        ]
        return {**self._frame, "choices": choices, "usage": self._job.usage()}

    def first(self) -> list[dict[str, Any]]:
        """The role of every choice, before its first token."""
        delta = {"role": "assistant", "content": ""}
        return [self._event(choice, delta, []) for choice in self._job.choices]

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """One token."""
        return self._event(piece.choice, {"content": piece.text}, [] if piece.logprobs is None else [piece.logprobs])

    def usage(self) -> dict[str, Any]:
        """The event after the last token."""
        return {**self._frame, "choices": [], "usage": self._job.usage()}

    def _event(self, choice: Choice, delta: dict[str, str], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        reported = self._logprobs(logprobs) if logprobs else None
        body = {"index": choice.index, "delta": delta, "logprobs": reported, "finish_reason": choice.finish}
        event = {**self._frame, "choices": [self._with_uncertainty(choice, body, logprobs)]}
        return {**event, "usage": self._job.usage()} if self._continuous else event

    def _with_uncertainty(
        self, choice: Choice, body: dict[str, Any], logprobs: Sequence[TokenLogprobs]
    ) -> dict[str, Any]:
        text = functools.partial(token_text, self._tokenizer)
        return uncertainty.add(body, self._job.inquiry.asked, choice.uncertainty, logprobs, text)

    def _logprobs(self, positions: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        content = [
            {
                **self._token(position.token, position.logprob),
                "top_logprobs": [self._token(token, logprob) for token, logprob in position.top],
            }
            for position in positions
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = token_text(self._tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": token_bytes(self._tokenizer, token)}
