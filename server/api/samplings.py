"""How a request's tokens are drawn, as its body says.

Must not know: the engine, text, responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from motet.server.api.errors import bad_request
from motet.server.api.schemas import MOST_STOPS, GenerationBody
from motet.server.api.uncertainty import Asked
from motet.server.api.voice import Voice
from motet.server.engine.types import Sampling


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks for, beyond its prompts and model.

    Attributes:
        logprobs: most likely tokens to report per drawn token; None reports nothing.
        prompt_logprobs: the same for the prompt.
        max_tokens: None fills the context.
        uncertainty: None says nothing of it.
    """

    max_tokens: int | None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    uncertainty: Asked | None = None


def stops_of(body: GenerationBody) -> list[str]:
    """Strings that end an answer."""
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > MOST_STOPS:
        raise bad_request(f"stop has {len(stops)} strings; at most {MOST_STOPS} are honoured", "stop")
    if "" in stops:
        raise bad_request("stop has an empty string, which would end every answer at once; remove it", "stop")
    return stops


def sampling_of(max_length: int, voice: Voice, body: GenerationBody, prompt: Sequence[int], wanted: Wanted) -> Sampling:
    """How the answers to one prompt are drawn.

    Raises:
        ApiError: the request asks for what is not possible.
    """
    room = max_length - len(prompt)
    max_tokens = room if wanted.max_tokens is None else max(1, wanted.max_tokens)
    if room < 1 or max_tokens > room:
        raise bad_request(
            f"the prompt has {len(prompt)} tokens and max_tokens is {wanted.max_tokens}; together at most "
            f"{max_length} are possible: shorten the prompt or lower max_tokens",
            "max_tokens" if room >= 1 else "prompt",
            "context_length_exceeded",
        )
    if body.min_tokens > max_tokens:
        raise bad_request(f"min_tokens {body.min_tokens} exceeds max_tokens {max_tokens}", "min_tokens")
    stop_tokens = frozenset(body.stop_token_ids or ())
    if stop_tokens and (largest := max(stop_tokens)) >= voice.vocabulary:
        raise bad_request(
            f"stop_token_ids has token {largest}; the tokens of {voice.model} are 0 to {voice.vocabulary - 1}",
            "stop_token_ids",
        )
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k if body.top_k and body.top_k > 0 else None,
        min_p=body.min_p or 0.0,
        seed=body.seed,
        stop_token_ids=stop_tokens if body.ignore_eos else stop_tokens | voice.end_tokens,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_logit_bias(body, voice.vocabulary),
        top_logprobs=wanted.logprobs,
        prompt_logprobs=wanted.prompt_logprobs,
        spread=wanted.uncertainty is not None and wanted.uncertainty.spread,
        feature=wanted.uncertainty is not None and wanted.uncertainty.head is not None,
    )


def copy_for(sampling: Sampling, copy: int) -> Sampling:
    """The n answers to one seeded prompt are drawn with seed, seed + 1, …"""
    if sampling.seed is None or copy == 0:
        return sampling
    return replace(sampling, seed=sampling.seed + copy)


def _logit_bias(body: GenerationBody, vocabulary: int) -> tuple[tuple[int, float], ...]:
    biases: list[tuple[int, float]] = []
    for key, bias in (body.logit_bias or {}).items():
        if not key.isascii() or not key.isdigit() or int(key) >= vocabulary:
            raise bad_request(f"logit_bias names token {key!r}; tokens are 0 to {vocabulary - 1}", "logit_bias")
        if not -100 <= bias <= 100:
            raise bad_request(f"logit_bias of token {key} is {bias}; the range is -100 to 100", "logit_bias")
        biases.append((int(key), bias))
    return tuple(biases)
