"""POST /v1/decisions: typed questions about one input, answered with probabilities.

A model with a head answers by it, and its options are the head's labels. Any other model reads the options in its
prompt and answers by the log-probabilities of the letters that name them, which are not calibrated.

Must not know: how probabilities are computed, how questions are written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from jinja2 import TemplateError

from motet.adapters.heads import HeadFile
from motet.server.api import questions, served
from motet.server.api.decision_body import DecisionBody, text_of
from motet.server.api.errors import bad_request
from motet.server.api.inputs import Prompt
from motet.server.api.labelling import WAVE, Labeller, leased
from motet.server.api.questions import LETTERS, Option
from motet.server.api.service import Service
from motet.server.api.uncertainty import LOGPROB, of_head
from motet.server.api.visit import visit_of

SAID = ("method", "version", "calibrated", "epistemic", "aleatoric", "total", "abstain", "threshold")
"""What a head says beside OpenAI's fields; there they begin with x_."""
Answered = tuple[list[dict[str, Any]], int, int]
"""Answers, tokens of all prompts, and how many of them the prefix cache spared."""


def router(service: Service) -> APIRouter:
    """The endpoint, bound to a service."""
    routes = APIRouter()

    @routes.post("/v1/decisions")
    async def decisions(body: DecisionBody, request: Request, response: Response) -> dict[str, Any]:
        service.require_open()
        service.require_texts()
        options = [questions.options_of(one, f"questions.{place}") for place, one in enumerate(body.questions)]
        caller = visit_of(request).caller
        async with leased(service, body.model, caller) as labeller:
            head = labeller.head
            versions = labeller.versions
            with service.counted(caller, *labeller.counted, min(len(options), WAVE)) as ticket:
                answered = (
                    _by_letters(labeller, body, options) if head is None else _by_head(labeller, body, options, head)
                )
                answers, tokens, cached = await answered
                ticket.tokens = tokens
        usage = {
            "input_tokens": tokens,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": tokens,
        }
        response.headers.update(served.header(versions))
        return {"model": body.model, **served.fields(versions), "answers": answers, "usage": usage}

    return routes


async def _by_head(
    labeller: Labeller, body: DecisionBody, options: Sequence[Sequence[Option]], head: HeadFile
) -> Answered:
    places = [
        questions.places(one, options[at], head.labels, f"questions.{at}") for at, one in enumerate(body.questions)
    ]
    prompts = [_prompt(labeller, body, text_of(one.instructions), as_text=True) for one in body.questions]
    predictives, cached = await labeller.by_head([Prompt(prompt) for prompt in prompts])
    answers = []
    for at, (question, predictive) in enumerate(zip(body.questions, predictives, strict=True)):
        said, p_C = of_head(head, predictive), predictive.p_C.tolist()
        more = {f"x_{name}": said[name] for name in SAID if name in said}
        answers.append(
            questions.answer(question, options[at], [p_C[place] for place in places[at]], said["confidence"], more)
        )
    return answers, sum(map(len, prompts)), cached


async def _by_letters(labeller: Labeller, body: DecisionBody, options: Sequence[Sequence[Option]]) -> Answered:
    asked = [questions.asked(one, options[at], f"questions.{at}") for at, one in enumerate(body.questions)]
    templated = bool(labeller.tokenizer.chat_template)
    prompts = [
        _prompt(labeller, body, question if templated else f"{question}\nAnswer:", as_text=not templated)
        for question in asked
    ]
    letters = _letters(labeller, max(map(len, options)), "" if templated else " ")
    logprobs, cached = await labeller.by_tokens(letters, [Prompt(prompt) for prompt in prompts])
    answers = []
    for at, (question, found) in enumerate(zip(body.questions, logprobs, strict=True)):
        own = found[: len(options[at])]
        relative = [math.exp(logprob - max(own)) for logprob in own]
        probabilities = [weight / math.fsum(relative) for weight in relative]
        mass = min(math.fsum(map(math.exp, own)), 1.0)
        more = {"x_method": LOGPROB, "x_calibrated": False, "x_label_mass": mass}
        answers.append(questions.answer(question, options[at], probabilities, max(probabilities) * mass, more))
    return answers, sum(map(len, prompts)), cached


def _prompt(labeller: Labeller, body: DecisionBody, question: str, *, as_text: bool) -> list[int]:
    """The input and then the question.

    Args:
        as_text: whether an input that is a text stands in no conversation.
    """
    if isinstance(body.input, str) and as_text:
        return labeller.encoded("\n\n".join(part for part in (body.input, question) if part), "input")
    if isinstance(body.input, str):
        messages = [{"role": "user", "content": body.input}]
    else:
        roles = {"developer": "system"}
        messages = [{"role": roles.get(one.role, one.role), "content": text_of(one.content)} for one in body.input]
    if question and messages and messages[-1]["role"] == "user":
        messages[-1]["content"] += f"\n\n{question}"
    elif question:
        messages.append({"role": "user", "content": question})
    if not labeller.tokenizer.chat_template:
        raise bad_request(f"model {body.model!r} has no chat template; give input as a text", "input")
    try:
        encoded = labeller.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=True
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise bad_request(f"the chat template refuses these messages: {error}", "input") from error
    return labeller.fitting(list(encoded["input_ids"]), "input")


def _letters(labeller: Labeller, count: int, before: str) -> tuple[int, ...]:
    """The tokens of the letters that name options, as an answer begins with them."""
    found = [labeller.tokenizer(before + letter, add_special_tokens=False)["input_ids"] for letter in LETTERS[:count]]
    if any(len(tokens) != 1 for tokens in found):
        raise bad_request(
            "the model's tokenizer has no token of its own for each letter; ask a model with a head", "model"
        )
    return tuple(tokens[0] for tokens in found)
